"""Files as they come: formats, packing, folders, globs, the Hub; and what damage costs: a sentence and no memory."""

import gzip
import io
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.commands import luthier, write
from luthier.data import arrow, files, parquet, streams
from luthier.data.mixture import Mixture
from luthier.data.reading import read
from luthier.recipe import load
from luthier.run.rows import training_rows
from luthier.support.errors import RecipeError

ROWS = [
    {"prompt": "say a", "completion": "a, b"},
    {"prompt": 'say "b"', "completion": "b\nc"},
    {"prompt": "say ü", "completion": "ü"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def values(source, folder, **more):
    return [r.values for r in read(str(source), {}, folder, **more)[0]]


def refusal(source, folder, **more):
    with pytest.raises(RecipeError) as error:
        read(str(source), {}, folder, **more)
    return str(error.value)


# --- formats ---


def lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(r, ensure_ascii=False) + end for r in rows).encode()


def table(delimiter, rows=ROWS, end="\n"):
    out = [delimiter.join(rows[0])]
    out += [delimiter.join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in rows]
    return (end.join(out) + end).encode()


def zst(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def packed(name, data):
    return {".gz": gzip.compress, ".zst": zst}.get(Path(name).suffix, bytes)(data)


BOM = b"\xef\xbb\xbf"
TEXTS = {
    "d.jsonl": lines(),
    "crlf.jsonl": lines(end="\r\n"),
    "bom.jsonl": BOM + b"\n" + lines(),
    "D.JSONL": lines(),
    "d.ndjson": lines(),
    "d.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": BOM + json.dumps(ROWS).encode(),
    "lines.json": lines(),
    "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "d.csv": table(","),
    "bom.csv": BOM + table(","),
    "crlf.csv": table(",", end="\r\n"),
    "mac.csv": table(",", end="\r"),
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "d.tsv": table("\t"),
}


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_file_is_read_alike_in_every_format(name, packing, tmp_path):
    (tmp_path / (name + packing)).write_bytes(packed(name + packing, TEXTS[name]))
    assert values(name + packing, tmp_path) == ROWS


def test_zstandard_files_of_several_frames_are_whole(tmp_path):
    (tmp_path / "d.jsonl.zst").write_bytes(zst(lines(ROWS[:1])) + zst(lines(ROWS[1:])))
    assert values("d.jsonl.zst", tmp_path) == ROWS


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_parquet_is_read_in_its_packings(compression, version, tmp_path):
    many = ROWS * 700
    pq.write_table(
        pa.Table.from_pylist(many), tmp_path / "d.parquet", compression=compression, data_page_version=version,
        row_group_size=1000, data_page_size=2000,
    )  # fmt: skip
    assert values("d.parquet", tmp_path) == many


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_are_read(new, compression, tmp_path):
    rows = pa.Table.from_pylist(ROWS * 700)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(str(tmp_path / "d.arrow"), rows.schema, options=options) as writer:
        writer.write_table(rows, max_chunksize=1000)
    assert values("d.arrow", tmp_path) == ROWS * 700


def test_names_of_classes_come_from_the_file(tmp_path):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(str(tmp_path / "d.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    expected = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]
    for source in ("d.parquet", "saved"):
        assert values(source, tmp_path, shapes=("text and label",)) == expected
    datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features).to_parquet(
        str(tmp_path / "no.parquet")
    )
    assert "label is null; give it a value" in refusal("no.parquet", tmp_path, shapes=("text and label",))


def test_objects_of_a_columnar_file_lose_the_keys_that_others_have(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    talk = [
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{"messages": talk, "tools": None}]), tmp_path / "d.parquet")
    (row,) = values("d.parquet", tmp_path)
    del talk[1]["content"]
    assert row == {"messages": talk}


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("bare.tsv", b'prompt\tcompletion\n"a\tb\nc"d\te"\n"f" g\th\n', [('"a', "b"), ('c"d', 'e"'), ('"f" g', "h")]),
        ("quoted.tsv", b'prompt\tcompletion\n"a ""b"""\tb\nc\t"d"\n', [('a "b"', "b"), ("c", "d")]),
        ("inside.tsv", b'prompt\tcompletion\n"a\tb"\tc\n', [("a\tb", "c")]),
        ("empty.csv", b"prompt,completion\n\na,b\n\n", [("a", "b")]),
        ("late.csv", b"\n \n prompt , completion\na,b\n", [("a", "b")]),
    ],
)
def test_quotes_and_empty_lines_of_tables(name, data, expected, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert [tuple(v.values()) for v in values(name, tmp_path)] == expected


def on_lines(rows):
    return "".join(json.dumps(r, indent=2) + "\n" for r in rows).encode()


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("one.json", on_lines(ROWS[:1]), ROWS[:1]),
        ("several.json", on_lines(ROWS), ROWS),
        ("data.json", json.dumps({"data": ROWS}).encode(), ROWS),
        ("named.json", on_lines([{"version": "1.0", "tags": ["a"], "examples": ROWS, "about": {"x": [{}]}}]), ROWS),
        ("packed.json.gz", gzip.compress(json.dumps({"rows": ROWS}).encode(), mtime=0), ROWS),
        ("talk.json", on_lines([{"messages": TURNS}]), [{"messages": TURNS}]),
        ("talks.json", json.dumps({"messages": TURNS}).encode(), [{"messages": TURNS}]),
        ("kept.json", lines([{**r, "facts": [{"x": 1}]} for r in ROWS]), [{**r, "facts": [{"x": 1}]} for r in ROWS]),
        ("blank.jsonl", b"\n\n" + lines(end="\n \n\n"), ROWS),
        ("mac.jsonl", lines(end="\r"), ROWS),
        ("windows.jsonl", lines(end="\r\n"), ROWS),
    ],
)
def test_rows_of_json_are_found_in_lists_in_an_object_or_over_several_lines(name, data, expected, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert values(name, tmp_path) == expected


def test_a_line_of_a_file_with_old_line_ends_has_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(end="\r") + b"{\r")
    assert "a.jsonl:4: is not JSON" in refusal("a.jsonl", tmp_path)


