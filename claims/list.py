"""Two classes, told apart by which of two words comes more often; four in ten pseudo-labels are turned round."""

import torch
from toys import llama

from luthier.objectives.distill import Distill
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.full import Full

WORDS, MARKS, LENGTH, STEPS = torch.tensor([4, 5]), (10, 11), 12, 100


def rows(count, purpose, seed, wrong=None):
    """Rows whose class is the more frequent of two marks; soft labels at 0.9, a share of them wrong."""
    generator, out = Streams(seed).at(purpose), []
    for i in range(count):
        y = int(generator.integers(2))
        ids = generator.integers(20, 90, size=LENGTH).tolist()
        often = int(generator.integers(4, 7))
        for place in generator.permutation(LENGTH)[:often].tolist():
            ids[place] = MARKS[y]
        row = {"label": torch.tensor(y), "slot": torch.tensor(LENGTH - 1), "words": WORDS}
        if wrong is not None:
            bad = bool(generator.random() < wrong)
            said = y != bad
            row |= {"soft": torch.tensor([0.1, 0.9] if said else [0.9, 0.1]), "bad": torch.tensor(float(bad))}
        out.append({"ids": ids, "labels": [-100] * LENGTH, "key": f"{purpose}:{i}", "row": row})
    return out


class Watched(Distill):
    """Notes how much weight falls on wrong rows."""

    def plan(self, window, probe):
        planned, counts = super().plan(window, probe)
        if self.reweights(window.clock.step, window.clock.total):
            weight = torch.cat([b.row["weight"] for b in planned.micro])
            bad = torch.cat([b.row["bad"] for b in planned.micro])
            if float(weight.sum()) > 0:
                self._report["steps"] = self._report.get("steps", 0.0) + 1
                self._report["on_wrong"] = self._report.get("on_wrong", 0.0) + float(
                    (weight * bad).sum() / weight.sum()
                )
                self._report["share"] = self._report.get("share", 0.0) + float(bad.mean())
        return planned, counts


def measure(arm, seed, say):
    view, data = llama(96, 64, 2, 4, 128, seed=seed), rows(400, "unlabelled", seed, wrong=0.4)
    objective = Watched(meta_rows=30)
    settings = TrainSettings(max_steps=STEPS, batch_size=16, learning_rate=1e-3, seed=seed)
    lab = Lab({"labelled": rows(30, "labelled", seed)})
    loop = Loop(view, data, Full(seed=seed).attach(view, None, STEPS), objective, settings, lab=lab)
    for _ in range(STEPS):
        loop.step()
    told = loop.objective.report()
    return {
        "ratio": told["on_wrong"] / told["share"],
        "on_wrong": told["on_wrong"] / told["steps"],
        "steps": told["steps"],
    }
