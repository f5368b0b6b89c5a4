"""CAFT: small extra heads predict the tokens after the next one while the model is tuned. They are dropped afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from luthier.data.batch import IGNORE, Batch
from luthier.method import Facts, Problem, Source, Traits
from luthier.method.base import Claim
from luthier.model.additions import bare_copy, refuse_packed
from luthier.model.view import ModelView
from luthier.objectives.base import Clock, Forward, Objective, Term, Window, count, weighed
from luthier.step.probe import Probe
from luthier.support.errors import LuthierError

Schedule = Literal["rsine", "constant", "linear", "sine"]


def schedule_weight(schedule: Schedule, clock: Clock) -> float:
    """gamma(s): "rsine" falls from 1 to 0, "linear" and "sine" rise from 0 to 1; 1 for a run of no steps."""
    if schedule == "constant" or clock.total == 0:
        return 1.0
    done = clock.step / clock.total
    return {
        "rsine": math.sin((1 - done) * math.pi / 2),
        "linear": done,
        "sine": math.sin(done * math.pi / 2),
    }[schedule]


def further_labels(batch: Batch, ahead: int) -> Tensor:
    """[T]: what head `ahead` predicts at each position, the label `ahead` positions later in the same sequence."""
    labels = torch.full_like(batch.labels, IGNORE)
    if ahead < batch.num_tokens:
        inside = batch.seq[ahead:] == batch.seq[: batch.num_tokens - ahead]
        labels[: batch.num_tokens - ahead] = torch.where(inside, batch.labels[ahead:], IGNORE)
    return labels


class Heads(nn.Module):
    """One decoder layer for each head, copied from the model's last layer. So an untrained head predicts what the model does.

    copied_from  the width, depth and vocabulary of the base and the number of heads, compared when saved heads are loaded
    """

    def __init__(self, view: ModelView, count: int) -> None:
        super().__init__()
        last = len(view.anatomy.blocks) - 1
        refuse_packed("caft", view.module, [n for n in view.anatomy.parameters if view.anatomy.depth(n) == last + 1])
        # The configuration is shared, not copied: which attention runs is decided there, for trunk and heads alike.
        shared = {id(c): c for c in (view.module.config, view.module.config.get_text_config())}
        self.blocks = nn.ModuleList(bare_copy(view.block(last), shared) for _ in range(count))
        # Each head has its own index in a key-value cache, so it can overwrite nothing of the trunk's.
        for i, block in enumerate(self.blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = last + 1 + i  # type: ignore[assignment]
        shape = torch.tensor([view.anatomy.hidden_size, len(view.anatomy.blocks), view.embedding.num_embeddings, count])
        self.register_buffer("copied_from", shape)
        self.trained = False

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load trained heads. Raises LuthierError, with the differences, for heads of another base."""
        theirs, names = state["copied_from"].tolist(), ("hidden size", "blocks", "vocabulary", "heads")
        differ = [
            f"{n} {t}, here {o}"
            for n, t, o in zip(names, theirs, self.get_buffer("copied_from").tolist(), strict=True)
            if t != o
        ]
        if differ:
            raise LuthierError(f"caft: these heads belong to another base: {'; '.join(differ)}")
        self.load_state_dict(dict(state), strict=True)
        self.trained = True


