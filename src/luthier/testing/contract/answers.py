"""Tests of every decoder, merger and inspector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.decoding.base import Decoder
from luthier.inference.services import lab_around
from luthier.inspection.base import Case, Finding, Inspector
from luthier.merging.base import Merger
from luthier.model.view import ModelView
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import Example, attached, states
from luthier.testing.models import batch_of, byte_tokenizer, tiny, view_of
from luthier.tuners.adapter import Adapter
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.update import Dense, Prompt, Update
from luthier.update.files import load, save_update


def test_an_answer_does_not_depend_on_its_batch(decode: Example) -> None:
    assert isinstance(decode.method, Decoder)
    lab = lab_around(tiny(vocab_size=260), byte_tokenizer(), seed=3)
    views, prompts = {"model": lab.view()}, [[5, 6, 7], [40] * 9, [9], [70, 71, 72, 73]]
    together = decode.method.decode(views, prompts, lab, 6)
    assert [c.tokens for c in together] and all(c.tokens <= 6 for c in together)
    assert together == [decode.method.decode(views, [p], lab, 6)[0] for p in prompts]
    assert together == decode.method.decode(views, prompts[::-1], lab, 6)[::-1]


def test_a_merger_makes_one_update_and_leaves_its_members_unchanged(merge: Example, tmp_path: Path) -> None:
    """The same members give the same bits. The result binds to the members' base, also after saving and loading."""
    assert isinstance(merge.method, Merger)
    members = [attached(Example(Lora(rank=2, seed=seed)), view_of()).update() for seed in (0, 1)]
    before = [m.digest() for m in members]
    merged, view, batch = merge.method.merge(members), view_of(), batch_of()
    assert merged.digest() == merge.method.merge(members).digest() and [m.digest() for m in members] == before
    assert merged.base.same_base(members[0].base) and merged.linear == type(merge.method).traits.linear
    plain = states(view, batch)
    with merged.bind(view):
        tuned = states(view, batch)
    assert not torch.equal(tuned, plain) and torch.equal(states(view, batch), plain)
    save_update(merged, tmp_path, view)
    with load(tmp_path).bind(view):
        assert torch.equal(states(view, batch), tuned)


def test_updates_that_cannot_be_merged_are_refused(merge: Example) -> None:
    """No update, updates of different bases, and forms that cannot be added."""
    assert isinstance(merge.method, Merger)
    first, other = (attached(Example(Lora(rank=2)), view_of(seed=seed)).update() for seed in (0, 1))
    added = attached(Example(Adapter(rank=2, init_std=0.05)), view_of()).update()
    for members in ([], [first, other], [added, added]):
        with pytest.raises(LuthierError, match=" "):
            merge.method.merge(members)


def asked_of(inspect: Example, *names: str) -> Finding | None:
    """The finding about these members of UPDATES; None if the inspector refuses them. It must change nothing."""
    assert isinstance(inspect.method, Inspector)
    view = view_of()
    updates = {name: UPDATES[name](view) for name in names}
    before, digests = copied(view), {name: update.digest() for name, update in updates.items()}
    try:
        finding = inspect.method.inspect(Case(view, updates))
    except LuthierError as refused:
        assert any(name in str(refused) for name in names), "a refusal names the update"
        finding = None
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters()), "the model is unchanged"
    assert {name: update.digest() for name, update in updates.items()} == digests, "the updates are unchanged"
    return finding


def copied(view: ModelView) -> dict[str, Tensor]:
    """A copy of the model's weights."""
    return {n: p.detach().clone() for n, p in view.module.named_parameters()}


def unchanged(view: ModelView) -> Update:
    """An update whose only matrix is zero."""
    name = next(n for n, p in view.module.named_parameters() if p.ndim == 2)
    return Update(view.base, (Dense({name: torch.zeros_like(view.weight(name))}),))


# Updates for tests of inspectors: of every weight, of low rank, without a change, and without weights.
UPDATES: dict[str, Callable[[ModelView], Update]] = {
    "every-weight": lambda view: attached(Example(Full()), view_of()).update(),
    "low-rank": lambda view: attached(Example(Lora(rank=2)), view_of()).update(),
    "no-change": unchanged,
    "soft-prompt": lambda view: Update(view.base, (Prompt(torch.ones(2, view.module.config.hidden_size)),)),
}


@pytest.mark.parametrize("names", [("every-weight",), ("low-rank",), ("no-change",), ("every-weight", "low-rank")])
def test_a_finding_holds_sentences_a_table_and_a_picture(inspect: Example, names: tuple[str, ...]) -> None:
    """The sentences name each update, rows have the table's columns, and the picture is an SVG."""
    finding = asked_of(inspect, *names)
    assert finding is not None, "an inspector must accept differences of weights"
    assert finding.says.endswith(".") and all(name in finding.says for name in names)
    assert finding.sure and not finding.sure.endswith("."), "the page and the terminal add the full stop"
    assert all(len(r) == len(finding.columns) for r in finding.rows) and (finding.rows or names == ("no-change",))
    assert not finding.picture or (finding.picture.startswith("<svg") and finding.picture.endswith("</svg>"))
    assert all(isinstance(finding.shown(cell), str) for row in finding.rows for cell in row)


def test_an_inspector_answers_for_a_prompt_or_refuses_it(inspect: Example) -> None:
    """It must not ignore a part that is not a difference of weights."""
    finding = asked_of(inspect, "soft-prompt")
    assert finding is None or "soft-prompt" in finding.says


__all__ = [
    "test_a_finding_holds_sentences_a_table_and_a_picture",
    "test_a_merger_makes_one_update_and_leaves_its_members_unchanged",
    "test_an_answer_does_not_depend_on_its_batch",
    "test_an_inspector_answers_for_a_prompt_or_refuses_it",
    "test_updates_that_cannot_be_merged_are_refused",
]
