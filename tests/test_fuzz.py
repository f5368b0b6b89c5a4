"""Damaged input of every sort: an answer in one sentence, never a traceback of another kind, a hang, or a flood of memory.

Seeded; `LUTHIER_FUZZ=20` multiplies the cases (make soak).
"""

import copy
import json
import os
import random
import resource

import pytest
import torch

from luthier import recipe
from luthier.data.prepare import prepare
from luthier.data.reading import read
from luthier.data.rendering import Renderer
from luthier.model.loading import locate
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, byte_tokenizer, rows_of, view_of
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel
from luthier.update.files import load, save_update

MANY = int(os.environ.get("LUTHIER_FUZZ", "1"))
NASTY: list[object] = [
    None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, "", "\x00", "a" * 5000, [], {}, [[]], {"": {}},
    "!!python/name:os.system",
    "${HOME}", "../../etc/passwd",
    {"lora": None}, {"lora": {"rank": "x"}}, ["a", 1, None], "1e-3", "on", "NO", "12:30:45", "\ud800", "💥",
]  # fmt: skip
RECIPE = {
    "luthier": 1, "model": "org/name", "data": {"train": "x.jsonl", "eval": "y.jsonl", "columns": {"prompt": "q"}},
    "tuner": {"spiel": {"density": 0.1}}, "objective": {"q-tuning": {"keep_rows": 0.5}},
    "curate": [{"scdp": {"keep_fraction": 0.5}}],
    "learning_rate": 0.001, "evaluate": [{"exact-match": {"rows": 3}}, "rouge"], "report_to": ["none"], "compute": {"lemo": {}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def memory_stays_low():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


def paths(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from paths(value, (*path, key))


def mutated(tree, rng):
    """A copy with one to three places exchanged, removed, doubled or renamed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([p for p in paths(tree) if p] or [("x",)])
        at = tree
        for key in path[:-1]:
            at = at[key]
        action = rng.randrange(4)
        if action == 0 or isinstance(at, list):
            at[path[-1]] = copy.deepcopy(rng.choice(NASTY))
        elif action == 1:
            at.pop(path[-1], None)
        elif action == 2:
            at[str(path[-1])[::-1] or "k"] = copy.deepcopy(at.get(path[-1]))
        else:
            at[rng.choice(["alpha", "0", "", "é", "token"])] = copy.deepcopy(rng.choice(NASTY))
    return tree


def broken_text(text, rng):
    """Characters exchanged, cut or doubled."""
    chars = list(text)
    for _ in range(rng.randint(1, 6)):
        i = rng.randrange(len(chars) + 1)
        chars[i : i + rng.randint(0, 3)] = rng.choice(
            ["", "\t", ":", "{", "]", "&a", "*a", "!!int", "\x00", "- ", '"', "\n", "%", "💥"]
        )
    return "".join(chars)


def survives(call):
    """True where it worked, False where it answered with our own error; anything else is a failure."""
    try:
        call()
    except LuthierError as error:
        text = str(error)
        assert text and "\nTraceback" not in text
        return False
    return True


def test_recipes():
    rng = random.Random(0)
    good = sum(survives(lambda: recipe.load(json.dumps(mutated(RECIPE, rng)))) for _ in range(1500 * MANY))
    assert 0 < good < 1500 * MANY
    from io import StringIO

    from ruamel.yaml import YAML

    stream = StringIO()
    YAML().dump(RECIPE, stream)
    for _ in range(700 * MANY):
        survives(lambda: recipe.load(broken_text(stream.getvalue(), rng)))


def test_a_laughing_recipe_is_refused():
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    assert not survives(lambda: recipe.load(bomb))
    assert not survives(lambda: recipe.load("a: " + "[" * 3000))
    assert not survives(lambda: recipe.load("a:\n" + "".join(f"{' ' * i}b:\n" for i in range(1, 300))))


def test_overrides():
    rng = random.Random(1)
    parts = ["tuner", "lora", "rank", "", "data", "~", "=", "x", "[1", "{", "1e-3", "..", "learning_rate", "\x00"]
    for _ in range(700 * MANY):
        text = ".".join(rng.choices(parts, k=rng.randint(1, 4))) + rng.choice(["=", "=8", "=[", "", "=&a"])
        survives(lambda text=text: recipe.load("model: a/b\ndata: {train: x}\n", "r", [text]))


def test_rows(tmp_path):
    rng, renderer = random.Random(2), Renderer(byte_tokenizer())
    rows = [
        {"prompt": "a", "completion": "b"}, {"text": "c"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]  # fmt: skip
    for _ in range(800 * MANY):
        row = rng.choice(rows)
        text = json.dumps(mutated(row, rng))
        if rng.random() < 0.3:
            text = broken_text(text, rng)
        (tmp_path / "d.jsonl").write_text(text + "\n" + json.dumps(row), encoding="utf-8", errors="surrogatepass")

        def use():
            prepare(read("d.jsonl", {}, tmp_path)[0], renderer, max_length=200)

        survives(use)


@pytest.fixture
def saved(tmp_path):
    for name, tuner in (("lora", Lora(rank=2)), ("sparse", Spiel(density=0.02))):
        view = view_of()
        save_update(tuner.attach(view, total_steps=5).update(), tmp_path / name, view)
    return tmp_path


def flipped(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        i = rng.randrange(min(len(data), rng.choice([16, 400, len(data)])))
        data[i] = rng.choice([0, 255, data[i] ^ (1 << rng.randrange(8))])
    return bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data) + 1)])])


@pytest.mark.parametrize("name", ["lora", "sparse"])
def test_updates(saved, name):
    rng, view, folder = random.Random(3), view_of(), saved / name
    files = {f: f.read_bytes() for f in folder.iterdir() if f.suffix in (".json", ".safetensors")}
    batch = batch_of((5,))

    def use():
        with load(folder).bind(view) as tuned:
            tuned.trace(batch)

    assert survives(use)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    for _ in range(250 * MANY):
        file = rng.choice(list(files))
        if file.suffix == ".json" and rng.random() < 0.7:
            file.write_text(json.dumps(mutated(json.loads(files[file]), rng)), errors="surrogatepass")
        else:
            file.write_bytes(flipped(files[file], rng))
        survives(use)
        file.write_bytes(files[file])
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())
    assert not any("forward" in vars(m) for m in view.module.modules())


def test_checkpoints(tmp_path):
    rng, view = random.Random(4), view_of()
    loop = Loop(
        view, rows_of(), Lora(rank=2).attach(view), Sft(), TrainSettings(max_steps=3, batch_size=4), folder=tmp_path
    )
    loop.step()
    loop.save()
    files = {f: f.read_bytes() for f in (tmp_path / "checkpoint-1").iterdir()}
    for _ in range(200 * MANY):
        file = rng.choice(list(files))
        file.write_bytes(flipped(files[file] or b"\0", rng))
        survives(loop.resume)
        file.write_bytes(files[file])


def test_gguf_headers(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    rng = random.Random(5)
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") + (2).to_bytes(8, "little") + os.urandom(200)
    for _ in range(15 * MANY):
        (tmp_path / "m.gguf").write_bytes(flipped(head, rng))
        assert not survives(lambda: locate(str(tmp_path / "m.gguf")))
