"""A window over other micro-batches keeps all the rest, fields that are added later included."""

from dataclasses import dataclass, fields, replace

import pytest
import torch

from helpers.cloze import cloze, with_soft
from luthier.data.batch import collate
from luthier.objectives.base import Clock, Window
from luthier.objectives.caft import Caft
from luthier.objectives.distill import Distill
from luthier.objectives.masked_thought import MaskedThought
from luthier.objectives.otr import Otr
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.probe import Probe
from luthier.testing.models import batch_of, view_of


@dataclass(frozen=True)
class Wider(Window):
    """A window with one field more."""

    more: str = "default"


OBJECTIVES = (
    Sft(), QTuning(keep_rows=0.5), Otr(), MaskedThought(max_rate=0.5), Caft(allow_untrained_heads=True), Distill()
)  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.key())
def test_every_objective_changes_the_micro_batches_alone(objective):
    view = view_of()
    batch = collate(with_soft(cloze(4, 0))) if isinstance(objective, Distill) else batch_of()
    window = Wider(
        [batch], Clock(1, 10), Lab({"labelled": cloze(6, 5)}), gather=lambda x: 1 * x, total=lambda x: 1 * x, rank=0,
        more="kept",
    )  # fmt: skip
    planned, _ = objective.plan(window, Probe(view, objective, objective.extend(view)))
    for f in fields(window):
        if f.name != "micro":
            assert getattr(planned, f.name) is getattr(window, f.name), f.name


def test_other_micro_batches_in_the_same_window():
    window, other = Window([batch_of()], Clock(0, 3), rank=1), [batch_of(seed=1)]
    assert window.with_micro(other).micro is other and window.micro is not other
    assert replace(window.with_micro(other), micro=window.micro) == window


def test_what_ranks_share_is_named_never_placed():
    with pytest.raises(TypeError):
        Window([batch_of()], Clock(0, 3), None, torch.clone)
