"""Rows on disk: checked once, keyed by all that went into them, never taken up when something changed."""

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from luthier.data import files, reading, store
from luthier.data.prepare import prepare
from luthier.data.reading import read
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.support.cache import cache_folder
from luthier.support.errors import RecipeError
from luthier.tasks.class_rows import ClassRows
from luthier.testing.models import TEMPLATE, byte_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def values(n):
    return [{"prompt": f"say {i}", "completion": f"{i}", "tag": {"deep": [i, None, 1.5]}} for i in range(n)]


def write(path, items):
    path.write_text("".join(json.dumps(x) + "\n" for x in items))
    return path


def rows_of(path, **more):
    return read(path.name, {}, path.parent, **more)


def stored():
    return sorted(p.name for p in (cache_folder() / "rows").iterdir())


def test_rows_come_back_as_they_were_with_their_lines(tmp_path):
    rows, skipped = rows_of(write(tmp_path / "d.jsonl", values(3000)))
    assert not skipped and len(rows) == 3000
    assert rows[2047] == Row(f"{tmp_path}/d.jsonl:2048", values(2048)[-1])
    assert [r.values["prompt"] for r in rows[2998:]] == ["say 2998", "say 2999"]
    some = rows.take(np.array([5, 2, 2999])).take(np.array([2, 0]))
    assert [r.key.rpartition(":")[2] for r in some] == ["3000", "6"]
    assert len({rows.digest, some.digest, rows.take(np.array([2, 5])).digest, rows.take(np.array([5, 2])).digest}) == 4
    assert rows[-1].key.endswith(":3000")
    with pytest.raises(IndexError):
        rows[3000]


def test_a_file_is_read_once_and_again_when_anything_changed(tmp_path, monkeypatch):
    path, seen = write(tmp_path / "d.jsonl", values(5)), []
    reader = files.READERS[".jsonl"]

    def counted(p):
        seen.append(1)
        yield from reader(p)

    monkeypatch.setitem(files.READERS, ".jsonl", counted)
    rows_of(path)
    rows_of(path)
    os.utime(path, (1, 1))
    rows_of(path)
    assert len(seen) == 1
    rows_of(path, limit=3)
    write(path, values(6))
    assert len(rows_of(path)[0]) == 6
    assert len(rows_of(path, on_bad="skip")[0]) == 6
    assert len(seen) == 4


def test_pain_09_tokens_of_another_tokenizer_template_or_length_are_never_taken_up(tmp_path):
    rows, _ = rows_of(write(tmp_path / "d.jsonl", values(4)))
    first = prepare(rows, Renderer(byte_tokenizer()), max_length=100)
    before = len(stored())
    assert prepare(rows, Renderer(byte_tokenizer()), max_length=100).digest == first.digest
    assert len(stored()) == before
    other = byte_tokenizer("Chat: " + TEMPLATE)
    variants = [
        prepare(rows, Renderer(other), max_length=100),
        prepare(rows, Renderer(byte_tokenizer(), system="Be brief."), max_length=100),
        prepare(rows, Renderer(byte_tokenizer(), plain=True), max_length=100),
        prepare(rows[:2], Renderer(byte_tokenizer()), max_length=100),
    ]
    assert len({first.digest, *(v.digest for v in variants)}) == 5
    with pytest.raises(RecipeError, match="longer than 10 tokens"):
        prepare(rows, Renderer(byte_tokenizer()), max_length=10)
    bigger = byte_tokenizer()
    bigger.add_tokens(["say"])
    assert prepare(rows, Renderer(bigger), max_length=100).digest != first.digest


def test_tokens_of_other_generation_settings_are_never_taken_up(tmp_path):
    rows, _ = rows_of(write(tmp_path / "d.jsonl", values(4)))
    endless = byte_tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
    silent, ending = Renderer(endless), Renderer(endless, ends=(endless.eos_token_id,))
    assert silent.stop_ids == ending.stop_ids
    with pytest.raises(RecipeError, match="no answer ends in a stop token"):
        prepare(rows, silent, max_length=100)
    assert prepare(rows, ending, max_length=100).census.without_stop == 0


