"""Rows: reading, rendering, batches."""
