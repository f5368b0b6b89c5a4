"""Tiny encoders and decoders over words, saved as users have them, and a way to call the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from luthier.testing.models import tiny, word_tokenizer


def saved(folder: Path, kind: str) -> str:
    tokenizer = word_tokenizer()
    ends: dict[str, Any] = {
        "bos_token_id": 2,
        "eos_token_id": 3,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    tiny(kind, vocab_size=len(tokenizer), layers=2, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("decoder"), "llama")


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch):
    """command(*words, cwd=folder): luthier, in this process."""

    def call(*words: Any, cwd: Path) -> Done:
        from luthier.cli.main import app
        from luthier.support.errors import LuthierError

        monkeypatch.chdir(cwd)
        done = CliRunner().invoke(app, [str(w) for w in words])
        if done.exception is not None and not isinstance(done.exception, (SystemExit, LuthierError)):
            raise done.exception
        error = str(done.exception) if isinstance(done.exception, LuthierError) else done.stderr
        return Done(done.exit_code, done.stdout, error)

    return call


@pytest.fixture
def write(tmp_path):
    """write(model, train=rows, eval=rows, pool=rows, **keys): a recipe with its files."""

    def make(model: str, files: dict[str, list[dict[str, Any]]], **keys: Any) -> Path:
        for name, rows in files.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        recipe = {"model": model, "data": {n: f"{n}.jsonl" for n in files}, "output_dir": "out", **keys}
        with (tmp_path / "r.yaml").open("w") as file:
            YAML().dump(recipe, file)
        return tmp_path / "r.yaml"

    return make
