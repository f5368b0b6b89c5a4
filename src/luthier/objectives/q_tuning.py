"""Q-Tuning: prune rows and answer tokens of each window by the model's own perplexity and entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from luthier.data.batch import Batch
from luthier.data.quadrants import NLL_CLAMP, Rows, choose_rows
from luthier.method import Facts, Problem, Source, Traits
from luthier.objectives.base import Forward, Objective, Term, Window, count, sequence_sum, weighed
from luthier.step.probe import Probe
from luthier.support.errors import LuthierError


def neighbour_score(values: Tensor, turn: Tensor, weight: float) -> Tensor:
    """(1 - weight) x_i + weight (x_{i-1} + x_{i+1}), eq. 7; at the edge of a turn the token's own value stands in.

    values [n], turn [n] (which run of adjacent answer tokens each belongs to)
    """
    same = turn[1:] == turn[:-1]
    before, after = values.clone(), values.clone()
    before[1:] = torch.where(same, values[:-1], values[1:])
    after[:-1] = torch.where(same, values[1:], values[:-1])
    return (1 - weight) * values + weight * (before + after)


def keep_tokens(scores: Tensor, keep_fraction: float) -> Tensor:
    """[n] bool: the max(1, floor(keep_fraction * n)) smallest scores; ties by position."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[scores.argsort(stable=True)[: max(1, int(keep_fraction * len(scores)))]] = True
    return keep


