"""Classification: accuracy and macro-averaged F1."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import Measure, mean
from luthier.method import Source, Traits


class Classification(Evaluator):
    """Share of rows whose most likely class is the right one, and F1 averaged over classes.

    Always measured if the task is classification. Classes that occur neither among the rows nor among the choices do not
    count in the average. Cost: none beyond the loss.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"classification"}))
    source: ClassVar[Source] = Source(
        "Information Retrieval, 2nd edition, van Rijsbergen", 1979, "https://www.dcs.gla.ac.uk/Keith/Preface.html"
    )

    def names(self) -> tuple[str, ...]:
        return ("accuracy", "macro_f1")

    def evaluate(self, exam: Exam) -> list[Measure]:
        if not exam.rows:
            return []
        chosen, right = np.array([s.best[0] for s in exam.scored]), np.array([r["row"]["label"] for r in exam.rows])
        return [
            mean("accuracy", chosen == right, exam.row_keys, unit="share of rows", judges=True),
            Measure(
                "macro_f1", np.stack([right, chosen], 1).astype(float), exam.row_keys, aggregate="macro_f1", unit="F1"
            ),
        ]
