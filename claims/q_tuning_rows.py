"""The sample stage with longer runs and larger pools, on text and on calls: which quarter of the rows teaches more?"""

from noisy import calls, chosen_once, held_out, mean_nll, pieces, smollm, with_swapped_answers
from toys import shuffled, trained

from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.tuners.lora import Lora

STEPS, POOL, KEPT = 64, 64, 16  # rows of a window, and of them those trained on


def wrong_share(rows):
    """The share of rows whose label is wrong, not of tokens."""
    return sum(r["token"]["wrong"][-1] for r in rows) / len(rows)


class Noted(QTuning):
    """Notes how many of the rows that it keeps are wrong; for this experiment only."""

    def plan(self, window, probe):
        planned, counts = super().plan(window, probe)
        kept = [bool(b.token["wrong"][end]) for b in planned.micro for end in b.ends.tolist()]
        self._report["wrong"] = self._report.get("wrong", 0.0) + sum(kept) / len(kept) / STEPS
        return planned, counts


def measure(arm, seed, say):
    how, _, what = arm.partition(" ")
    made, view = (pieces if what == "text" else calls)(STEPS * POOL, "train", seed), smollm()
    rows = with_swapped_answers(made, seed)
    if how == "random":
        rows = [rows[i] for i in sorted(shuffled(seed, len(rows))[: STEPS * KEPT])]
    elif how == "offline":
        rows = [rows[i] for i in chosen_once(rows, view, KEPT / POOL, seed, 8192)]
    objective = Noted(keep_rows=KEPT / POOL, keep_tokens=1.0) if how == "online" else Sft()
    batch = POOL if how == "online" else KEPT
    loop = trained(view, rows, Lora(rank=16, alpha=32, seed=seed), objective, STEPS, 5e-4, batch=batch, seed=seed)
    wrong = loop.objective.report()["wrong"] if how == "online" else wrong_share(rows)
    return {"loss": mean_nll(view, held_out() if what == "text" else calls(200, "test", 99)), "wrong": wrong}
