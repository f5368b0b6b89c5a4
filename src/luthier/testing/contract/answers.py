"""What every decoder, merger and inspector keeps."""

from __future__ import annotations

import pytest
import torch

from luthier.decoding.base import Decoder
from luthier.inference.services import lab_around
from luthier.inspection.base import Case, Inspector
from luthier.merging.base import Merger
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import (
    Example,
    attached,
)
from luthier.testing.models import byte_tokenizer, tiny, view_of
from luthier.tuners.adapter import Adapter
from luthier.tuners.full import Full


def test_an_answer_does_not_depend_on_its_batch(decode: Example) -> None:

    assert isinstance(decode.method, Decoder)
    lab = lab_around(tiny(vocab_size=260), byte_tokenizer(), seed=3)
    views, prompts = {"model": lab.view()}, [[5, 6, 7], [40] * 9, [9], [70, 71, 72, 73]]
    together = decode.method.decode(views, prompts, lab, 6)
    assert [c.tokens for c in together] and all(c.tokens <= 6 for c in together)
    assert together == [decode.method.decode(views, [p], lab, 6)[0] for p in prompts]
    assert together == decode.method.decode(views, prompts[::-1], lab, 6)[::-1]


def test_one_update_merged_alone_with_all_weight_is_itself_and_order_is_of_no_account(merge: Example) -> None:
    assert isinstance(merge.method, Merger)
    first, second = (attached(Example(Adapter(rank=2, init_std=0.05)), view_of(seed=0)).update() for _ in range(2))
    with pytest.raises(LuthierError):
        merge.method.merge([])
    with pytest.raises(LuthierError):
        merge.method.merge([first, second])  # added modules are no vector space


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
    "test_an_answer_does_not_depend_on_its_batch",
    "test_one_update_merged_alone_with_all_weight_is_itself_and_order_is_of_no_account",
]
