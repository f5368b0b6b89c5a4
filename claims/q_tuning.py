"""Noise in the answers: what does each way of leaving tokens or rows out make of it?"""

from collections.abc import Mapping

import torch
from noisy import STEPS, held_out, mean_nll, pieces, smollm, with_random_tokens, with_swapped_answers
from toys import trained

from luthier.objectives.base import Term, count
from luthier.objectives.q_tuning import QTuning, keep_tokens
from luthier.objectives.sft import Sft
from luthier.support.rng import Streams
from luthier.tuners.lora import Lora


class EveryRow(QTuning):
    """The token stage alone, on every row; for this experiment."""

    by: str = "score"
    """"score", or "random"."""
    seed: int = 0
    """Seed of the random tokens."""

    def plan(self, window, probe):
        out, generator = [], Streams(self.seed).torch("tokens", window.clock.step)
        for batch, scored in zip(window.micro, probe.scores(window.micro), strict=True):
            keep = torch.ones_like(batch.labels, dtype=torch.bool)
            for i in range(batch.num_sequences):
                mine = batch.seq[batch.supervised] == i
                at = batch.supervised[mine]
                scores = self._token_scores(scored.nll[mine], at)
                if self.by == "random":
                    scores = torch.rand(len(at), generator=generator)
                keep[at] = keep_tokens(scores, self.keep_tokens)
            out.append(batch.select(torch.arange(batch.num_sequences), keep))
        self._report["wrong"] = self._report.get("wrong", 0.0) + wrong_share(out) / STEPS
        return window.with_micro(out), count(out)

    def loss(self, fwd) -> Mapping[str, Term]:
        return {"loss": Term(fwd.nll().sum(), "tokens")}


class Noted(QTuning):
    """Notes how much of what the sample stage keeps is wrong; for this experiment."""

    def plan(self, window, probe):
        planned, counts = super().plan(window, probe)
        self._report["wrong"] = self._report.get("wrong", 0.0) + wrong_share(planned.micro) / STEPS
        return planned, counts


def wrong_share(batches):
    kept = torch.cat([b.token["wrong"][b.supervised] for b in batches])
    return float(kept.double().mean())


def measure(arm, seed, say):
    kind = arm.rpartition(" ")[2]
    view, per_step = smollm(), 16 if arm == "kept rows" else 4
    clean = pieces(STEPS * per_step, "train", seed)
    rows = with_random_tokens(clean, seed, view) if kind == "tokens" else with_swapped_answers(clean, seed)
    objective = {
        "all tokens": Sft(), "random rows": Sft(), "kept rows": Noted(keep_rows=0.25, keep_tokens=1.0),
        "kept tokens": EveryRow(keep_rows=1.0, keep_tokens=0.7),
        "random tokens": EveryRow(keep_rows=1.0, keep_tokens=0.7, by="random", seed=seed),
    }[arm]  # fmt: skip
    loop = trained(view, rows, Lora(rank=16, alpha=32, seed=seed), objective, STEPS, 5e-4, batch=per_step, seed=seed)
    told = loop.objective.report()
    return {"loss": mean_nll(view, held_out()), **({"wrong": told["wrong"]} if "wrong" in told else {})}
