"""Arms at equal cost: which of them is better, by how much, and how sure is that."""
