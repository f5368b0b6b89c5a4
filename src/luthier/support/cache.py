"""The cache folder: results that can be made again, each under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.support.files import sweep, whole


def cache_folder() -> Path:
    """LUTHIER_CACHE, else ~/.cache/luthier."""
    return Path(os.environ.get("LUTHIER_CACHE") or Path.home() / ".cache" / "luthier")


def key_of(*parts: object) -> str:
    """A name that depends on these parts only."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:32]


def content_of(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """A folder in the cache, complete or absent. If another process was faster, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    try:
        with whole(folder) as temporary:
            yield temporary
    except OSError:
        if not folder.is_dir():
            raise