class Caft(Objective):
    """Next-token loss plus, with a small falling weight, the losses of heads that predict further tokens.

    stage "heads" trains only the heads, with the model frozen: sum_i decay^i l_i. stage "tune" trains the model:
    l_0 + weight gamma(step) sum_i decay^i l_i, with the heads frozen. Each l_i is a mean over its own targets of the whole step.
    Heads read the input of the last block, and their output passes the final norm, in both stages ("parallel"). In the
    official code they read another state in the second stage, and there is no norm ("official", for reproduction).
    Cost: n - 1 more layers and vocabulary products a token; frozen heads keep no optimiser state.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}), needs=frozenset({"plain_weights"}))
    source: ClassVar[Source] = Source(
        "Improving large language models with concept-aware fine-tuning",
        2025,
        "arXiv:2506.07833",
        "official code",
    )

    recipe_lines: ClassVar[tuple[str, ...]] = (
        "data: {train: builtin:requests, eval: builtin:requests}",
        "pipeline:",
        "  stages:",
        "    stages:",
        "      - {name: heads, tuner: frozen, objective: {caft: {stage: heads}}, learning_rate: 5e-4}",
        "      - {name: tune, objective: caft, carry: heads}",
    )

    stage: Literal["heads", "tune"] = "tune"
    """What trains: the heads, or the model with them."""
    ahead: int = Field(5, ge=2)
    """Number of tokens predicted at each position, with the next one (n)."""
    decay: float = Field(0.8, gt=0, le=1)
    """Factor from one head to the next (alpha)."""
    weight: float = Field(0.01, ge=0)
    """Weight of all further losses in the second stage (beta)."""
    schedule: Schedule = "rsine"
    """How that weight changes over the run (gamma)."""
    wiring: Literal["parallel", "official"] = "parallel"
    """What the heads read."""
    allow_untrained_heads: bool = False
    """Allow tuning with heads that no first stage has trained."""

    @property
    def trains_beside(self) -> bool:
        return self.stage == "heads"

    def check(self, facts: Facts) -> list[Problem]:
        problems, settings = super().check(facts), facts.settings
        alone = settings is not None and getattr(settings, "carry", None) is None
        if self.stage == "tune" and alone and not self.allow_untrained_heads:
            what = "tune, with heads that no stage before has trained"
            remedy = "train them in a stage before (pipeline: stages, with carry), or set allow_untrained_heads: true"
            problems.append(Problem("stage", what, remedy))
        for other in facts.others:
            if Claim.INPUTS_EMBEDS in other.traits.claims:
                what = f"its heads read the text's own positions, and {other.key()} puts vectors before the text"
                problems.append(Problem("", what, "choose another tuner"))
        return problems

    def extend(self, view: ModelView, carried: Mapping[str, Tensor] | None = None) -> nn.Module | None:
        heads = Heads(view, self.ahead - 1)
        if carried is not None:
            heads.load(carried)
        for p in heads.parameters():
            p.requires_grad_(self.stage == "heads")
        return heads

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]:
        heads = probe.extra
        if self.stage == "tune" and not (self.allow_untrained_heads or getattr(heads, "trained", False)):
            raise LuthierError(
                "objective.caft: the heads are untrained; run a stage with stage: heads first, or set allow_untrained_heads"
            )
        gamma = 1.0 if self.stage == "heads" else self.weight * schedule_weight(self.schedule, window.clock)
        micro = [
            b.with_columns(row={"caft": torch.full((b.num_sequences,), gamma, device=b.ids.device)})
            for b in window.micro
        ]
        targets = {
            f"ahead.{i}": count([replace(b, labels=further_labels(b, i)) for b in micro])["tokens"]
            for i in range(self.ahead)
            if (self.stage == "tune" if i == 0 else gamma > 0)  # the terms of this step, no other
        }
        return window.with_micro(micro), targets

    def loss(self, fwd: Forward) -> Mapping[str, Term]:
        batch, last = fwd.batch, len(fwd.view.anatomy.blocks) - 1
        gamma = float(batch.row["caft"][0]) if batch.num_sequences else 0.0
        terms: dict[str, Term] = {}
        if self.stage == "tune":
            terms["next"] = Term(self._head_zero(fwd, last, gamma), "ahead.0")
        if gamma == 0.0:
            return terms
        assert isinstance(fwd.extra, Heads)
        for i, block in enumerate(fwd.extra.blocks, start=1):  # one at a time: one [chunk, V] lives at once
            # A head without targets here has a term as well: all ranks have the same terms, and each backward reaches every head.
            labels = further_labels(batch, i)
            losses = weighed(fwd.nll(self._state(fwd, block, last), labels), batch, labels)
            terms[f"ahead_{i}"] = Term(losses.sum(), f"ahead.{i}", gamma * self.decay**i)
        return terms

    def _head_zero(self, fwd: Forward, last: int, gamma: float) -> Tensor:
        if gamma > 0:
            fwd.trace(last, -1)  # one trunk run that keeps what the heads need
        return weighed(fwd.nll(), fwd.batch).sum()

    def _state(self, fwd: Forward, block: nn.Module, last: int) -> Tensor:
        """[T, D] what head `block` hands to the vocabulary matrix."""
        trace = fwd.trace(last, -1)
        if self.wiring == "official":
            reads = trace.hidden[last] if self.stage == "heads" else trace.hidden[-1]
            return fwd.view.run_block(block, reads, trace)
        out = fwd.view.run_block(block, trace.hidden[last], trace)
        norm = fwd.view.anatomy.final_norm
        return out if norm is None else fwd.view.module.get_submodule(norm)(out)
