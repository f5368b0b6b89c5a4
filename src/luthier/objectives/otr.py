"""OTR: one-token rollouts. Every gold token is weighted by how often the model itself draws it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from luthier.kernels.head import CHUNK
from luthier.method import Facts, Problem, Source, Traits
from luthier.objectives.base import Forward, Objective, Term, Window, count, weighed
from luthier.step.probe import Probe
from luthier.support.rng import Streams

log = logging.getLogger(__name__)
NO_HIT = 0.5  # share of positions without a hit above which the run is warned

# --- the mathematics: float32 or float64 logits z [N, V], gold tokens x [N] ---


def exact_loss(z: Tensor, x: Tensor, beta: float, kappa: float) -> Tensor:
    """[N]: -[(1 - beta) p'(x) log p(x) + beta sum_a p'(a) log p(a)], the limit of infinitely many draws.

    p = softmax(z) carries the gradient; p' = softmax(z / kappa) does not.
    """
    log_p = z.log_softmax(-1)
    drawn = (z.detach() / kappa).softmax(-1)
    gold = log_p.gather(1, x[:, None]).squeeze(1)
    hit = drawn.gather(1, x[:, None]).squeeze(1)
    loss = -(1 - beta) * hit * gold
    return loss if beta == 0 else loss - beta * (drawn * log_p).sum(-1)


def draw(z: Tensor, draws: int, kappa: float, generator: torch.Generator | None = None) -> Tensor:
    """[N, K] tokens from softmax(z / kappa), with replacement. Raises FloatingPointError for logits that are not finite."""
    if not bool(z.isfinite().all()):
        raise FloatingPointError("otr: the logits are not finite; lower learning_rate")
    return torch.multinomial((z.detach().float() / kappa).softmax(-1), draws, replacement=True, generator=generator)


def sampled_loss(z: Tensor, x: Tensor, drawn: Tensor, beta: float) -> Tensor:
    """[N]: -mean over the draws [N, K] of reward times log p(draw); reward 1 for the gold token, beta for another."""
    log_p = z.log_softmax(-1).gather(1, drawn)  # [N, K]
    reward = torch.where(drawn == x[:, None], 1.0, beta).to(log_p)
    return -(reward * log_p).mean(-1)


# --- the method ---


class Otr(Objective):
    """Reward the gold token when the model draws it, and lower the model's other guesses a little.

    At each supervised position, the model draws next tokens from its own tempered distribution. Draws equal to the gold token get
    reward 1, the others beta; a REINFORCE step follows. "exact" is the closed form of infinitely many draws. Tokens that
    the model finds nearly impossible teach little. This protects against noise, and slows the learning of new formats:
    with beta below 0, a model that never draws the gold token only learns to avoid its own guesses. The log warns if this
    is so at more than half of the positions. The loss on held-out rows rises under OTR while accuracy stays: choose by a
    measure of the task. Draws are keyed by step and row, so micro-batches and ranks do not change them (the source draws
    from one stream).
    Cost: one more softmax over the vocabulary, and the logits twice: below 1% of a step; draws cost more.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient", 2025, "arXiv:2509.26313"
    )

    draws: int | Literal["exact"] = "exact"
    """Tokens drawn at each position (K; the source takes 256), or "exact" for their limit."""
    kappa: float = Field(1.3, gt=0, allow_inf_nan=False)
    """Temperature of the draws; above 1 explores."""
    beta: float = Field(-0.1, lt=1, allow_inf_nan=False)
    """Reward of a token that is not the gold token."""
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """Mean over each row's tokens and then over rows, as in the source; or mean over all tokens of the step."""
    seed: int = Field(0, ge=0)
    """Seed for the draws."""

    _seen: dict[str, float] = PrivateAttr(default_factory=dict)
    _told: bool = PrivateAttr(default=False)

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if self.draws != "exact" and self.draws < 1:
            problems.append(Problem("draws", f"{self.draws} is below 1", 'write a number, or "exact"'))
        if self.kappa < 1:
            log.warning("otr.kappa = %g sharpens the draws instead of exploring", self.kappa)
        if self.beta > 0:
            log.warning("otr.beta = %g rewards wrong tokens", self.beta)
        return problems

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        self._warn_once()
        self._seen = {}
        step = torch.tensor([window.clock.step])
        micro = [b.with_columns(row={"otr": step.expand(b.num_sequences).to(b.ids.device)}) for b in window.micro]
        return window.with_micro(micro), count(micro)

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        batch, rows = fwd.batch, fwd.batch.supervised
        sizes = batch.supervised_counts  # [S]
        gold, step = batch.labels[rows], int(batch.row["otr"][0]) if batch.num_sequences else 0
        # Each run of positions lies in one sequence, so that its draws do not depend on the others.
        runs = [(s, start, min(CHUNK, n - start)) for s, n in enumerate(sizes.tolist()) for start in range(0, n, CHUNK)]
        starts = dict(zip(runs, accumulate((n for _, _, n in runs), initial=0), strict=False))

        def token_loss(z: Tensor, run: tuple[int, int, int]) -> Tensor:
            x = gold[starts[run] : starts[run] + run[2]]
            generator = Streams(self.seed).torch("otr", step, batch.keys[run[0]], run[1], device=z.device)
            return self._losses(z, x, generator)

        values = fwd.map_logits(token_loss, runs)  # [N]
        if self.reduction == "token_mean":
            return {"loss": Term(weighed(values, batch).sum(), "tokens")}
        return {"loss": Term(weighed(values / sizes[batch.seq[rows]], batch).sum(), "sequences")}

    def _losses(self, z: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.draws == "exact":
            self._note(z, x, (z.detach() / self.kappa).softmax(-1).gather(1, x[:, None]).squeeze(1))
            return exact_loss(z, x, self.beta, self.kappa)
        drawn = draw(z, self.draws, self.kappa, generator)
        self._note(z, x, (drawn == x[:, None]).float().mean(-1))
        return sampled_loss(z, x, drawn, self.beta)

    @torch.no_grad()
    def _note(self, z: Tensor, x: Tensor, hits: Tensor) -> None:
        """Sums for the log; a forward that is computed again in the backward counts once."""
        if torch._C._current_graph_task_id() != -1:
            return
        p = z.softmax(-1)
        least = 1 / 256 if self.draws == "exact" else 0.5 / self.draws
        more = {
            "tokens": float(len(x)), "hits": float(hits.sum()), "gold": float(p.gather(1, x[:, None]).sum()),
            "no_hit": float((hits < least).sum()), "entropy": float(torch.special.entr(p).sum()),
        }  # fmt: skip
        self._seen = {k: self._seen.get(k, 0.0) + v for k, v in more.items()}

    def state_dict(self) -> dict[str, Tensor | float]:
        """The last step's sums, which the next one may warn of, and whether it has been done."""
        return {**self._seen, "told": self._told}

    def load_state_dict(self, state: Mapping[str, Tensor | float]) -> None:
        self._told = bool(state["told"])
        self._seen = {k: float(v) for k, v in state.items() if k != "told"}

    def report(self) -> Mapping[str, float]:
        """Means over the step's positions."""
        n = self._seen.get("tokens", 0.0)
        if not n:
            return {}
        return {f"otr/{k}": v / n for k, v in self._seen.items() if k != "tokens"}

    def _warn_once(self) -> None:
        share = self.report().get("otr/no_hit", 0.0)
        if share > NO_HIT and not self._told:
            self._told = True
            log.warning(
                "otr: %.0f%% of the gold tokens are hardly ever drawn; start from a short sft stage", 100 * share
            )
