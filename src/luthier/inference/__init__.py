"""Asking a model: losses of rows, answers to prompts."""
