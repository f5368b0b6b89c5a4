"""Using a model: losses of rows, answers to prompts."""
