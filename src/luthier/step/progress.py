"""The progress of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Progress:
    """The numbers that the loop gives to its listener after a step, and that a checkpoint stores."""

    step: int = 0
    tokens: int = 0
    row_tokens: int = 0  # tokens of the rows so far, trained on or left out
    supervised: int = 0
    seconds: float = 0.0
    select_seconds: float = 0.0  # part of these: choosing the trained weights
    skipped: int = 0  # steps without a change: no supervised token, or a loss that is not finite
    not_finite: int = 0  # part of these: the latest ones in a row whose loss was not finite
    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    resumed: bool = False
    saved_step: int = -1
    flops: dict[str, float] = field(default_factory=dict)  # by stage, over all ranks
    log: list[dict[str, float]] = field(default_factory=list)


def together(stages: Iterable[Progress]) -> Progress:
    """The sums over several stages."""
    out, flops = Progress(), Counter[str]()
    for p in stages:
        out.step += p.step
        out.tokens += p.tokens
        out.row_tokens += p.row_tokens
        out.supervised += p.supervised
        out.seconds += p.seconds
        out.select_seconds += p.select_seconds
        out.skipped += p.skipped
        out.resumed |= p.resumed
        flops.update(p.flops)
        out.log += p.log
    out.flops = dict(flops)
    return out
