"""SCDP: choose a subset of a labelled set by TF-IDF distance from its geometric median, in seconds and without a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from luthier.curation.base import Chooser, Selection, kept_count, text_of
from luthier.data.mixture import quotas
from luthier.data.store import Row
from luthier.method import Source
from luthier.step.lab import Lab
from luthier.support.errors import RecipeError

NUM_STRATA = 100
FAR_LIMIT = 1500  # kept rows up to which the farthest are taken
log = logging.getLogger(__name__)

# --- the mathematics ---


def squares(x: Any, block: int = 1 << 16) -> np.ndarray:
    """[N] squared norms of sparse rows [N, V], block by block: a whole squared copy would double the memory."""
    parts = [x[start : start + block] for start in range(0, x.shape[0], block)]
    return np.concatenate([np.asarray(p.multiply(p).sum(1), dtype=np.float64).ravel() for p in parts])


def distances(x: Any, y: np.ndarray, of_x: np.ndarray | None = None) -> np.ndarray:
    """[N] Euclidean distances of sparse rows [N, V] to y [V], without making them dense; of_x are squares(x)."""
    of_x = squares(x) if of_x is None else of_x
    far: np.ndarray = np.sqrt(np.clip(of_x - 2 * (x @ y) + y @ y, 0, None))
    return far


def geometric_median(x: Any, eps: float = 1e-5, max_iter: int = 200) -> tuple[np.ndarray, int]:
    """([V] the point with the smallest sum of distances to the rows of x [N, V], the number of iterations).

    Weiszfeld's iteration, with Vardi and Zhang's correction where the current point lies on a row. Warns if it stops at
    `max_iter`.
    """
    y, of_x = np.asarray(x.mean(0), dtype=np.float64).ravel(), squares(x)
    for iteration in range(1, max_iter + 1):
        d = distances(x, y, of_x)
        on = d < 1e-12
        if on.all():
            return y, iteration
        w = np.where(on, 0.0, 1 / np.where(on, 1.0, d))
        t = np.asarray(x.T @ w).ravel() / w.sum()
        following = t
        if on.any():
            r = np.linalg.norm((t - y) * w.sum())
            c = on.sum() / r if r else 0.0
            following = max(0.0, 1 - c) * t + min(1.0, c) * y
        if np.linalg.norm(y - following) < eps:
            return y, iteration
        y = following
    log.warning("scdp: the geometric median had not settled after %d iterations", max_iter)
    return y, max_iter


def strata_of(scores: np.ndarray, count: int = NUM_STRATA) -> np.ndarray:
    """[N] stratum of each score among `count` of equal width; the largest falls into the last."""
    low, high = scores.min(), 1.0001 * scores.max()
    step = (high - low) / count
    if step == 0:
        return np.zeros(len(scores), dtype=np.int64)
    found: np.ndarray = np.minimum(((scores - low) / step).astype(np.int64), count - 1)
    return found


def water_fill(sizes: np.ndarray, total: int) -> np.ndarray:
    """The number to draw from each stratum, in all `total` <= sum(sizes): equally many from each, or all of a smaller one."""
    budgets, left = np.zeros(len(sizes), dtype=np.int64), total
    for visited, k in enumerate(np.argsort(sizes, kind="stable")):
        budgets[k] = min(sizes[k], left // (len(sizes) - visited))
        left -= budgets[k]
    return budgets


def farthest(scores: np.ndarray, count: int) -> np.ndarray:
    """[count] positions of the largest scores; ties by position."""
    return np.argsort(-scores, kind="stable")[:count]


def stratified(scores: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """[count] positions, drawn evenly over the strata."""
    strata = strata_of(scores)
    sizes = np.bincount(strata, minlength=NUM_STRATA)
    budgets = water_fill(sizes, count)
    picked = [generator.choice(np.flatnonzero(strata == k), b, replace=False) for k, b in enumerate(budgets) if b]
    return np.concatenate(picked)


# --- the method ---


class Scdp(Chooser):
    """Rank rows by their TF-IDF distance from the set's geometric median. Keep the farthest, or a spread over distances.

    Up to 1500 kept rows, the farthest ("hardest") stay; above that, an even draw over 100 strata of distance. The switch
    depends on the number of kept rows, so a curve over keep_fraction is not one method. "Far" means rare words: look at
    the farthest rows before you trust them. Remove duplicates first, because they move the median and are kept together.
    Rows without a word of two letters have no direction; they are dropped before the farthest are taken.
    Cost: one TF-IDF pass and a few sparse products; no model.
    """

    packages: ClassVar[Mapping[str, str]] = {"sklearn": "select"}
    source: ClassVar[Source] = Source(
        "Swift Cross-Dataset Pruning: Enhancing Fine-Tuning Efficiency in NLU",
        2025,
        "arXiv:2501.02432",
        "official code",
    )

    keep_fraction: float = Field(gt=0, le=1, examples=[0.5])
    """Share of the rows that is kept."""
    class_balanced: bool = False
    """Apply the rule within each class, with its share of the rows."""
    max_features: int | None = Field(None, ge=1)
    """Largest number of words counted; for pools of more than two million rows."""

    def select(self, rows: Sequence[Row], lab: Lab) -> Selection:
        count = kept_count(self.key(), self.keep_fraction, len(rows))
        scores, empty, flops = self.scores(map(text_of, rows))
        lab.ledger.charge("curate", flops)
        rule = "far" if self.keep_fraction * len(rows) <= FAR_LIMIT else "stratified"
        if empty.any():
            log.warning("scdp: %d rows hold no word and cannot be ranked", int(empty.sum()))
        usable = np.where(empty, -np.inf, scores) if rule == "far" else scores
        keep = self._keep(usable, count, rule, self._classes(rows), lab.streams.at("scdp"))
        inside = np.isin(np.arange(len(rows)), keep)
        why = {True: f"kept by rule {rule}", False: f"left out by rule {rule}"}
        return Selection(np.sort(keep), scores, [why[i] for i in inside.tolist()])

    def scores(self, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray, float]:
        """([N] distance from the median, [N] True for rows without a word, FLOPs of the sparse products)."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        try:
            x = TfidfVectorizer(max_features=self.max_features, dtype=np.float32).fit_transform(texts)
        except ValueError as error:
            raise RecipeError("curate.scdp", f"the rows hold no words ({error})", "look at data.columns") from error
        median, iterations = geometric_median(x)
        # x y and x^T w an iteration; the last distances, the squares, the mean
        flops = 2.0 * x.nnz * (2 * iterations + 3)
        return distances(x, median), np.diff(x.indptr) == 0, flops

    def _classes(self, rows: Sequence[Row]) -> np.ndarray:
        """[N] the name of each row's class; one name for all rows if classes are not balanced."""
        if not self.class_balanced:
            return np.full(len(rows), "")
        if any("label" not in r.values for r in rows):
            raise RecipeError("scdp.class_balanced", "a row has no label", "set it to false, or give labelled rows")
        return np.array([str(r.values["label"]) for r in rows])

    def _keep(
        self, scores: np.ndarray, count: int, rule: str, classes: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        picked, (names, sizes) = [], np.unique(classes, return_counts=True)
        for name, quota in zip(names, quotas(sizes, count), strict=True):
            mine = np.flatnonzero(classes == name)
            if not quota:
                log.warning("scdp: class %r keeps no row", str(name))
                continue
            chosen = farthest(scores[mine], quota) if rule == "far" else stratified(scores[mine], quota, generator)
            picked.append(mine[chosen])
        return np.concatenate(picked)
