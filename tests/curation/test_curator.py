"""What all curators share: their use without a recipe, and a row's words."""

from typing import ClassVar

import pytest

from luthier.curation.base import Curator, text_of
from luthier.curation.random import Random
from luthier.data.store import Row
from luthier.data.table import Table
from luthier.inference.services import lab_around
from luthier.method import Traits
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError
from luthier.testing.models import byte_tokenizer, tiny


class Doubling(Curator):
    """Drops the first row, rewrites the second, and adds one from nowhere and one from the last."""

    def curate(self, table: Table, lab: Lab) -> Table:
        table = table.rewrite([None, {"text": "new"}, *[None] * (len(table.rows) - 2)])
        table = table.add([{"text": "from nowhere"}]).add([{"text": "of the last"}], parents=[len(table.rows) - 1])
        return table.drop([0], "the first")


class Asking(Curator):
    """Wants a model, and keeps the name of its class."""

    traits: ClassVar[Traits] = Traits(needs=frozenset({"base_view"}))

    def curate(self, table: Table, lab: Lab) -> Table:
        name = "none" if not lab.models else type(lab.view().module).__name__
        return table.rewrite([{"text": name}] * len(table.rows))


ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
ROWS = [{"text": w} for w in ("a", "b", "c", "d")]


def test_positions_are_of_rows_that_stay_or_were_rewritten_and_made_rows_have_none():
    assert Doubling().choose(ROWS) == [1, 2, 3]
    table = Doubling().curated(ROWS)
    assert sorted(r.values["text"] for r in table.rows) == ["c", "d", "from nowhere", "new", "of the last"]


def test_a_model_is_asked_for_only_by_curators_that_need_one():
    assert len(Random(keep_fraction=0.5).choose(ROWS)) == 2
    with pytest.raises(LuthierError, match="asks a model and was given none; pass model and tokenizer"):
        Asking().curated(ROWS)
    found = Asking().curated(ROWS, model=tiny("llama", vocab_size=260), tokenizer=byte_tokenizer())
    assert [r.values["text"] for r in found.rows] == ["LlamaForCausalLM"] * 4


def test_the_seed_decides():
    rows = [{"text": str(i)} for i in range(30)]
    one, other = (Random(keep_fraction=0.5).choose(rows, seed) for seed in (0, 1))
    assert one != other and one == Random(keep_fraction=0.5).choose(rows, 0)
    model, tokenizer = tiny("llama", vocab_size=260), byte_tokenizer()
    assert lab_around(model, tokenizer, 7).seed == 7 and other == Random(keep_fraction=0.5).choose(
        rows, 1, model, tokenizer
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"messages": [{"role": "user", "content": "how many"}, ANSWER]}, "how many two"),
        ({"prompt": "how many", "completion": "two", "note": "x"}, "how many two"),
        ({"text": "two", "note": "x"}, "two"),
        ({"prompt": "how many"}, "how many"),
        ({"text": 2, "label": 1}, "2"),
    ],
)  # fmt: skip
def test_a_rows_words(values, words):
    assert text_of(Row("f:1", values)) == words
