"""Files and folders that are on disk completely or not at all, even after a kill."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary file that replaces `path` at the end, in one step: readers see the old file or the new one.

    After an error it is removed, and the old file stays.
    """
    temporary = _beside(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def beside(folder: Path, name: str) -> str:
    """The path of a file or folder in this folder if it exists; else the name as it is, for example a Hub id."""
    return str(folder / name) if (folder / name).exists() else name


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """The same as `replaced` for a new folder."""
    temporary = _beside(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Remove half-made files of killed processes, beside a file or folder of this name (a pattern)."""
    if not Path("/proc").is_dir():  # it is unknown which processes live, so nothing is removed
        return
    for path in folder.glob(f".{name}.*"):
        number = path.name.rpartition(".")[2]
        if number.isdigit() and not Path("/proc", number).exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    sweep(path.parent, escape(path.name))
    return path.with_name(f".{path.name}.{os.getpid()}")
