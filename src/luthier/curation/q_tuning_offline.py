"""Q-Tuning offline: the rows that teach most, chosen once over the whole set by the untouched model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from luthier.curation.base import Base, Curator, Selection
from luthier.data.batch import collate
from luthier.data.quadrants import NLL_CLAMP, choose_rows, named
from luthier.data.store import Row
from luthier.method import Source, Traits
from luthier.step.forward import Forward, sequence_sum
from luthier.step.order import micro_batches
from luthier.support.cache import cache_folder, key_of
from luthier.support.errors import RecipeError
from luthier.support.files import replaced
from luthier.support.rng import Streams
from luthier.support.sources import code_key

PART = 256  # rows rendered and sorted into forwards together


class QTuningOffline(Curator):
    """Keep the rows that surprise the untouched model while it is sure, or that it expects while it is unsure.

    The sample stage of q-tuning over all rows at once: perplexity and mean entropy of each answer under the base model;
    rows in the quadrants of misconceptions (Q2) and of what is to be calibrated (Q4) stay, topped up or cut to
    keep_fraction by the gap between the two. Unlike the objective it looks once, before training, and prunes no tokens;
    the scores are kept in the cache, so another fraction costs nothing. The report shows the plane.
    Measured here: of rows with answers of other rows it keeps 34 to 38% where 40% are wrong, and teaches no more than a
    random part.
    Cost: one forward pass over all rows, and loading the model before the rows are chosen.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), needs=frozenset({"base_view"}))
    source: ClassVar[Source] = Source(
        "Winning the Pruning Gamble: Joint Sample and Token Pruning for Efficient SFT",
        2025,
        "arXiv:2509.23873",
        "eq. 4-5",
    )

    keep_fraction: float = Field(gt=0, le=1, examples=[0.5])
    """Share of the rows kept (r_sample)."""
    bisection_steps: int = Field(10, ge=1)
    """Halvings in the search for the quadrants' edges (K)."""

    def select(self, rows: Sequence[Row], streams: Streams, base: Base | None = None) -> Selection:
        if base is None:
            raise RecipeError("curate.q-tuning-offline", "asks a model and was given none", "pass model and tokenizer")
        if int(self.keep_fraction * len(rows)) < 1 or len(rows) < 2:
            raise RecipeError(
                "q-tuning-offline.keep_fraction", f"{self.keep_fraction} of {len(rows)} rows keeps none", "raise it"
            )
        plane, flops = _kept(rows, base)
        usable = np.flatnonzero(np.isfinite(plane).all(1))
        if not len(usable):
            raise RecipeError("curate.q-tuning-offline", "no row has a supervised token", "look at data.columns")
        ppl, entropy = plane[usable].T
        share = self.keep_fraction
        if len(usable) < len(rows):  # of all rows, but from those that can be scored; half a row keeps the floor exact
            share = min(1.0, (int(self.keep_fraction * len(rows)) + 0.5) / len(usable))
        chosen = choose_rows(ppl, entropy, share, self.bisection_steps)
        keep, reason = usable[chosen.keep], ["without a supervised token"] * len(rows)
        for i, quadrant in zip(usable, named(ppl, entropy, chosen.alpha), strict=True):
            reason[i] = f"left out: {quadrant}"
        for i, topped in zip(keep, chosen.topped_up, strict=True):
            reason[i] = ("kept to fill up: " if topped else "kept: ") + reason[i].removeprefix("left out: ")
        shown = np.stack([np.log(plane[:, 0]), plane[:, 1]], 1)
        return Selection(keep, plane[:, 0], reason, flops, shown, ("log perplexity", "mean entropy"))


def _kept(rows: Sequence[Row], base: Base) -> tuple[np.ndarray, float]:
    """([N, 2] perplexity and entropy, FLOPs that finding them took), from the cache where it has them."""
    view = base.view()
    digest = getattr(rows, "digest", None)
    if digest is None:
        return scored(rows, base)
    asked = (view.base.weights, view.base.tokenizer, str(view.dtype), base.renderer.system, base.renderer.plain)
    file = cache_folder() / "planes" / f"{key_of(digest, asked, code_key(__name__))}.npz"
    if not file.exists():
        plane, flops = scored(rows, base)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as temporary, temporary.open("wb") as out:
            np.savez(out, plane=plane, flops=flops)
    stored: Any = np.load(file)
    return stored["plane"], float(stored["flops"])


@torch.no_grad()
def scored(rows: Sequence[Row], base: Base) -> tuple[np.ndarray, float]:
    """[N, 2] perplexity and mean entropy of each row's answer, NaN without one; and the FLOPs."""
    view, out = base.view(), np.full((len(rows), 2), np.nan)
    before = view.meter.total
    view.module.eval()
    with view.meter.watching(view.module), view.meter.stage("curate"):
        for start in range(0, len(rows), PART):
            part = [
                base.renderer.render(rows[i].values, rows[i].key) for i in range(start, min(start + PART, len(rows)))
            ]
            base.tick("curating", start, part[0]["key"])
            for places in micro_batches([len(r["ids"]) for r in part], base.tokens_per_forward)[0]:
                batch = collate([part[i] for i in places]).to(view.device)
                fwd = Forward(batch, view)
                scores = fwd.scores()
                n = sequence_sum(torch.ones_like(scores.nll), batch)
                ppl = _mean(sequence_sum(scores.nll, batch), n).clamp(max=NLL_CLAMP).exp()
                entropy = _mean(sequence_sum(scores.entropy, batch), n)
                out[[start + i for i in places]] = torch.stack([ppl, entropy], 1).double().cpu().numpy()
    return out, view.meter.total - before


def _mean(total: Tensor, n: Tensor) -> Tensor:
    return torch.where(n > 0, total / n.clamp_min(1), torch.nan)
