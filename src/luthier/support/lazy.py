"""Exports that import their module at first use, so that naming a method does not load torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """(__getattr__, __dir__, __all__) for a package whose names live in these modules of it."""

    def get(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"{package} has no {name}; it has {', '.join(sorted(table))}")
        return getattr(importlib.import_module(f"{package}.{table[name]}"), name)

    return get, lambda: sorted(table), sorted(table)
