"""Rows that come with luthier."""