# --- folders, globs, the Hub ---


def shards(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(lines([{"prompt": f"{number}", "completion": name}]))
    return folder


def read_names(source, folder, **more):
    return [v["completion"] for v in values(source, folder, **more)]


def test_a_folder_is_its_shards_in_order_of_one_split(tmp_path):
    split = shards(tmp_path / "d", "train-00001-of-2.jsonl", "train-00000-of-2.jsonl", "dev.jsonl", "test.jsonl")
    (split / "README.md").write_text("about")
    (split / "dataset_infos.json").write_text("{}")
    assert read_names("d", tmp_path) == ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl"]
    assert read_names("d", tmp_path, part="validation") == ["dev.jsonl"]
    assert "has no split 'easy'; it has test, train, validation; set data.eval_split" in refusal(
        "d", tmp_path, part="easy", split="eval"
    )
    assert read_names(shards(tmp_path / "plain", "b.jsonl", "a.jsonl"), tmp_path, part="test") == ["a.jsonl", "b.jsonl"]
    shards(tmp_path / "nested" / "train", "x.jsonl")
    shards(tmp_path / "nested" / "val", "y.jsonl")
    assert read_names("nested", tmp_path) == ["x.jsonl"] and read_names("nested", tmp_path, part="validation") == [
        "y.jsonl"
    ]
    (tmp_path / "none").mkdir()
    assert "holds no file that luthier reads" in refusal("none", tmp_path)


def test_a_glob_is_its_files_and_a_limit_counts_over_all(tmp_path):
    shards(tmp_path / "d", "b.jsonl", "a.jsonl", "c.txt")
    assert read_names("d/*.jsonl", tmp_path) == ["a.jsonl", "b.jsonl"]
    assert read_names(tmp_path / "*" / "[ab].jsonl", tmp_path / "cache", limit=1) == ["a.jsonl"]
    assert f"no file matches {tmp_path}/d/*.csv" in refusal("d/*.csv", tmp_path)
    said = refusal("d/c.txt", tmp_path)
    assert (
        "is not a file that luthier reads; it reads .jsonl, .ndjson, .json, .csv, .tsv, .conll, .iob, .iob2, .bio, "
        "packed as .gz or .zst too, " in said
    )
    shards(tmp_path / "d", ".a.jsonl")
    assert read_names("d/*.jsonl", tmp_path) == ["a.jsonl", "b.jsonl"] and read_names("d/.*", tmp_path) == [".a.jsonl"]
    (tmp_path / "d" / "b.jsonl").write_bytes(lines([{"text": "t"}]))
    assert "b.jsonl: holds text, but" in refusal("d/*.jsonl", tmp_path)


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    whole = datasets.Dataset.from_list(ROWS * 4)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict(train=whole, test=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "several"))
    assert values("one", tmp_path) == values("several", tmp_path) == ROWS * 4
    assert values("several", tmp_path, part="test") == ROWS
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    assert "names the file 'data-00001-of-00003.arrow', which is not there" in refusal("one", tmp_path)


