"""Tests of every curator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from luthier.curation.base import Curator
from luthier.data.store import Row
from luthier.data.table import DROP, KEEP, Table
from luthier.inference.services import lab_around
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError
from luthier.testing.contract.examples import Example
from luthier.testing.models import byte_tokenizer, tiny

WORDS = "alpha beta gamma delta river stone cloud field green paper metal seven night glass horse table"
UNTIDY = [  # rows as people write them
    {"prompt": "SAY  River and STONE", "completion": " River\tand  STONE "},
    {"prompt": "zähle bis drei", "completion": "eins\nzwei\n\ndrei für Ａnna"},
    {"prompt": "say nothing", "completion": ""},
    {"prompt": "", "completion": "cafe\u0301 at night"},
]
TEXTS = [  # rows for tests of curators: all with different numbers of words, and some untidy ones
    {"prompt": f"say {a} and {b}", "completion": " ".join([*[a] * (1 + i), b, f"item{i * i}"])}
    for i, (a, b) in enumerate(zip(WORDS.split(), reversed(WORDS.split()), strict=True))
] + UNTIDY


def curation_rows(curate: Example) -> list[Row]:
    """The rows for a curator, with keys of a file."""
    given = TEXTS if curate.rows is None else curate.rows
    return [Row(f"f:{i}", dict(values)) for i, values in enumerate(given, start=1)]


def curation_lab(seed: int = 0) -> Lab:
    """The services of a tiny model over bytes."""
    return lab_around(tiny(vocab_size=260, max_position_embeddings=512), byte_tokenizer(), seed)


def curated(curate: Example, rows: Sequence[Row], seed: int = 0) -> Table:
    """The table that a curator makes from rows."""
    assert isinstance(curate.method, Curator)
    return curate.method.curate(Table.of(rows).at(curate.name), curation_lab(seed))


@cache
def usual(curate: Example) -> tuple[Table, Table]:
    """(the usual rows, what the curator makes of them), once for all tests."""
    assert isinstance(curate.method, Curator)
    before = Table.of(curation_rows(curate)).at(curate.name)
    return before, curate.method.curate(before, curation_lab())


def decided(table: Table) -> dict[str, tuple[Any, ...]]:
    """For each entry, by its key and its parent's: the decision, the reason, the weight and the values."""
    out = {}
    for number in range(len(table.entries)):
        line, row = table.line(number), table.entries[number]
        parent = "" if line["parent"] is None else f" of {table.entries.key(line['parent'])}"
        out[row.key + parent] = (line["decision"], line["reason"], line["weight"], row.values)
    return out


def scores_of(table: Table) -> dict[str, float]:
    """The scores of incoming rows by key."""
    return {table.entries.key(i): float(table.score[i]) for i in range(table.incoming)}


def test_a_curator_accounts_for_every_row(curate: Example) -> None:
    rows, (before, table) = curation_rows(curate), usual(curate)
    assert table.follows(before), "the result comes from operations of the table"
    assert [table.entries[i] for i in range(len(rows))] == rows, "incoming rows are unchanged"
    assert sorted(table.live) == np.flatnonzero(table.decision == KEEP).tolist() and len(table)
    assert all(table.reason[i] for i in range(len(table.entries)) if table.decision[i] != KEEP), "each has a reason"
    assert len({r.key for r in table.rows}) == len(table), "no two rows of the set share a key"


def test_every_new_row_has_a_parent_that_exists_or_none(curate: Example) -> None:
    before, table = usual(curate)
    for number in range(len(before), len(table.entries)):
        parent = int(table.parent[number])
        assert parent < number and (parent < 0 or table.decision[parent] != DROP)
    replaced = np.flatnonzero(table.decision > DROP)
    assert set(replaced) <= set(table.parent.tolist()), "a rewritten or split row has children"


def test_decisions_do_not_depend_on_the_order_of_rows(curate: Example) -> None:
    rows = curation_rows(curate)
    mixed = [rows[i] for i in np.random.default_rng(3).permutation(len(rows))]
    (_, one), other = usual(curate), curated(curate, mixed)
    assert decided(one) == decided(other) and scores_of(one) == pytest.approx(scores_of(other), rel=1e-4, nan_ok=True)


def test_the_same_seed_gives_the_same_decisions(curate: Example) -> None:
    (_, first), again = usual(curate), curated(curate, curation_rows(curate))
    assert decided(first) == decided(again) and [r.key for r in first.rows] == [r.key for r in again.rows]


def test_a_curator_keeps_the_share_it_was_asked_for(curate: Example) -> None:
    share = getattr(curate.method, "keep_fraction", None)
    if share is None:
        return
    rows = curation_rows(curate)
    for n in (len(rows), len(rows) - 3):
        assert len(curated(curate, rows[:n])) == int(share * n)
    whole = replace(curate, method=curate.method.model_copy(update={"keep_fraction": 1.0}))
    assert [r.key for r in curated(whole, rows).rows] == [r.key for r in rows]


def test_an_idempotent_curator_changes_nothing_the_second_time(curate: Example) -> None:
    assert isinstance(curate.method, Curator)
    if not curate.method.idempotent:
        return
    _, once = usual(curate)
    twice = curate.method.curate(once.at(curate.name), curation_lab())
    assert list(twice.rows) == list(once.rows) and len(twice.entries) == len(once.entries)
    assert np.array_equal(twice.weight, once.weight)


def test_a_codec_brings_back_the_answers_it_encodes(curate: Example) -> None:
    assert isinstance(curate.method, Curator)
    codec = curate.method.codec
    if codec is None:
        return
    for row in curation_rows(curate):
        coded = codec.encode(row.values)
        assert codec.decode(row.values, coded["completion"]) == row.values["completion"]
        asked = codec.encode({k: v for k, v in row.values.items() if k != "completion"})
        assert asked["prompt"] == coded["prompt"], "questions have the form of training"


def test_a_curator_in_a_loop_of_your_own(curate: Example) -> None:
    assert isinstance(curate.method, Curator)
    rows = [r.values for r in curation_rows(curate)]
    before = json.dumps(rows)
    asked = "base_view" in curate.method.traits.needs
    model: dict[str, Any] = {}
    if asked:
        model = {"model": tiny(vocab_size=260, max_position_embeddings=512), "tokenizer": byte_tokenizer()}
    kept = curate.method.choose(rows, **model)
    table = curate.method.curated(rows, **model)
    assert kept == sorted(set(kept)) and set(kept) <= set(range(len(rows))) and json.dumps(rows) == before
    assert kept == sorted({int(i) for i in table.roots(table.live) if i >= 0})
    if model:
        with pytest.raises(LuthierError, match="asks a model and was given none"):
            curate.method.choose(rows)


__all__ = [
    "test_a_codec_brings_back_the_answers_it_encodes",
    "test_a_curator_accounts_for_every_row",
    "test_a_curator_in_a_loop_of_your_own",
    "test_a_curator_keeps_the_share_it_was_asked_for",
    "test_an_idempotent_curator_changes_nothing_the_second_time",
    "test_decisions_do_not_depend_on_the_order_of_rows",
    "test_every_new_row_has_a_parent_that_exists_or_none",
    "test_the_same_seed_gives_the_same_decisions",
]
