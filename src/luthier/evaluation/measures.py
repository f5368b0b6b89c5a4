"""Measures, row by row, so that two models can be compared on exactly the same rows.

Every measure here is a function of sums over rows: a mean, a ratio of sums, BLEU's counts, a confusion table. So leaving out one
row is a subtraction, and the jackknife's pseudo-values give each row's own part in the whole. For a mean, these are the values
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from luthier.support.statistics import Estimate, estimate, wilson

BINS = 10  # of calibration
SIDE = ("answer_tokens", "stopped")  # these describe answers but do not judge them


class Aggregate(NamedTuple):
    """How rows become one number.

    features  [N, k] stored numbers of each row -> [N, K] numbers that are summed over rows
    of        [..., K] sums -> [...] values
    """

    features: Callable[[np.ndarray], np.ndarray]
    of: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Measure:
    """One quantity over rows.

    stats      [N, k] float64, the numbers of each row; `aggregate` defines k and their meaning
    keys       N row keys, unique
    aggregate  a name in AGGREGATES
    higher     True if more is better
    judges     True if a row's single number means right (1) or wrong (0)
    """

    name: str
    stats: np.ndarray
    keys: tuple[str, ...]
    aggregate: str = "mean"
    higher: bool = True
    unit: str = ""
    judges: bool = False

    @property
    def value(self) -> float:
        """Over all rows; NaN for none."""
        rule = AGGREGATES[self.aggregate]()
        return float(rule.of(rule.features(self.stats).sum(0))) if len(self.stats) else float("nan")

    def pseudo_values(self) -> np.ndarray:
        """[N] each row's part: N f(all) - (N - 1) f(all except it). Their mean is the value minus the jackknife's bias."""
        rule, n = AGGREGATES[self.aggregate](), len(self.stats)
        features = rule.features(self.stats)
        total = features.sum(0)
        if n < 2:
            return np.array([self.value] * n)
        parts: np.ndarray = n * rule.of(total) - (n - 1) * rule.of(total - features)
        return parts

    def brief(self) -> dict[str, Any]:
        """The measure without rows, for run.json."""
        return {"value": self.value, "rows": len(self.keys), "higher": self.higher, "unit": self.unit}

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name, "stats": self.stats.tolist(), "keys": list(self.keys), "aggregate": self.aggregate,
            "higher": self.higher, "unit": self.unit, "judges": self.judges,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measure:
        """What `as_dict` gave."""
        stats = np.array(values["stats"], dtype=np.float64).reshape(len(values["keys"]), -1)
        return cls(**{**values, "stats": stats, "keys": tuple(values["keys"])})


def mean(name: str, values: Any, keys: tuple[str, ...], **more: Any) -> Measure:
    """A mean of one number a row."""
    return Measure(name, np.asarray(values, dtype=np.float64).reshape(-1, 1), keys, **more)


def ratio(name: str, above: Any, below: Any, keys: tuple[str, ...], **more: Any) -> Measure:
    """A sum over rows divided by another: nats by tokens."""
    return Measure(name, np.stack([above, below], 1).astype(np.float64), keys, aggregate="ratio", **more)


# --- how sure ---


def interval(measure: Measure) -> tuple[float, float] | None:
    """The 95% interval of a measure for other rows of the same kind; None if there are too few rows to know."""
    if len(measure.keys) < 2:
        return None
    if measure.aggregate == "mean" and set(np.unique(measure.stats)) <= {0.0, 1.0}:
        return wilson(float(measure.stats.sum()), len(measure.keys))
    parts = measure.pseudo_values()
    if not np.isfinite(parts).all():
        return None
    found = estimate(parts[None, :])
    return found.low, found.high


def change(before: Measure, after: Measure) -> Estimate | None:
    """How much a measure changed, row by row, with a 95% interval; None for other rows, or if no interval is known."""
    if before.keys != after.keys or len(after.keys) < 2:
        return None
    parts = after.pseudo_values() - before.pseudo_values()
    return estimate(parts[None, :]) if np.isfinite(parts).all() else None


def beside_base(after: Measure, before: Measure | None = None) -> dict[str, Any]:
    """A measure with its interval, beside the base model's value and the change. What is not known is None."""
    ends = interval(after) or (None, None)
    out = {**after.brief(), "low": ends[0], "high": ends[1], "base": None, "change": None}
    if before is not None:
        by = change(before, after)
        out["base"] = before.value
        out["change"] = None if by is None else {"value": after.value - before.value, "low": by.low, "high": by.high}
    return out


# --- how rows become one number ---


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    out = np.zeros_like(above, dtype=np.float64)
    np.divide(above, below, out=out, where=below != 0)
    return out


def _mean() -> Aggregate:
    ones = lambda stats: np.concatenate([stats, np.ones((len(stats), 1))], 1)  # noqa: E731
    return Aggregate(ones, lambda s: _divided(s[..., 0], s[..., 1]))


def _ratio() -> Aggregate:
    return Aggregate(lambda stats: stats, lambda s: _divided(s[..., 0], s[..., 1]))


def _macro_f1() -> Aggregate:
    """stats [N, 2]: the right class, the chosen one. F1 of each class that occurs on either side, averaged."""

    def features(stats: np.ndarray) -> np.ndarray:  # [N, 2] -> [N, 3 C]: hits, right class, chosen class
        right, chosen = stats.astype(np.int64).T
        eye = np.eye(int(stats.max(initial=0)) + 1)
        hit = eye[right] * (right == chosen)[:, None]
        return np.concatenate([hit, eye[right], eye[chosen]], 1)

    def of(sums: np.ndarray) -> np.ndarray:
        hit, right, chosen = np.split(sums, 3, axis=-1)
        f1 = _divided(2 * hit, right + chosen)
        return _divided(f1.sum(-1), ((right + chosen) > 0).sum(-1).astype(np.float64))

    return Aggregate(features, of)


def _calibration() -> Aggregate:
    """stats [N, 3 BINS]: in each bin of confidence how many, the confidences' sum, how many were right."""

    def of(sums: np.ndarray) -> np.ndarray:
        count, confidence, right = np.split(sums, 3, axis=-1)
        return _divided(np.abs(confidence - right).sum(-1), count.sum(-1))

    return Aggregate(lambda stats: stats, of)


@cache
def _sacrebleu(name: str) -> Any:
    """The metric whose own counts are stored; its corpus score is a function of their sum."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU() if name == "bleu" else CHRF()


def corpus_statistics(name: str, hypotheses: list[str], references: list[tuple[str, ...]]) -> np.ndarray:
    """[N, K] counts of sacrebleu's "bleu" or "chrf" for each answer against its references."""
    width = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(width)]
    return np.array(_sacrebleu(name)._extract_corpus_statistics(hypotheses, streams), dtype=np.float64)


def _corpus(name: str) -> Aggregate:
    def of(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        values = [_sacrebleu(name)._compute_score_from_stats([int(x) for x in s]).score for s in flat]
        return np.array(values).reshape(sums.shape[:-1])

    return Aggregate(lambda stats: stats, of)


AGGREGATES: dict[str, Callable[[], Aggregate]] = {
    "mean": _mean, "ratio": _ratio, "macro_f1": _macro_f1, "calibration": _calibration,
    "bleu": lambda: _corpus("bleu"), "chrf": lambda: _corpus("chrf"),
}  # fmt: skip
