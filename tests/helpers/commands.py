"""The command line as users type it, and a small recipe with its rows."""

import contextlib
import io
import json
import os
import subprocess
import sys

from ruamel.yaml import YAML

LUTHIER = [sys.executable, "-c", "from luthier.cli import main; main()"]


def rows(n, start=0):
    return [{"prompt": f"say {i}", "completion": f"{i} {i}"} for i in range(start, start + n)]


def write(folder, model, train=None, held=None, **keys):
    folder.mkdir(exist_ok=True)
    lines = lambda items: "".join(json.dumps(x) + "\n" for x in items)  # noqa: E731
    (folder / "train.jsonl").write_text(lines(train if train is not None else rows(24)))
    (folder / "eval.jsonl").write_text(lines(held if held is not None else rows(6, 100)))
    recipe = {
        "model": model, "data": {"train": "train.jsonl", "eval": "eval.jsonl"}, "batch_size": 4, "learning_rate": 0.01,
        "tuner": {"lora": {"rank": 4}}, "output_dir": "out",
        "evaluate": [{"exact-match": {"rows": 3, "max_new_tokens": 6}}], **keys,
    }  # fmt: skip
    with (folder / "r.yaml").open("w") as file:
        YAML().dump(recipe, file)
    return folder / "r.yaml"


def luthier(*args, cwd, **env):
    """The command line: in this process, or in one of its own where the environment differs."""
    words = list(map(str, args))
    if env:
        return subprocess.run(
            [*LUTHIER, *words], cwd=cwd, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **env}
        )  # fmt: skip
    from luthier.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    before, argv = os.getcwd(), sys.argv
    try:
        os.chdir(cwd)
        sys.argv = ["luthier", *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        os.chdir(before)
        sys.argv = argv
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
