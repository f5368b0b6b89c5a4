"""Amounts as people say them."""

from __future__ import annotations

import math


def in_bytes(count: float) -> str:
    """1.5 GB, 3 MB, 20 kB."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def in_time(seconds: float) -> str:
    """90 s, 10 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def in_flops(count: float) -> str:
    """3.21 TFLOP."""
    if count <= 0 or not math.isfinite(count):
        return f"{count:g} FLOP"
    power = min(6, max(0, int(math.log10(count) // 3)))
    return f"{count / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"
