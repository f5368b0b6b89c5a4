"""Q-Tuning's choice of rows by the model's own perplexity and entropy. These are pure functions, for the objective that prunes
every window and for the curator that prunes a whole set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NLL_CLAMP = 80.0  # exp overflows float32 above 88 nats
NAMES = ("between", "Q1 noise", "Q2 misconception", "Q3 redundant", "Q4 to calibrate")


class Rows(NamedTuple):
    """The rows that stay, which of them have tokens pruned, and why they stayed."""

    keep: np.ndarray  # sorted indices
    prune_tokens: np.ndarray  # bool for each of keep: a misconception row (Q2)
    topped_up: np.ndarray  # bool for each of keep: not from a quadrant
    alpha: float


def quantile(values: np.ndarray, share: float) -> float:
    """Smallest value with at least this share of values at or below it."""
    return float(np.quantile(values, share, method="inverted_cdf"))


class Edges(NamedTuple):
    """Masks [B]: values at or below the quantile alpha, and values at or above the quantile 1 - alpha."""

    low: np.ndarray
    high: np.ndarray


def edges(values: np.ndarray, alpha: float) -> Edges:
    """The low and the high values."""
    return Edges(values <= quantile(values, alpha), values >= quantile(values, 1 - alpha))


def quadrants(perplexity: np.ndarray, entropy: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(Q2, Q4) as masks: the model is wrong and sure (high perplexity, low entropy), or right and unsure (low, high)."""
    p, e = edges(perplexity, alpha), edges(entropy, alpha)
    return p.high & e.low, p.low & e.high


def kept_share(perplexity: np.ndarray, entropy: np.ndarray, alpha: float) -> float:
    """Share of rows in Q2 or Q4; non-decreasing in alpha."""
    q2, q4 = quadrants(perplexity, entropy, alpha)
    return float((q2 | q4).mean())


def bisect(perplexity: np.ndarray, entropy: np.ndarray, target: float, steps: int) -> float:
    """The last trial alpha in [0, 0.49] that keeps at least `target` of the rows, else 0.49."""
    lo, hi, found = 0.0, 0.49, 0.49
    for _ in range(steps):
        alpha = (lo + hi) / 2
        if kept_share(perplexity, entropy, alpha) < target:
            lo = alpha
        else:
            hi = found = alpha
    return found


def _scaled(values: np.ndarray) -> np.ndarray:
    span = values.max() - values.min()
    return np.zeros_like(values) if span == 0 else (values - values.min()) / span


def choose_rows(perplexity: np.ndarray, entropy: np.ndarray, keep_fraction: float, steps: int) -> Rows:
    """Exactly max(1, floor(keep_fraction * B)) rows of Q2 and Q4. Rows with the largest |scaled PPL - scaled entropy| fill up the
    number, or are the ones that stay if there are too many.
    """
    alpha = bisect(perplexity, entropy, keep_fraction, steps)
    q2, q4 = quadrants(perplexity, entropy, alpha)
    wanted = max(1, int(keep_fraction * len(perplexity)))
    p, e = _scaled(perplexity), _scaled(entropy)
    # Rows of the quadrants come first; inside each class the larger gap does. Ties (two rows always tie) go by
    # perplexity, not by index: the choice must not depend on how a window was cut into micro-batches.
    order = np.lexsort((np.arange(len(p)), -perplexity, -np.abs(p - e), ~(q2 | q4)))
    keep = np.sort(order[:wanted])
    topped = ~(q2 | q4)[keep]
    # A row in both quadrants (values that are all the same) counts as a misconception.
    return Rows(keep, np.where(topped, p[keep] >= e[keep], q2[keep]), topped, alpha)


def named(perplexity: np.ndarray, entropy: np.ndarray, alpha: float) -> list[str]:
    """[B] the name of each row's quadrant. Equal values may lie in several; then Q2 comes first, then Q4, Q1 and Q3."""
    p, e = edges(perplexity, alpha), edges(entropy, alpha)
    found = np.select([p.high & e.low, p.low & e.high, p.high & e.high, p.low & e.low], [2, 4, 1, 3], 0)
    return [NAMES[i] for i in found]
