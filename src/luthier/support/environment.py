"""Describe this process's software and machine, and keep libraries quiet."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version

from luthier.support.errors import LuthierError
from luthier.support.version import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def without_missing_kernels() -> None:
    """Leave out the one message of bitsandbytes that a package which luthier does not use is missing. It comes at its import."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if _used not in log.filters:
        log.addFilter(_used)


def _used(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


LEVELS = ("debug", "info", "warning", "error")


def quiet(debug: bool) -> None:
    """Switch off messages of libraries. LUTHIER_LOG writes luthier's own to standard error; "debug" lets libraries speak too.

    Raises LuthierError for another value of LUTHIER_LOG.
    """
    level = os.environ.get("LUTHIER_LOG", "")
    if level:
        _listen(level)
    if debug or level == "debug":
        return
    import datasets
    import transformers

    warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _listen(level: str) -> None:
    if level not in LEVELS:
        raise LuthierError(f"LUTHIER_LOG={level!r}: write {', '.join(LEVELS[:-1])} or {LEVELS[-1]}")
    logger = logging.getLogger("luthier")
    logger.setLevel(level.upper())
    if not any(h.get_name() == "luthier" for h in logger.handlers):
        handler = logging.StreamHandler()
        handler.set_name("luthier")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)


def environment() -> str:
    """A block to paste into a bug report."""
    import torch

    lines = [
        f"luthier {__version__}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        f"cores {os.cpu_count()}",
        *(f"gpu {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())),
    ]
    for name in PACKAGES:
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines) + "\n"
