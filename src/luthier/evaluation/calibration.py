"""Calibration: is the model as often right as it is sure?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from luthier.data.batch import Batch, collate
from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import BINS, Measure
from luthier.method import Source
from luthier.objectives.base import Forward
from luthier.training.head import CHUNK
from luthier.training.order import micro_batches


def binned(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n] confidences in [0, 1] and [n] hits -> [3 BINS]: how many, summed confidence, summed hits in ten equal bins."""
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    columns = [np.bincount(place, weights=w, minlength=BINS) for w in (np.ones(len(place)), confidence, right)]
    return np.concatenate(columns)


class Calibration(Evaluator):
    """Expected calibration error in ten equal bins: of classes, or of every supervised token's most likely word.

    0 where the model is right as often as its own probability says. Low values also come from a model that is always
    unsure; read it beside accuracy.
    Cost: one more forward pass over the rows.
    """

    source: ClassVar[Source] = Source("On Calibration of Modern Neural Networks", 2017, "arXiv:1706.04599", "eq. 3")

    def names(self) -> tuple[str, ...]:
        return ("calibration_error",)

    @torch.no_grad()
    def evaluate(self, exam: Exam) -> list[Measure]:
        if not exam.rows:
            return []
        stats = np.zeros((len(exam.rows), 3 * BINS))
        exam.view.module.eval()
        for start in range(0, len(exam.rows), 256):
            part = exam.rows[start : start + 256]
            exam.tick("calibration", start, f"rows {start + 1} on")
            for places in micro_batches([len(r["ids"]) for r in part], exam.tokens_per_forward)[0]:
                batch = collate([part[i] for i in places]).to(exam.view.device)
                for i, (confidence, right) in zip(places, sure(Forward(batch, exam.view), exam.task), strict=True):
                    stats[start + i] = binned(confidence, right)
        name = "calibration_error"
        return [Measure(name, stats, exam.row_keys, aggregate="calibration", higher=False, unit="share")]


def sure(fwd: Forward, task: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each sequence: probabilities of the most likely class or tokens, and whether they are right."""
    batch = fwd.batch
    if task == "classification":
        top, best = fwd.logits().softmax(-1).max(-1)
        return [(a, b) for a, b in zip(_column(top), _column(best == batch.row["label"]), strict=True)]
    rows = batch.supervised
    pieces = [fwd.logits(part).softmax(-1).max(-1) for part in rows.split(CHUNK)]  # [n, V] at a time
    top, best = (torch.cat([p[i] for p in pieces]) for i in (0, 1))
    counts = _counts(batch, rows)
    hit = (best == batch.labels[rows]).double()
    return list(zip(_split(top, counts), _split(hit, counts), strict=True))


def _counts(batch: Batch, rows: torch.Tensor) -> list[int]:
    return torch.bincount(batch.seq[rows], minlength=batch.num_sequences).tolist()


def _split(values: torch.Tensor, counts: list[int]) -> list[np.ndarray]:
    return [p.double().cpu().numpy() for p in values.split(counts)]


def _column(values: torch.Tensor) -> list[np.ndarray]:
    return [np.array([v]) for v in values.double().tolist()]