def test_a_source_of_several_files_is_one_source_of_a_mixture(tmp_path):
    shards(tmp_path / "d", "a.jsonl", "b.jsonl")
    (tmp_path / "e.jsonl").write_bytes(lines())
    recipe = "{model: m, data: {train: [{path: d, weight: 2}, {path: e.jsonl}]}}"
    rows, _, mix = training_rows(load(recipe).data, tmp_path, ("prompt and completion",))
    keys = [r.key for r in rows]
    assert mix.sources_of(keys).tolist() == [0, 0, 1, 1, 1]
    assert [len(m) for m in Mixture.of(keys, mix).members] == [2, 3]
    twice = "{model: m, data: {train: [{path: d}, {path: d/a.jsonl}]}}"
    with pytest.raises(RecipeError, match="d/a.jsonl is named twice"):
        training_rows(load(twice).data, tmp_path, ("prompt and completion",))


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", None, "test", None)),
        ("org/name:conf", ("org/name", "conf", "test", None)),
        ("org/name:conf@rev", ("org/name", "conf", "test", "rev")),
        ("hf://datasets/org/name@rev:conf", ("org/name", "conf", "test", "rev")),
        ("hf://org/name", ("org/name", None, "test", None)),
    ],
)
def test_a_hub_id_has_a_configuration_a_revision_and_a_split(source, asked, tmp_path, monkeypatch):
    seen = []

    def load_dataset(name, config, split, revision):
        seen.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert values(source, tmp_path, part="test") == ROWS and seen == [asked]


def test_a_recipe_says_the_configuration_and_the_split_of_each_set(model_folder, tmp_path, monkeypatch):
    seen = []

    def load_dataset(name, config, split, revision):
        seen.append((name, config, split, revision))
        made = datasets.Dataset.from_list([{"prompt": f"{split} {i}", "completion": "c"} for i in range(4)])
        return made.add_column("n", [1] * 4, new_fingerprint=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = {"train": "org/name:conf@rev", "train_split": "a", "eval": "hf://datasets/org/held:c", "eval_split": "b"}
    done = luthier("check", write(tmp_path, model_folder, data=data), "--json", "--no-forecast", cwd=tmp_path)
    said = json.loads(done.stdout)
    assert set(seen) == {("org/name", "conf", "a", "rev"), ("org/held", "c", "b", None)}
    assert (said["train"]["rows"], said["eval"]["rows"], said["overlap"]) == (4, 4, "")


@pytest.mark.parametrize("source", ["org/name:conf@rev", "hf://datasets/org/name", "hf://datasets/org/name/a.jsonl"])
def test_without_a_network_the_hub_costs_a_sentence(source, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    said = refusal(source, tmp_path)
    assert said.startswith("data.train: ") and "org/name" in said and "\n" not in said and said.endswith("network")


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetGenerationError("An error occurred\nTraceback"), ValueError("Unknown split")]
)
def test_what_the_library_datasets_refuses_costs_a_sentence(error, tmp_path, monkeypatch):
    def load_dataset(*args, **how):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = refusal("org/name", tmp_path)
    assert (
        str(error).partition("\n")[0] in said
        and "check name, configuration, split and network" in said
        and "\n" not in said
    )