def test_tokens_are_made_again_when_the_code_of_their_task_changed(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", [{"text": "a", "label": 0}])
    rows, _ = rows_of(path, shapes=("text and label",))
    versions, asked = iter(("old", "new", "old")), []
    monkeypatch.setattr("luthier.data.prepare.code_key", lambda *names: asked.append(names) or next(versions))
    for entries in (2, 3, 3):
        prepare(rows, Renderer(byte_tokenizer()), max_length=100, maker=ClassRows({0: 0}))
        assert len(stored()) == entries
    assert asked == [("luthier.data.prepare", "luthier.tasks.class_rows")] * 3


def test_stored_and_in_memory_rows_are_prepared_alike(tmp_path):
    rows, _ = rows_of(write(tmp_path / "d.jsonl", values(7)))
    renderer = Renderer(byte_tokenizer())
    one, other = prepare(rows, renderer, max_length=100), prepare(list(rows), renderer, max_length=100)
    assert one.digest == other.digest and one.census == other.census
    assert (
        [one.rows[i] for i in range(7)]
        == [other.rows[i] for i in range(7)]
        == [renderer.render(r.values, r.key) for r in rows]
    )
    assert one.rows.lengths.tolist() == [len(x["ids"]) for x in one.rows]


def test_a_damaged_or_half_made_entry_is_made_again(tmp_path):
    path = write(tmp_path / "d.jsonl", values(5))
    rows_of(path)
    (name,) = stored()
    arrow = cache_folder() / "rows" / name / "rows.arrow"
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert [r.values for r in rows_of(path)[0]] == values(5)
    left = cache_folder() / "rows" / ".half.999999999"  # of a process that was killed
    left.mkdir()
    write(path, values(6))
    rows_of(path)
    assert not left.exists()
    with pytest.raises(RecipeError):  # a refusal leaves nothing behind
        rows_of(write(tmp_path / "bad.jsonl", [{"prompt": 1}]))
    assert not [n for n in stored() if n.startswith(".")]


def test_bad_rows_are_refused_by_line_or_skipped_counted_and_listed(tmp_path):
    path = tmp_path / "d.jsonl"
    good = json.dumps(values(1)[0]).encode()
    bad = [
        b"{",
        b"[1]",
        b'{"prompt": "x"}',
        b'{"prompt": "x", "completion": 3}',
        b'{"text": "\xff"}',
        b'{"text": "other shape"}',
    ]
    path.write_bytes(b"\n".join([good, *bad, good]) + b"\n")
    with pytest.raises(RecipeError, match=r"d\.jsonl:2: is not JSON"):
        rows_of(path)
    for _ in range(2):  # read, and taken from the cache
        rows, skipped = rows_of(path, on_bad="skip")
        assert [r.key.rpartition(":")[2] for r in rows] == ["1", "8"]
        assert [s.removeprefix(str(path)).split(":")[1] for s in skipped] == ["2", "3", "4", "5", "6", "7"]
        assert "is not UTF-8" in skipped[4] and "holds text, but" in skipped[5]
    path.write_bytes(b"\n".join([good, *[b"{"] * 30]) + b"\n")
    skipped = rows_of(path, on_bad="skip")[1]
    assert len(skipped) == 21 and skipped[-1].endswith("and 10 more")


def test_a_json_list_is_read_item_by_item(tmp_path):
    path = tmp_path / "d.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(values(3)).encode())
    assert [r.values for r in rows_of(path)[0]] == values(3)
    broken = {
        b'[{"prompt": "a", "completion": "b"}, {"prompt": "a", "comp': "is not JSON after item 1",
        b'[{"prompt": "a", "completion": "b"}, {]': "is not JSON after item 1",
        b'[{"prompt": "\xff", "completion": "b"}]': "is not UTF-8 text after item 0",
        b'{"prompt": "a",\n"completion": "b"': "is not JSON after item 0",
        b"": "holds no rows",
        b'[{"prompt": "a", "completion": "b"}, 3]': "item 2: holds a int, not an object",
        b'[{"prompt": "a", "completion": "b", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}]": "nested too deeply",
        b"[]": "holds no rows",
    }
    for content, message in broken.items():
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            rows_of(path)


def test_a_hub_set_is_read_by_name_configuration_revision_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        if name == "a/gone":
            raise ValueError("no such set\nat all")
        return datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = read("a/b@v1:easy", {}, Path("."), "eval", part="test")
    assert asked == [("a/b", "easy", "test", "v1")] and [r.key for r in rows][1] == "a/b@v1:easy:test:2"
    with pytest.raises(RecipeError, match=r"data\.train: a/gone: no such set"):
        read("a/gone", {}, Path("."))


def test_memory_stays_flat_in_rows(tmp_path, monkeypatch):
    """The peak of Python's and Arrow's memory while 800 rows are read and rendered is that of 200."""
    monkeypatch.setattr(store, "BATCH", 64)
    renderer, pool, peaks = Renderer(byte_tokenizer()), pa.default_memory_pool(), []
    for n in (64, 200, 800):  # the first one loads what is loaded once
        path = write(tmp_path / f"{n}.jsonl", values(n))
        held = pool.bytes_allocated()
        tracemalloc.start()
        rows, _ = rows_of(path)
        done = prepare(rows, renderer, max_length=2000)
        for i in range(0, n, 7):
            done.rows[i]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(done.rows) == n and pool.bytes_allocated() - held < 100_000, "tables are mapped, not held"
    assert peaks[2] < peaks[1] + 200_000, peaks  # as lists they would take 1 MB more


def test_a_packed_file_is_read_like_a_plain_one_and_a_cut_one_is_named(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(v) + "\n" for v in values(500)).encode())
    path.write_bytes(whole)
    rows, _ = rows_of(path)
    assert rows[499] == Row(f"{path}:500", values(500)[-1])
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecipeError, match=r"d\.jsonl\.gz: is no whole gzip file after line \d+"):
        rows_of(path)
    path.write_bytes(b"plain text")
    with pytest.raises(RecipeError, match="is no whole gzip file after line 0"):
        rows_of(path)


def test_humaneval_comes_from_its_package(tmp_path):
    rows, _ = reading.read("builtin:humaneval", {}, tmp_path, "eval")
    assert len(rows) == 164 and rows[0].values["entry_point"] == "has_close_elements"
    assert rows[0].values["completion"] == rows[0].values["canonical_solution"]
    with pytest.raises(RecipeError, match=r"data\.train: builtin:humaneval is for tests only"):
        reading.read("builtin:humaneval", {}, tmp_path, "train")
