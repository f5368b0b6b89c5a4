"""The recipe that `luthier methods NAME` prints runs as it stands, on a model and rows of the user."""

import json

import pytest

from luthier import recipe
from luthier.cli.listing import editor_line, starter
from luthier.federation.folder import refuse_unread
from luthier.method import registry
from luthier.method.kinds import KINDS
from luthier.run.execute import run
from luthier.testing.models import byte_tokenizer, tiny, word_tokenizer

RUN = ("tuner", "objective", "compute", "pipeline", "curate", "decode", "task")
ENTRIES = [e for e in registry.read() if e["kind"] in RUN]
SHORT = {"list": ["pipeline.list.unlabelled_steps=1", "pipeline.list.labelled_epochs=1", "pipeline.list.rank=2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder and an encoder of every task, and the files that starters name."""
    place = tmp_path_factory.mktemp("starters")
    words = word_tokenizer()
    models = {"bytes": (tiny(layers=2, vocab_size=260, max_position_embeddings=512), byte_tokenizer()),
              "words": (tiny("bert", layers=2, vocab_size=len(words)), words)}  # fmt: skip
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    asked = [{"prompt": f"say {i}", "completion": f"{i} {i}"} for i in range(8)]
    texts = ["the film was great", "it was terrible", "a great cat", "a terrible mat"] * 3
    labelled = [{"text": t, "label": "good" if "great" in t else "bad", "soft": [0.25, 0.75]} for t in texts]
    pool = [{"text": f"{t} and the dog"} for t in texts]
    files = {"asked": asked, "train": labelled, "test": labelled[:4], "pool": pool}
    for name, rows in files.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("train", "test"):
        (place / f"{name}.conll").write_text("the O\nfilm B-X\n\na O\nlong B-X\nday I-X\n\n" * 4)
    return place


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['kind']}-{e['name']}")
def test_a_starter_runs(entry, folder, tmp_path):
    text = starter(entry)
    assert "FILL" not in text
    encoder = any(mark in text for mark in ("masked-lm", "words:", "token-classification"))
    text = text.replace("builtin:requests", "asked.jsonl")
    changed = [f"model={folder / ('words' if encoder else 'bytes')}", "evaluate=[]", *SHORT.get(entry["name"], [])]
    short = ["pace.max_steps=1"] if "pipeline:" in text else ["max_steps=2", "batch_size=2", "learning_rate=0.01"]
    loaded = recipe.load(text, "starter", [*changed, *short], base=folder)
    done = run(loaded, tmp_path / "out", folder, forecast=False)
    assert done["state"] == "done" and done["trained_weights"] > 0


def test_every_other_starter_loads_or_is_a_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "passages.jsonl").write_text('{"doc_id": "a", "text": "some words"}\n')
    for entry in registry.read():
        text = starter(entry)
        if KINDS[entry["kind"]].command is None:
            loaded = recipe.load(f"{editor_line()}\n{text}")
            if loaded.collaborate is not None:
                refuse_unread(loaded)
        else:
            assert text.startswith("luthier ") and "FILL" not in text
