"""Which rows, in which words."""

EXPORTS: dict[str, str] = {}
