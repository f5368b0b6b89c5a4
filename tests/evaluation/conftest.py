"""Exams from tests/helpers as fixtures."""

from helpers.exams import exam_of, tiny_view

__all__ = ["exam_of", "tiny_view"]
