"""What every decoder, merger and inspector keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.decoding.base import Decoder
from luthier.inference.services import lab_around
from luthier.inspection.base import Case, Inspector
from luthier.merging.base import Merger
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import Example, attached, states
from luthier.testing.models import batch_of, byte_tokenizer, tiny, view_of
from luthier.tuners.adapter import Adapter
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.update.files import load, save_update


def test_an_answer_does_not_depend_on_its_batch(decode: Example) -> None:
    assert isinstance(decode.method, Decoder)
    lab = lab_around(tiny(vocab_size=260), byte_tokenizer(), seed=3)
    views, prompts = {"model": lab.view()}, [[5, 6, 7], [40] * 9, [9], [70, 71, 72, 73]]
    together = decode.method.decode(views, prompts, lab, 6)
    assert [c.tokens for c in together] and all(c.tokens <= 6 for c in together)
    assert together == [decode.method.decode(views, [p], lab, 6)[0] for p in prompts]
    assert together == decode.method.decode(views, prompts[::-1], lab, 6)[::-1]


def test_a_merger_makes_one_update_of_the_members_base_and_leaves_them_as_they_are(
    merge: Example, tmp_path: Path
) -> None:
    """The same members give the same bits; what comes out binds, and survives its files."""
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


def test_what_cannot_be_merged_is_refused(merge: Example) -> None:
    """Nothing at all, updates of different bases, and forms that are no vector space."""
    assert isinstance(merge.method, Merger)
    first, other = (attached(Example(Lora(rank=2)), view_of(seed=seed)).update() for seed in (0, 1))
    added = attached(Example(Adapter(rank=2, init_std=0.05)), view_of()).update()
    for members in ([], [first, other], [added, added]):
        with pytest.raises(LuthierError, match=" "):
            merge.method.merge(members)


def test_a_finding_holds_a_sentence_a_table_and_a_picture(inspect: Example) -> None:
    view = view_of()
    update = attached(Example(Full()), view).update()
    assert isinstance(inspect.method, Inspector)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    finding = inspect.method.inspect(Case(view, {"mine": update}))
    assert finding.says.endswith(".") and "mine" in finding.says and finding.sure
    assert finding.rows and all(len(r) == len(finding.columns) for r in finding.rows)
    assert finding.picture.startswith("<svg") and finding.picture.endswith("</svg>")
    assert all(torch.equal(p, before[n]) for n, p in view.module.named_parameters()), "it only looks"


__all__ = [
    "test_a_finding_holds_a_sentence_a_table_and_a_picture",
    "test_a_merger_makes_one_update_of_the_members_base_and_leaves_them_as_they_are",
    "test_an_answer_does_not_depend_on_its_batch",
    "test_what_cannot_be_merged_is_refused",
]