def test_a_file_on_the_hub_is_read_by_its_address(tmp_path, monkeypatch):
    import huggingface_hub

    seen = []

    def snapshot_download(name, **how):
        seen.append((name, how["revision"], how["allow_patterns"]))
        return str(shards(tmp_path / "hub" / "sub", "a.jsonl", "b.jsonl").parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert read_names("hf://datasets/org/name@v1/sub/*.jsonl", tmp_path) == ["a.jsonl", "b.jsonl"]
    assert seen == [("org/name", "v1", ["sub/*.jsonl", "sub/*.jsonl/*"])]
    assert "is not an address on the Hub" in refusal("hf://spaces/org/name/x.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jsonl", "data.train: there is no file"),
        ("gone", "'gone' is no file, folder or glob that is there, nor a Hub id"),
        ("./gone/x", "is no file, folder or glob that is there"),
    ],
)
def test_a_source_that_is_not_there_is_refused(source, message, tmp_path):
    assert message in refusal(source, tmp_path)


def test_a_split_is_read_for_folders_and_hub_ids_only():
    assert load("{model: m, data: {train: folder, train_split: a}}").data.sources[0].split == "a"
    with pytest.raises(RecipeError, match=r"data\.train_split: is for Hub data sets and folders"):
        load("{model: m, data: {train: x.jsonl, train_split: a}}")


# --- damage ---


