"""Q-Tuning's choice of rows by the model's own perplexity and entropy: pure functions, for the objective that prunes every
window and the curator that prunes a whole set.
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


def quadrants(perplexity: np.ndarray, entropy: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(Q2, Q4) as masks: surely wrong (high perplexity, low entropy), and unsurely right (low, high)."""
    p_lo, p_hi = quantile(perplexity, alpha), quantile(perplexity, 1 - alpha)
    e_lo, e_hi = quantile(entropy, alpha), quantile(entropy, 1 - alpha)
    return (perplexity >= p_hi) & (entropy <= e_lo), (perplexity <= p_lo) & (entropy >= e_hi)


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
    """Exactly max(1, floor(keep_fraction * B)) rows: from Q2 and Q4, topped up or cut by |scaled PPL - scaled entropy|."""
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
    """[B] the quadrant of each row, by NAMES."""
    p_lo, p_hi = quantile(perplexity, alpha), quantile(perplexity, 1 - alpha)
    e_lo, e_hi = quantile(entropy, alpha), quantile(entropy, 1 - alpha)
    out = np.zeros(len(perplexity), dtype=np.int64)
    out[(perplexity <= p_lo) & (entropy <= e_lo)] = 3
    out[(perplexity >= p_hi) & (entropy >= e_hi)] = 1
    out[(perplexity <= p_lo) & (entropy >= e_hi)] = 4
    out[(perplexity >= p_hi) & (entropy <= e_lo)] = 2
    return [NAMES[i] for i in out]
