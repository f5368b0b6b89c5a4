"""Windows with nothing to learn move nothing: no momentum, no weight decay; they are counted, and the clock goes on."""

import copy

import pytest
import torch

from helpers.cloze import cloze
from luthier.data.batch import IGNORE
from luthier.objectives.caft import Caft
from luthier.objectives.distill import Distill
from luthier.objectives.masked_thought import MaskedThought
from luthier.objectives.otr import Otr
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import rows_of, view_of
from luthier.training.loop import NAN_STEPS, Loop
from luthier.tuners.fedkseed import FedKSeed
from luthier.tuners.frozen import Frozen
from luthier.tuners.full import Full
from luthier.tuners.lift import Lift
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

SETTINGS = TrainSettings(
    max_steps=3, batch_size=2, learning_rate=1e-2, shuffle=False, weight_decay=0.1, warmup_fraction=0.0
)


def between(silent):
    """Three steps of two rows: in the second there is nothing to learn."""
    rows = rows_of((9, 8, 10, 7, 9, 11), answer=3)
    return [silent(r) if i in (2, 3) else r for i, r in enumerate(rows)]


def without_targets(row):
    return {**row, "labels": [IGNORE] * len(row["ids"])}


def answered_at_once(row):
    """Its only target is the second token, which no head looks far enough ahead for."""
    return {**row, "labels": [IGNORE, row["ids"][1]] + [IGNORE] * (len(row["ids"]) - 2)}


def contrary():
    """The labelled row and six copies of it, in the second step with the soft label of the other class."""
    (row,) = cloze(1, 0)
    y = torch.nn.functional.one_hot(row["row"]["label"], 2).float()
    soft = [y, y, 1 - y, 1 - y, y, y]
    return [{**row, "row": {**row["row"], "soft": s}} for s in soft], Lab({"labelled": [row]})


def unsure():
    """In the second step no soft label is above one half."""
    rows = cloze(6, 0)
    soft = [torch.tensor([0.5, 0.5] if i in (2, 3) else [0.9, 0.1]) for i in range(6)]
    return [{**r, "row": {**r["row"], "soft": s}} for r, s in zip(rows, soft, strict=True)], None


CASES = {
    "sft": (Sft(), lambda: (between(without_targets), None)),
    "otr": (Otr(), lambda: (between(without_targets), None)),
    "q-tuning": (QTuning(keep_rows=0.5), lambda: (between(without_targets), None)),
    "masked-thought": (MaskedThought(), lambda: (between(without_targets), None)),
    "masked-thought-all-hidden": (
        MaskedThought(max_rate=0.98, warmup_share=1e-3, loss_on="clean"), lambda: (rows_of((9,) * 6, answer=1), None)
    ),
    "caft": (Caft(allow_untrained_heads=True, weight=0.5), lambda: (between(without_targets), None)),
    "caft-heads": (Caft(stage="heads"), lambda: (between(answered_at_once), None)),
    "distill-nothing-helps": (Distill(warmup_share=0.0), contrary),
    "distill-nothing-sure": (Distill(reweight=False, min_confidence=0.5), unsure),
}  # fmt: skip


def looped(objective, made, tuner, view=None, **changes):
    view = view or view_of()
    (rows, lab), settings = made(), SETTINGS.model_copy(update=changes)
    return Loop(view, rows, tuner.attach(view, total_steps=settings.max_steps), objective, settings, lab=lab)


def everything(loop):
    """Weights, what trains and what the optimiser remembers, copied."""
    parts = {
        "model": dict(loop.view.module.named_parameters()), "trainable": loop.trainable.state_dict(),
        "beside": {} if loop.extra is None else loop.extra.state_dict(), "optimizer": loop.optimizer.state_dict()["state"],
    }  # fmt: skip
    return copy.deepcopy({k: {n: flat(v) for n, v in part.items()} for k, part in parts.items()})