class QTuning(Objective):
    """Train on the rows that teach most, and leave out tokens that look like noise in rows where the model is surely wrong.

    Every window is scored once without gradient: for each row the perplexity and the mean entropy of its answer. Rows that
    are both surprising and sure (Q2, misconceptions), or both expected and unsure (Q4, to calibrate), stay. In the answers
    of Q2, the tokens with the highest neighbour-smoothed perplexity leave the loss. The choice is made over all rows of an
    optimiser step, from all micro-batches and ranks together.
    Open in the source, decided here: rows outside the four quadrants may fill up the number; the last alpha that keeps enough
    is used; a row that fills up counts as Q2 if its scaled perplexity is at least its scaled entropy.
    Measured here: noise inside answers is found and left out, with a gain. Whole answers that belong to another row are
    not found, because they look like misconceptions (40% of all rows, 49% of the kept ones).
    Cost: one forward pass over every row, and forward and backward passes over the kept rows.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), claims=frozenset({"token_mask"}))
    source: ClassVar[Source] = Source(
        "Winning the Pruning Gamble: Joint Sample and Token Pruning for Efficient SFT",
        2025,
        "arXiv:2509.23873",
        "eq. 4-7",
    )

    keep_rows: float = Field(0.25, gt=0, le=1)
    """Share of a window's rows that stay (r_sample)."""
    keep_tokens: float = Field(0.7, gt=0, le=1)
    """Share of the answer tokens of a misconception row that stay (r_token)."""
    neighbour_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the neighbours' perplexity in a token's score (lambda)."""
    bisection_steps: int = Field(10, ge=1)
    """Number of halvings in the search for the quadrants' edges (K)."""
    pruned: Literal["mask", "drop"] = "mask"
    """"mask" takes pruned tokens out of the loss; "drop" also out of the input, and the others keep their positions."""
    log_domain: bool = False
    """Smooth losses instead of perplexities, so that one very large value does not remove its neighbours."""

    _report: dict[str, float] = PrivateAttr(default_factory=dict)

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if facts.batch_size == 1 and self.keep_rows < 1:
            problems.append(Problem("keep_rows", f"{self.keep_rows} of one row has no meaning", "raise batch_size"))
        return problems

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        micro = [_without_empty(b) for b in window.micro]
        scored = probe.scores(micro)
        device = probe.view.device
        per_row = [self._row_values(b, s.nll, s.entropy) for b, s in zip(micro, scored, strict=True)]
        local = torch.cat([*per_row, torch.zeros(0, 2, device=device)])  # [S_local, 2]
        sizes = window.gather(torch.tensor([len(local)], device=device)).tolist()
        everything = window.gather(_padded(local, max(sizes)))  # ranks hold different numbers of rows
        by_rank = everything.view(len(sizes), max(sizes), 2)
        pooled = torch.cat([part[:n] for part, n in zip(by_rank, sizes, strict=True)])
        if not pooled.isfinite().all():
            raise LuthierError(
                f"q-tuning: a row's loss is not finite: {_bad_rows(micro, per_row)}; lower learning_rate"
            )
        if not len(pooled):
            return window, {"tokens": 0.0, "sequences": 0.0}
        ppl, entropy = (pooled[:, i].double().cpu().numpy() for i in range(2))
        rows = choose_rows(ppl, entropy, self.keep_rows, self.bisection_steps)
        first = sum(sizes[: window.rank])
        kept = self._prune(micro, [s.nll for s in scored], rows, first)
        self._note(rows, kept, micro)
        return window.with_micro(kept), count(kept)

    def _row_values(self, batch: Batch, nll: Tensor, entropy: Tensor) -> Tensor:
        """[S, 2]: perplexity and mean entropy of each row's answer."""
        n = batch.supervised_counts
        mean = sequence_sum(nll, batch) / n
        return torch.stack([mean.clamp(max=NLL_CLAMP).exp(), sequence_sum(entropy, batch) / n], dim=1)

    def _prune(self, micro: list[Batch], nlls: list[Tensor], rows: Rows, first: int) -> list[Batch]:
        fate = dict(zip(rows.keep.tolist(), rows.prune_tokens.tolist(), strict=True))
        out = []
        for batch, nll in zip(micro, nlls, strict=True):
            numbers = range(first, first + batch.num_sequences)
            first += batch.num_sequences
            stay = torch.tensor(
                [i for i, n in enumerate(numbers) if n in fate], dtype=torch.long, device=batch.ids.device
            )
            keep, supervised = torch.ones_like(batch.labels, dtype=torch.bool), batch.supervised
            for i, n in enumerate(numbers):
                if fate.get(n) and self.keep_tokens < 1:
                    mine = batch.seq[supervised] == i
                    at = supervised[mine]
                    keep[at] = keep_tokens(self._token_scores(nll[mine], at), self.keep_tokens)
            out.append(batch.select(stay, keep, drop=self.pruned == "drop"))
        return out

    def _token_scores(self, nll: Tensor, at: Tensor) -> Tensor:
        turn = torch.cat([at.new_zeros(1), (at[1:] != at[:-1] + 1).long().cumsum(0)])
        values = nll if self.log_domain else nll.clamp(max=NLL_CLAMP).exp()
        return neighbour_score(values, turn, self.neighbour_weight)

    def _note(self, rows: Rows, kept: list[Batch], micro: list[Batch]) -> None:
        before, after = (sum(len(b.supervised) for b in batches) for batches in (micro, kept))
        self._report.update(
            {
                "q_tuning/alpha": rows.alpha,
                "q_tuning/topped_up": float(rows.topped_up.mean()),
                "q_tuning/kept_tokens": after / before if before else 0.0,
            }
        )

    def report(self) -> Mapping[str, float]:
        return self._report

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        return {"loss": Term(weighed(fwd.nll(), fwd.batch).sum(), "tokens")}


def _without_empty(batch: Batch) -> Batch:
    """The batch without rows that have no supervised token: they cannot be scored."""
    return batch.select(batch.supervised_counts.nonzero().squeeze(1))


def _padded(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, values.new_zeros(rows - len(values), values.shape[1])])


def _bad_rows(micro: list[Batch], per_row: list[Tensor]) -> str:
    bad = [b.keys[i] for b, v in zip(micro, per_row, strict=True) for i in range(len(v)) if not v[i].isfinite().all()]
    return ", ".join(bad[:5]) or "on another process"
