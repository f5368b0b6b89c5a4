"""Claims of the sources, measured here."""
