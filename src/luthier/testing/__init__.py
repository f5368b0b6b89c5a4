"""For tests of methods: tiny models, and the contract that every method keeps (a pytest plug-in)."""
