"""Loss: nats a token, and bits a byte, which can be compared across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from luthier.data.batch import IGNORE
from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import Measure, ratio
from luthier.method import Source


class Loss(Evaluator):
    """Mean loss on every held-out row: nats a supervised token, bits a byte of supervised text; for classes nats a row.

    Always measured, also without a key in the recipe. Bits a byte include the end token's loss but no byte for it.
    Cost: one forward pass over the rows.
    """

    source: ClassVar[Source] = Source(
        "A Mathematical Theory of Communication", 1948, "https://doi.org/10.1002/j.1538-7305.1948.tb01338.x"
    )

    def names(self) -> tuple[str, ...]:
        return ("loss", "bits_per_byte")

    def evaluate(self, exam: Exam) -> list[Measure]:
        if not exam.rows:
            return []
        keys = exam.row_keys
        nats, over = np.array([s.total for s in exam.scored]), np.array([s.over for s in exam.scored])
        out = [ratio("loss", nats, over, keys, higher=False, unit=exam.task.unit)]
        if exam.task.spells:
            size = np.array([_bytes(exam, r) for r in exam.rows], dtype=np.float64)
            if size.sum():
                out.append(ratio("bits_per_byte", nats / math.log(2), size, keys, higher=False, unit="bits a byte"))
        return out


def _bytes(exam: Exam, row: Mapping[str, Any]) -> int:
    """UTF-8 bytes of a row's supervised text."""
    ids = [y for y in row["labels"] if y != IGNORE]
    return len(exam.renderer.tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8"))
