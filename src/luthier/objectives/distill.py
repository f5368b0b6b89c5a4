"""Learn a teacher's soft labels. Each row is weighted by how much it would help on labelled rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor

from luthier.method import Facts, Problem, Source, Traits
from luthier.objectives.base import Forward, Objective, Term, Window, weighed_rows
from luthier.step.probe import Probe
from luthier.support.errors import LuthierError


def soft_loss(logits: Tensor, soft: Tensor) -> Tensor:
    """[S] float32: KL(soft || softmax(logits)); logits [S, C], soft [S, C] probabilities."""
    own: Tensor = torch.special.xlogy(soft, soft)
    return (own - soft * logits.float().log_softmax(-1)).sum(-1)


def helpful_weights(helpfulness: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """[S]: relu(u) / sum relu(u), or all zero where nothing helps.

    total  the sum of a tensor over ranks
    """
    positive = helpfulness.clamp_min(0)
    whole = total(positive.sum())
    return positive / whole if whole > 0 else positive


class Distill(Objective):
    """KL to the soft labels of a teacher, with LiST's re-weighting after a warm-up.

    For the first `warmup_share` of the steps, all rows have equal weight. Then the weight of a row is relu(<g, grad l_i>),
    scaled so that weights sum to 1; g is the gradient of the cross-entropy on the labelled rows. This equals the look-ahead
    of the source without its inner learning rate. It takes one backward and one forward-mode pass, and no second-order graph.
    Departs from the source: all labelled rows up to `meta_rows` are used, not 4 (4 gave weights no better than chance). If no row
    helps, the step is skipped.
    Cost: about twice a plain step once the warm-up is over.
    Needs: per row "soft" [C]; labelled rows from the lab under "labelled".
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"classification"}), needs=frozenset({"jvp", "grad"}))
    source: ClassVar[Source] = Source(
        "LiST: Lite Prompted Self-training Makes Parameter-efficient Few-shot Learners",
        2021,
        "arXiv:2110.06274",
        "official code",
    )

    recipe_lines: ClassVar[tuple[str, ...]] = (
        "task: classification",
        "data: {train: train.jsonl, eval: test.jsonl, keep: [soft]}  # rows of text, label and soft (a list of probabilities)",
        "objective: distill",
    )

    warmup_share: float = Field(0.6, ge=0, le=1)
    """Share of the steps before rows are weighted."""
    reweight: bool = True
    """False keeps equal weights in all steps."""
    meta_rows: int = Field(32, ge=1)
    """Labelled rows that decide the weights."""
    min_confidence: float = Field(0.0, ge=0, lt=1)
    """During the warm-up, rows whose largest soft label is not above this have weight 0."""

    _report: dict[str, float] = PrivateAttr(default_factory=dict)

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if facts.kept is not None and "soft" not in facts.kept:
            what = "the rows have no soft labels"
            remedy = "give each row a list of probabilities, one for each class, and name it in data.keep: [soft]"
            problems.append(Problem("", what, f"{remedy}; or use pipeline: list, which makes them"))
        return problems

    def reweights(self, step: int, total: int) -> bool:
        """True for 0-based steps past the warm-up; the comparison is strict, as in the official code."""
        return self.reweight and step > self.warmup_share * total

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        if any("soft" not in b.row for b in window.micro):
            raise LuthierError("objective.distill: a row has no soft label; run the stage that labels the pool first")
        sizes = [b.num_sequences for b in window.micro]
        if self.reweights(window.clock.step, window.clock.total):
            weights = helpful_weights(self.helpfulness(window, probe), window.total)
        else:
            sure = [b.row["soft"].max(-1).values > self.min_confidence for b in window.micro]
            weights = torch.cat([*sure, torch.zeros(0, dtype=torch.bool, device=probe.view.device)]).float()
        raw = [weighed_rows(w, b) for w, b in zip(weights.split(sizes), window.micro, strict=True)]
        weights = torch.cat([*raw, weights[:0]])
        self._report["distill/helpful"] = float(weights.gt(0).float().sum()) / max(len(weights), 1)
        micro = [b.with_columns(row={"weight": w}) for b, w in zip(window.micro, raw, strict=True)]
        return window.with_micro(micro), {"weight": float(weights.sum())}

    def helpfulness(self, window: Window, probe: Probe) -> Tensor:
        """[S] over all micro-batches of this rank: <grad of the labelled loss, grad l_i>."""
        names = [n for n, p in probe.view.module.named_parameters() if p.requires_grad]
        meta = window.lab.batch("labelled", self.meta_rows).to(probe.view.device)
        g = probe.gradients([meta], names, loss=_labelled_loss).grads
        out = [torch.zeros(0, device=probe.view.device)]  # a rank may have no rows
        for batch in window.micro:
            with probe.quiet():
                _, u = probe.jvp(lambda b=batch: self._row_losses(probe.forward(b)), g)  # type: ignore[misc]
            out.append(u.detach())
        return torch.cat(out)

    def _row_losses(self, fwd: Forward) -> Tensor:
        return soft_loss(fwd.logits(), fwd.batch.row["soft"])

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        return {"loss": Term((self._row_losses(fwd) * fwd.batch.row["weight"]).sum(), "weight")}

    def report(self) -> Mapping[str, float]:
        return self._report


def _labelled_loss(fwd: Forward) -> Tensor:
    return F.cross_entropy(fwd.logits(), fwd.batch.row["label"])