def flat(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def assert_same(a, b, place="loop"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for k in a:
            assert_same(a[k], b[k], f"{place}.{k}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    else:
        assert a == b, place


def moved(a, b):
    """Whether what trains differs."""
    pairs = [(a[part][n], b[part][n]) for part in ("trainable", "beside") for n in a[part]]
    return any(not torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("limit", [10_000, 1], ids=["one micro-batch", "two"])
@pytest.mark.parametrize("name", CASES)
def test_a_window_with_nothing_to_learn_moves_nothing_and_is_counted(name, limit):
    objective, made = CASES[name]
    tuner = Frozen() if name == "caft-heads" else Lora(rank=2)
    loop = looped(objective, made, tuner, tokens_per_forward=limit)
    start = everything(loop)
    first = loop.step()
    assert len(loop.window(1).micro) == (1 if limit > 1 else 2)
    before = everything(loop)
    assert moved(start, before) and "loss" in first and loop.progress.skipped == 0
    tokens = loop.progress.tokens
    entry = loop.step()
    assert_same(before, everything(loop))
    assert loop.progress.skipped == 1 == entry["skipped"] and "loss" not in entry
    assert loop.progress.step == 2 and loop.progress.tokens == tokens
    if name != "masked-thought-all-hidden":  # whose third step has nothing left either
        last = loop.step()
        assert moved(before, everything(loop)) and loop.progress.skipped == 1
        assert last["learning_rate"] == pytest.approx(1e-2 / 3), "the schedule counts the step"


@pytest.mark.parametrize(
    "tuner", [Full(), Spiel(density=0.05, reselect_every=2, window=1), Lift(density=0.1)], ids=lambda t: t.key()
)
def test_in_half_precision_the_weights_are_not_rounded_anew(tuner):
    view = view_of()
    view.module.to(torch.bfloat16)
    loop = looped(*CASES["sft"], tuner, view)
    loop.step()
    before = everything(loop)
    loop.step()
    assert_same(before, everything(loop))
    loop.step()
    assert moved(before, everything(loop))


def test_a_closure_is_not_asked():
    constant = {"lr_scheduler_type": "constant", "weight_decay": 0.0}
    loop = looped(*CASES["sft"], FedKSeed(num_seeds=8), **constant)
    loop.step()
    before = everything(loop)
    loop.step()
    assert_same(before, everything(loop))
    assert loop.trainable.steps == 1 == loop.progress.skipped


def test_a_first_window_without_targets_is_passed_over_and_silent_rows_are_refused(recwarn):
    rows = rows_of((9, 8, 10, 7), answer=3)
    view = view_of()
    mixed = [without_targets(r) for r in rows[:2]] + rows[2:]
    loop = Loop(view, mixed, Lora(rank=2).attach(view), Sft(), SETTINGS)
    loop.step()
    assert loop.progress.skipped == 1 and not [w for w in recwarn if "lr_scheduler" in str(w.message)]
    view = view_of()
    silent = [without_targets(r) for r in rows]
    with pytest.raises(LuthierError, match="step 1: no row has a supervised token"):
        Loop(view, silent, Lora(rank=2).attach(view), Sft(), SETTINGS).step()


def test_losses_that_are_not_finite_are_counted_in_a_row_and_altogether():
    view = view_of()
    loop = Loop(
        view, rows_of((9, 8)), Lora(rank=2).attach(view), Sft(), SETTINGS.model_copy(update={"on_nan": "skip", "max_steps": 99})
    )  # fmt: skip
    weight = next(iter(loop.trainable.b.values()))
    for _ in range(2):
        with torch.no_grad():
            good = weight.clone()
            weight.fill_(float("nan"))
        loop.step()
        with torch.no_grad():
            weight.copy_(good)
        loop.step()
    assert (loop.progress.skipped, loop.progress.not_finite) == (2, 0)
    with torch.no_grad():
        weight.fill_(float("nan"))
    for _ in range(NAN_STEPS - 1):
        loop.step()
    with pytest.raises(LuthierError, match="loss nan"):
        loop.step()
