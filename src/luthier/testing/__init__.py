"""For tests of methods: tiny models, and the contract suite that every method must pass (a pytest plug-in)."""
