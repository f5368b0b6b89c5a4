"""luthier: fine-tune language models with less."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.support.environment import without_missing_kernels
from luthier.support.version import __version__ as __version__

if TYPE_CHECKING:
    from luthier.update import Update

without_missing_kernels()


def load(folder: str | Path) -> Update:
    """The update a run left in a folder. Raises LuthierError for a folder that holds none."""
    from luthier.update.files import load as read  # keeps torch out of `import luthier`

    return read(folder)
