"""The table of rows that is being curated: nothing vanishes, order is kept, every new row knows where it came from."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from luthier.data.store import Row, Rows
from luthier.data.table import DECISIONS, Table
from luthier.support.errors import LuthierError


def rows(n=5):
    return [Row(f"f:{i}", {"prompt": f"p{i}", "completion": f"c{i}"}) for i in range(1, n + 1)]


def start(n=5):
    return Table.of(rows(n)).at("first")


def keys(table):
    return [r.key for r in table.rows]


def words(table):
    return [DECISIONS[d] for d in table.decision]


def test_a_fresh_table_is_its_rows():
    given = Rows.of(rows())
    table = Table.of(given)
    assert table.rows.parts == given.parts and len(table) == 5 and list(table.rows) == rows()
    assert words(table) == ["keep"] * 5 and np.isnan(table.score).all() and table.weighed is not None
    assert table.weighed.weights is None and table.weighed.digest == given.digest


def test_kept_and_dropped_rows_stay_with_score_and_reason():
    table = start().keep(np.array([0, 3]), np.arange(5) / 10, ["good", "bad", "bad", "good", "bad"])
    assert keys(table) == ["f:1", "f:4"] and words(table) == ["keep", "drop", "drop", "keep", "drop"]
    assert table.reason.tolist() == ["good", "bad", "bad", "good", "bad"] and table.score.tolist() == [
        0,
        0.1,
        0.2,
        0.3,
        0.4,
    ]
    after = table.at("second").drop(np.array([1]), "too short")
    assert keys(after) == ["f:1"] and after.reason.tolist() == ["good", "bad", "bad", "too short", "bad"]
    assert [after.line(i)["step"] for i in range(5)] == ["first", "first", "first", "second", "first"]
    assert keys(table) == ["f:1", "f:4"], "the table before is as it was"
    assert start().keep(np.array([1])).reason.tolist() == ["not chosen by first", "", *["not chosen by first"] * 3]
    with pytest.raises(LuthierError, match="first: drops rows without a reason"):
        start().drop(np.array([0]), "")
    with pytest.raises(LuthierError, match="first: gives 2 reasons for 5 rows"):
        start().keep(np.array([0]), None, ["a", "b"])


def test_rows_are_dropped_with_a_reason_for_each():
    table = start().drop([3, 1], ["", "too short", "", "too long", "unused"])
    assert keys(table) == ["f:1", "f:3", "f:5"] and table.reason.tolist() == ["", "too short", "", "too long", ""]
    with pytest.raises(LuthierError, match="first: drops rows without a reason"):
        start().drop([0, 1], ["a", "", "c", "d", "e"])
    with pytest.raises(LuthierError, match="first: gives 2 reasons for 5 rows"):
        start().drop([0, 1], ["a", "b"])


@pytest.mark.parametrize("change", [Table.keep, lambda t, p: t.drop(p, "gone")])
def test_positions_are_whole_numbers_of_rows_in_the_set(change):
    assert (
        keys(change(start(), [])) == keys(change(start(), range(0))) == keys(change(start(), np.array([], dtype=int)))
    )
    assert keys(change(start(), (0, 4))) == keys(change(start(), np.array([4, 0])))
    for flags in (np.ones(5, dtype=bool), [True, False, True, False, True]):
        with pytest.raises(
            LuthierError, match=r"first: gives 5 flags where positions belong; write np.flatnonzero\(flags\)"
        ):
            change(start(), flags)
    with pytest.raises(LuthierError, match="first: gives positions of type float64; write whole numbers"):
        change(start(), np.array([1.0]))
    for wrong in (-1, 5):
        with pytest.raises(LuthierError, match=f"first: gives position {wrong}; the 5 rows have 0 to 4"):
            change(start(), [0, wrong])
    with pytest.raises(LuthierError, match="gives position 2; the 2 rows have 0 to 1"):
        change(start().keep([0, 3]), [2])


def test_weights_multiply_and_reach_the_rows():
    table = start().weigh(np.array([1, 2, 3, 4, 5.0])).keep(np.array([1, 4])).at("second").weigh(np.array([0.5, 2]))
    assert table.weight.tolist() == [1, 1, 3, 4, 10] and table.weighed.weights.tolist() == [1, 10]
    assert table.rows.weights is None, "what curators see is not weighed"
    given = Rows.of(rows(2)).weighing(np.array([3.0, 1.0]))
    assert Table.of(given).weighed.weights.tolist() == [3, 1]
    for bad in ([1.0] * 4, [1, 1, 1, 1, -1], [1, 1, 1, 1, np.nan]):
        with pytest.raises(LuthierError, match="first: weights are not 5 finite numbers of 0 or more"):
            start().weigh(np.array(bad))


def test_rewritten_rows_take_their_places_and_the_old_ones_stay():
    values = [None, {"prompt": "p2", "completion": "new"}, None, {"prompt": "p4", "completion": "newer"}, None]
    table = start().weigh(np.array([1, 2, 1, 1, 1.0])).rewrite(values, ["a", "b", "c", "d", "e"])
    assert keys(table) == ["f:1", "f:2", "f:3", "f:4", "f:5"]
    assert [r.values["completion"] for r in table.rows] == ["c1", "new", "c3", "newer", "c5"]
    assert words(table) == ["keep", "rewrite", "keep", "rewrite", "keep", "keep", "keep"]
    assert table.parent.tolist() == [-1] * 5 + [1, 3] and table.weighed.weights.tolist() == [1, 2, 1, 1, 1]
    assert [table.reason[i] for i in (1, 3, 5, 6)] == ["b", "d", "b", "d"] and table.entries[1].values[
        "completion"
    ] == "c2"
    for given, said in ((values[:3], "3 of 5 rows"), ([*values, None], "more than 5 rows")):
        with pytest.raises(LuthierError, match=f"first: gives values for {said}"):
            start().rewrite(given)


def test_split_rows_lie_side_by_side_and_added_ones_at_the_end():
    halves = [[{"text": "a"}, {"text": "b"}] if i in (1, 4) else None for i in range(5)]
    table = start().split(halves)
    assert keys(table) == ["f:1", "f:2/1", "f:2/2", "f:3", "f:4", "f:5/1", "f:5/2"]
    assert words(table) == ["keep", "split", "keep", "keep", "split"] + ["keep"] * 4
    again = table.at("second").split([[{"text": "x"}] if k == "f:2/2" else None for k in keys(table)])
    assert "f:2/2/1" in keys(again) and again.roots(again.live).tolist() == [0, 1, 1, 2, 3, 4, 4]
    more = again.add([{"text": "n"}, {"text": "m"}], parents=[1, 1]).add([{"text": "own"}]).add([{"text": "own"}])
    assert keys(more)[-4:] == ["f:2/1+1", "f:2/1+2", "second:1", "second:2"]
    assert more.roots(more.live).tolist()[-4:] == [1, 1, -1, -1] and len(set(keys(more))) == len(more)
    assert (more.parent < np.arange(len(more.entries))).all()
    for parents, said in (
        ([0, -1], "gives position -1; the 5 rows have 0 to 4"), ([0], "adds more rows than the 1 parents it gives"),
        ([0, 1, 2], "adds 2 rows and gives 3 parents"),
    ):  # fmt: skip
        with pytest.raises(LuthierError, match=f"first: {said}"):
            start().add([{"text": "n"}, {"text": "m"}], parents=parents)
    with pytest.raises(LuthierError, match="first: splits f:1 into no row"):
        start().split([[], None, None, None, None])


def test_only_a_tables_own_operations_follow_it():
    before = start()
    for after in (
        before.keep(np.array([0])),
        before.split([[{"text": "a"}]] + [None] * 4).add([{"text": "b"}]),
        before,
    ):
        assert after.follows(before)
    shorter = Table.of(rows(4)).at("first")
    for other in (shorter, Table.of(rows()).at("first"), before.at("second")):
        assert not other.follows(before)
    several = Table.of(Rows.joined([Rows.of(rows(2)), Rows.of(rows(3))])).at("first")
    assert several.keep([0]).follows(several) and not before.follows(several)


def test_every_entry_is_written_with_its_columns(tmp_path):
    table = start().keep(np.array([0, 1, 2]), np.array([1, 2, 3, 4, np.nan]), "why").at("then")
    table = table.rewrite([None, {"text": "é"}, None]).add([{"text": "own"}]).weigh(np.array([1, 2, 1, 0.5]))
    table.write(tmp_path / "t.parquet")
    found = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert [f["key"] for f in found] == ["f:1", "f:2", "f:3", "f:4", "f:5", "f:2", "then:1"]
    assert [f["decision"] for f in found] == ["keep", "rewrite", "keep", "drop", "drop", "keep", "keep"]
    assert [f["parent"] for f in found] == [None] * 5 + [1, None] and [f["id"] for f in found] == list(range(7))
    assert [f["score"] for f in found] == [1, 2, 3, 4, None, None, None]
    assert [f["step"] for f in found] == ["then", "then", "then", "first", "first", "then", "then"]
    assert [f["weight"] for f in found] == [1, 1, 1, 1, 1, 2, 0.5]
    assert json.loads(found[5]["values"]) == {"text": "é"} and json.loads(found[1]["values"])["completion"] == "c2"


def test_rows_of_a_file_are_written_to_the_cache_and_never_held(tmp_path, monkeypatch):
    from luthier.data.reading import read
    from luthier.support.cache import cache_folder

    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r.values) + "\n" for r in rows(2500)))
    table = Table.of(read("d.jsonl", {}, tmp_path)[0]).at("first")
    asked = []

    def values():
        for i, row in enumerate(table.rows):
            asked.append(i)
            yield {**row.values, "completion": "x" * (i % 7)} if i % 2 else None

    one, two = table.rewrite(values()), table.rewrite(values())
    assert one.rows.on_disk and one.rows.digest == two.rows.digest != table.rows.digest
    assert asked == list(range(2500)) * 2 and len(one) == 2500
    assert [r.values["completion"] for r in one.rows][:4] == ["c1", "x", "c3", "xxx"]
    assert len(list((cache_folder() / "rows").iterdir())) == 2, "the file's rows, and the rewritten ones once"
    assert one.rows[2499].key == f"{tmp_path}/d.jsonl:2500" and one.rows.parts[1].file.exists()