DAMAGED = {
    "a.jsonl": (lines()[:-9], "a.jsonl:3: is not JSON"),
    "b.jsonl": (lines().replace("ü".encode(), b"\xfc"), "b.jsonl:3: is not UTF-8 text (invalid start byte at byte 16)"),
    "utf16.jsonl": (lines().decode().encode("utf-16"), "utf16.jsonl: is UTF-16 text; save the file as UTF-8"),
    "utf16.csv": (table(",").decode().encode("utf-16"), "utf16.csv: is UTF-16 text"),
    "utf16.json": (json.dumps(ROWS).encode("utf-16-le"), "utf16.json: is UTF-16 text"),
    "utf32.tsv": (table("\t").decode().encode("utf-32"), "utf32.tsv: is UTF-32 text"),
    "latin.json": (
        json.dumps(ROWS, ensure_ascii=False).encode("latin-1"),
        "latin.json: is not UTF-8 text after item 2; save",
    ),
    "named.csv": (gzip.compress(table(",")), "named.csv: is a gzip file; add .gz to its name"),
    "named.jsonl": (zst(lines()), "named.jsonl: is a zstandard file; add .zst to its name"),
    "sheet.csv": (b"PK\x03\x04...", "sheet.csv: is a zip file, or a spreadsheet; unpack it, or save the sheet as CSV"),
    "page.json": (b"<!DOCTYPE HTML><html>", "page.json: is a page of HTML; download the file itself"),
    "lfs.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "lfs.jsonl: is a pointer of git-lfs, not the rows",
    ),
    "empty.json": (b" \n", "empty.json holds no rows"),
    "empty.json.gz": (gzip.compress(b""), "empty.json.gz holds no rows"),
    "blank.csv": (b"\n \n", "blank.csv holds no rows"),
    "late.csv": (b"\n\nprompt,completion\na,b,c\n", "late.csv:4: has 3 fields, the header has 2"),
    "lists.json": (
        b'{"train": [{"text": "a"}],\n "dev": [{"text": "b"}]}',
        "holds one object with several lists (train, dev)",
    ),
    "list.json": (b'{"data": [\n{"text": "a"}, 3]}', "list.json: item 2: holds a int, not an object"),
    "none.jsonl": (
        b"{}\n",
        "none.jsonl:1: has no fields, expected messages or prompt and completion or text; drop the row",
    ),
    "null.jsonl": (
        b'{"text": null}\n',
        "null.jsonl:1: text is null; give it a value, drop the row, or set data.on_bad_row",
    ),
    "a.csv": (table(",").replace("ü".encode(), b"\xfc"), "a.csv:5: is not UTF-8 text"),
    "b.csv": (b"prompt,completion\na,b\na,b,c\n", "b.csv:3: has 3 fields, the header has 2"),
    "c.csv": (b'prompt,completion\na,"b\nc,d\n', "c.csv:3: is not CSV (unexpected end of data)"),
    "d.csv": (b"prompt,completion,prompt\na,b,c\n", "d.csv:1: the header names 'prompt' twice"),
    "e.csv": (b"", "holds no rows"),
    "a.json": (json.dumps(ROWS).encode()[:-20], "a.json: is not JSON after item 2"),
    "b.json": (b'"text"', "starts with b'\"', not a list of rows"),
    "a.jsonl.gz": (gzip.compress(lines(ROWS * 99))[:-30], "is no whole gzip file after line"),
    "b.json.gz": (gzip.compress(json.dumps(ROWS * 99).encode())[:-30], "is no whole gzip file after item"),
    "c.csv.gz": (gzip.compress(table(",", ROWS * 99))[:-30], "is no whole gzip file after line"),
    "a.jsonl.zst": (zst(lines(ROWS * 99))[:-30], "is no whole zstandard file after line"),
    "b.jsonl.zst": (lines(), "is no whole zstandard file after line 0"),
    "a.parquet": (lines(), "is not a Parquet file, or damaged (it does not end as such a file does)"),
    "b.parquet": (b"", "is not a Parquet file, or damaged"),
    "a.arrow": (lines(), "is not an Arrow file, or damaged"),
    "b.arrow": (b"", "is not an Arrow file, or damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_costs_one_sentence_with_file_and_line(name, tmp_path):
    data, message = DAMAGED[name]
    (tmp_path / name).write_bytes(data)
    said = refusal(name, tmp_path)
    assert message in said and "\n" not in said and (name in said or "data.train" in said)


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("a.jsonl.gz", b'{"prompt": "', "a.jsonl.gz:1: is longer than 1 MiB"),
        ("a.json.gz", b'[{"prompt": "', "is not JSON after item 0 (an item is longer than 1 MiB)"),
        ("a.csv.gz", b"prompt,completion\n", "a.csv.gz:2: is longer than 1 MiB"),
        ("b.csv.gz", b'prompt,completion\na,"', "is not CSV (field larger than field limit"),
        ("a.jsonl.zst", b"", "a.jsonl.zst:1: is longer than 1 MiB"),
    ],
)
def test_a_line_without_an_end_is_not_unpacked(name, start, message, tmp_path, monkeypatch):
    """64 MB in 64 kB: the peak stays at some times the limit."""
    monkeypatch.setattr(streams, "LONGEST", 1 << 20)
    filler = (b"x" * 999 + b"\n") * 65_000 if name == "b.csv.gz" else b"x" * (64 << 20)
    (tmp_path / name).write_bytes(packed(name, start + filler))
    del filler
    tracemalloc.start()
    said = refusal(name, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in said and peak < 16 << 20, (said, peak)


FLIPPED = """
import random, sys
import pyarrow as pa
from pathlib import Path
from luthier.data import files
from luthier.support.errors import RecipeError
path, whole, rng = Path(sys.argv[1]), Path(sys.argv[1]).read_bytes(), random.Random(0)
read = files.READERS[path.suffix]
refused = 0
headers = [start + i for start in map(int, sys.argv[2:]) for i in range(24)]  # of the first pages
for i in range(400):
    at = rng.choice(headers) if headers and i % 2 else rng.randrange(len(whole))
    data = bytearray(whole)
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
        list(read(path))
    except RecipeError as error:
        refused += 1
        assert "\\n" not in str(error), str(error)
print(pa.default_memory_pool().max_memory(), refused)
"""


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_case_13_flipped_bits_cost_no_memory_and_end_in_a_sentence(form, tmp_path):
    """Alone in a process with 4 GB: a library that dies over the file would be seen, too."""
    rows = pa.Table.from_pylist([{"prompt": f"say {i}" * 3, "completion": "x" * (i % 50), "n": i} for i in range(200)])
    path = tmp_path / f"d.{form}"
    if form == "parquet":
        pq.write_table(rows, path, data_page_size=500)
        columns = [pq.ParquetFile(path).metadata.row_group(0).column(i) for i in range(3)]
        starts = [c.dictionary_page_offset for c in columns] + [c.data_page_offset for c in columns]
    else:
        starts = []
        with pa.ipc.new_file(str(path), rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(rows, max_chunksize=50)
    done = subprocess.run(
        [sys.executable, "-c", FLIPPED, str(path), *map(str, starts)], capture_output=True, text=True, timeout=100, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak, refused = map(int, done.stdout.split())
    assert peak < 64 << 20, f"Arrow asked for {peak >> 20} MiB"
    assert refused > 40, "damage is found"


def test_sizes_in_headers_are_those_of_the_library(tmp_path):
    """Our reading of Thrift's and Arrow's headers against pyarrow's."""
    rows = pa.Table.from_pylist([{"a": f"{i} " * (i % 9), "b": [i] * (i % 3), "c": i / 3} for i in range(5000)])
    pq.write_table(rows, tmp_path / "d.parquet", row_group_size=1500, data_page_size=1000)
    meta = pq.ParquetFile(tmp_path / "d.parquet").metadata
    data = (tmp_path / "d.parquet").read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    ours = list(parquet.columns_of(data[-8 - length : -8]))
    theirs = [meta.row_group(g).column(c) for g in range(meta.num_row_groups) for c in range(meta.num_columns)]
    assert len(ours) == len(theirs) == 12
    for one, other in zip(ours, theirs, strict=True):
        start = other.dictionary_page_offset if other.has_dictionary_page else other.data_page_offset
        sizes = (start, other.total_compressed_size, other.total_uncompressed_size, other.num_values)
        assert tuple(one) == sizes
        pages = list(parquet.pages(io.BytesIO(data), one))
        assert sum(p.header + p.packed for p in pages) == one.packed and sum(p.values for p in pages) == one.values
        assert sum(p.header + p.unpacked for p in pages) == one.unpacked
    with pa.ipc.new_stream(
        str(tmp_path / "d.arrow"), rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
    ) as writer:
        writer.write_table(rows, max_chunksize=2000)
    with (tmp_path / "d.arrow").open("rb") as file:
        found = list(arrow.packed_buffers(file, os.path.getsize(tmp_path / "d.arrow")))
    offsets = [4 * (n + 1) for n in (2000, 2000, 1000)]
    assert all(o in [b.unpacked for b in found] for o in offsets), "the buffers of offsets of the texts"
    assert all(b.unpacked == -1 or b.unpacked >= b.packed - 8 > 0 or b.packed == 8 for b in found), found


def test_a_page_that_says_more_than_its_column_is_refused(tmp_path):
    pq.write_table(pa.table({"a": ["x" * 90_000]}), tmp_path / "d.parquet", use_dictionary=False)
    data = (tmp_path / "d.parquet").read_bytes()
    (column,) = parquet.columns_of(data[-8 - int.from_bytes(data[-8:-4], "little") : -8])
    parquet._check_column(io.BytesIO(data), column, len(data))
    for changed in (
        column._replace(unpacked=column.unpacked - 80_000),
        column._replace(packed=len(data)),
        column._replace(values=2),
    ):
        with pytest.raises(ValueError, match="column|header"):
            parquet._check_column(io.BytesIO(data), changed, len(data))


def test_addresses_are_refused_as_such(tmp_path):
    with pytest.raises(RecipeError, match="https://example.org/x.jsonl is an address; download the file"):
        files.opened("https://example.org/x.jsonl", tmp_path, "data.train", "train")
