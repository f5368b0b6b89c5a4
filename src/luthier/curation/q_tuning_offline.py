"""Q-Tuning offline: the rows that teach most, chosen once over the whole set by the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from luthier.curation.base import Chooser, Selection, kept_count
from luthier.data.quadrants import NLL_CLAMP, choose_rows, named
from luthier.data.store import Row, Rows
from luthier.data.tokens import tokenizer_key
from luthier.kernels.head import TokenScores
from luthier.method import Source, Traits
from luthier.model.fingerprint import configured
from luthier.step.lab import Lab, Ledger
from luthier.support.cache import cache_folder, key_of
from luthier.support.errors import RecipeError
from luthier.support.files import replaced
from luthier.support.sources import code_key

PART = 256  # rows rendered together


class QTuningOffline(Chooser):
    """Keep the rows that surprise the base model while it is sure, or that it expects while it is unsure.

    This is the sample stage of q-tuning over all rows at once: perplexity and mean entropy of each answer under the base
    model. Rows in the quadrant of misconceptions (Q2) and in the quadrant to calibrate (Q4) stay. By the gap between the
    two numbers, rows are added or removed to reach keep_fraction. Unlike the objective, it scores once, before training,
    and prunes no tokens. The scores are kept in the cache, so another fraction costs nothing. The report shows the plane.
    Measured here: if 40% of the rows have answers of other rows, 34 to 38% of the kept rows have them, and training on the
    kept rows is no better than on a random part.
    Cost: one forward pass over all rows, and the model is loaded before the rows are chosen.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), needs=frozenset({"base_view"}))
    source: ClassVar[Source] = Source(
        "Winning the Pruning Gamble: Joint Sample and Token Pruning for Efficient SFT",
        2025,
        "arXiv:2509.23873",
        "eq. 4-5",
    )

    keep_fraction: float = Field(gt=0, le=1, examples=[0.5])
    """Share of the rows that is kept (r_sample)."""
    bisection_steps: int = Field(10, ge=1)
    """Number of halvings in the search for the quadrants' edges (K)."""

    def select(self, rows: Sequence[Row], lab: Lab) -> Selection:
        count = kept_count(self.key(), self.keep_fraction, len(rows))
        plane, flops = _plane(rows, lab)
        lab.ledger.charge("curate", flops)
        usable = np.flatnonzero(np.isfinite(plane).all(1))
        if not len(usable):
            raise RecipeError("curate.q-tuning-offline", "no row has a supervised token", "look at data.columns")
        ppl, entropy = plane[usable].T
        share = self.keep_fraction
        if len(usable) < len(
            rows
        ):  # the share is of all rows; half a row more makes its count of the usable ones exact
            share = min(1.0, (count + 0.5) / len(usable))
        chosen = choose_rows(ppl, entropy, share, self.bisection_steps)
        keep, reason = usable[chosen.keep], ["without a supervised token"] * len(rows)
        for i, quadrant in zip(usable, named(ppl, entropy, chosen.alpha), strict=True):
            reason[i] = f"left out: {quadrant}"
        for i, topped in zip(keep, chosen.topped_up, strict=True):
            reason[i] = ("kept to fill up: " if topped else "kept: ") + reason[i].removeprefix("left out: ")
        shown = np.stack([np.log(plane[:, 0]), plane[:, 1]], 1)
        return Selection(keep, plane[:, 0], reason, shown, ("log perplexity", "mean entropy"))


def _plane(rows: Sequence[Row], lab: Lab) -> tuple[np.ndarray, float]:
    """What `scored` gives, from the cache if it is there."""
    if not (isinstance(rows, Rows) and rows.on_disk):
        return scored(rows, lab)
    view, renderer = lab.view(), lab.renderer
    asked = (
        view.base.weights, tokenizer_key(renderer.tokenizer), configured(view.module.config), str(view.dtype), renderer.system,
        renderer.plain, renderer.stop_ids, renderer.ends, sorted(renderer.options.items()),
    )  # fmt: skip
    file = (
        cache_folder() / "planes" / f"{key_of(rows.digest, asked, code_key(__name__, 'luthier.inference.scoring'))}.npz"
    )
    if not file.exists():
        plane, flops = scored(rows, lab)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as temporary, temporary.open("wb") as out:
            np.savez(out, plane=plane, flops=flops)
    with np.load(file) as stored:
        return stored["plane"], float(stored["flops"])


def scored(rows: Sequence[Row], lab: Lab) -> tuple[np.ndarray, float]:
    """([N, 2] perplexity and mean entropy of each row's answer, NaN for rows without one; the FLOPs that this took)."""
    view, spent, out = lab.view(), Ledger(), []
    with spent.measuring("curate", view):
        for start in range(0, len(rows), PART):
            part = [rows[i] for i in range(start, min(start + PART, len(rows)))]
            lab.tick("curating", start, part[0].key)
            rendered = [lab.renderer.render(r.values, r.key) for r in part]
            out += [_means(found) for found in lab.scorer.tokens(view, rendered)]
    return np.array(out).reshape(len(rows), 2), spent.flops["curate"]


def _means(found: TokenScores) -> tuple[float, float]:
    """Perplexity and mean entropy over a row's supervised tokens."""
    if not len(found.nll):
        return np.nan, np.nan
    nll = min(float(found.nll.double().mean()), NLL_CLAMP)
    return float(np.exp(nll)), float(found.entropy.double().mean())
