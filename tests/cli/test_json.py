"""Every command has -h and --json, and docs/howto/scripting.md names the keys of each value."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from helpers.claims import CLAIM
from helpers.collaborations import NAMES, recipe
from helpers.commands import luthier, rows, write
from luthier.claims import claim as claims
from luthier.cli.shared import to_json
from luthier.evaluation import forgetting, lm_eval

main = importlib.import_module("luthier.cli.main")  # the package has a function of this name
PAGE = Path(__file__).parents[2] / "docs/howto/scripting.md"


def commands(group=None, above=""):
    """Name -> command, of all commands."""
    out = {}
    for name, command in (group or typer.main.get_command(main.app)).commands.items():
        out |= commands(command, f"{name} ") if hasattr(command, "commands") else {f"{above}{name}": command}
    return out


def documented():
    """Command -> its keys."""
    lines = re.findall(r"^\| (`[^|]*`) \| [^|]* \| ([^|]*)\|$", PAGE.read_text(), re.MULTILINE)
    return {
        name: re.findall("`([a-z_]+)`", keys.split(";")[0])
        for names, keys in lines
        for name in re.findall("`([^`]+)`", names)
    }


def test_every_command_is_documented_and_has_both_options(tmp_path):
    found = commands()
    assert len(found) > 20
    for name, command in found.items():
        options = {o for p in command.params for o in p.opts}
        assert "--json" in options or name == "schema", name
        done = luthier(*name.split(), "-h", cwd=tmp_path)
        assert done.returncode == 0 and "Usage: luthier" in done.stdout and done.stderr == "", name
    named = {n for n in documented() if "--" not in n}
    assert named == found.keys() - {"schema", "train"}  # train is another name of run


@pytest.fixture(scope="module")
def told(model_folder, tmp_path_factory):
    """Command -> what it prints with --json."""
    folder = tmp_path_factory.mktemp("json")
    ask = {"exact-match": {"rows": 1, "max_new_tokens": 2}}
    path, out = write(folder, model_folder, train=rows(12), max_steps=1, evaluate=[ask]), {}
    (folder / "claims").mkdir()
    (folder / "claims/thing.yaml").write_text(CLAIM)
    values = {"base": {s: {"m": float(s)} for s in range(3)}, "better": {s: {"m": s + 0.9} for s in range(3)}}
    measured = claims.measured(claims.load(folder / "claims/thing.yaml"), values, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "run", lambda *a, **k: measured)
        patch.setattr(lm_eval, "names_of_lm_eval", lambda: ["hellaswag"])
        questions = forgetting.built_in
        patch.setattr(forgetting, "built_in", lambda name: questions(name)[:3])
        for words in (
            ("run", path), ("check", path), ("generate", "out", "say 7", "--max-new-tokens", 2), ("evaluate", "out"),
            ("curate", path, "curate=[random: {keep_fraction: 0.5}]"), ("export", "out", "hf"),
            ("merge", "out", "copy", "-o", "both"), ("inspect", "out"), ("claim", "thing"),
            ("pictures", "out"), ("methods",), ("env",),
            ("compare", path, "~output_dir", "--vary", "tuner=lora,full", "--seeds", 1, "--no-search", "--processes", 0),
        ):  # fmt: skip
            if words[0] == "merge":
                shutil.copytree(folder / "out", folder / "copy")
            out[words[0]] = said(words, folder)
        out["methods --matrix"] = said(("methods", "lemo", "--matrix"), folder)
        shown = {}
        patch.setattr(main, "_carry_out", lambda *a: shown.update(as_json=a[5]))
        luthier("demo", "--json", cwd=folder)
    assert shown == {"as_json": True}, "it prints what run prints"
    return out


@pytest.fixture(scope="module")
def told_together(tmp_path_factory):
    """The same for the commands of collaborations; those that take long or use the network are cut short."""
    from luthier.demos import private
    from luthier.federation import network, provider

    folder, out = tmp_path_factory.mktemp("together"), {}
    recipe(folder, collaborate={"one-shot": {}})
    files = [f"{n}.jsonl" for n in NAMES[:2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provider, "make_shadows", lambda *_: (folder / "c/shadows").mkdir())
        patch.setattr(provider, "open_provider", lambda _: None)
        patch.setattr(provider, "judge", lambda *_: {"judged": {}, "sets": 3, "verdict": "none", "spread": math.inf})
        patch.setattr(network, "serve", lambda *_: None)
        patch.setattr(network, "join", lambda *_: Path("given"))
        patch.setattr(private, "demo", lambda *_: Path("report.html"))
        for words in (
            ("contract", "r.yaml", "c"), ("shadow", "c"), ("translator", "c"),
            ("tune", "c", files[0], "--name", NAMES[0], "--canaries", 3, "--others", 7),
            ("translate", "c", f"{NAMES[0]}.message"), ("split", "public.jsonl", "parts", "--clients", 2),
            ("serve", "c", "--clients", NAMES[0]), ("join", "c", files[0], "--name", NAMES[0]), ("demo",),
            ("simulate", "c", *(f"{n}={n}.jsonl" for n in NAMES[:2]), "--held", 0.5),
        ):  # fmt: skip
            out[f"collaborate {words[0]}"] = said(("collaborate", *words), folder)
    return out


def said(words, folder):
    done = luthier(*words, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "one line"
    return json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{words}: {name} is no JSON"))


def first(value):
    """The object whose keys are documented: the value, or the first one of several."""
    return value[0] if isinstance(value, list) else value


def test_values_have_the_documented_keys(told):
    keys = documented()
    for name, value in told.items():
        value = next(iter(value.values())) if name in ("evaluate", "claim") else first(value)
        if name == "pictures":
            assert Path(value).suffix == ".png"
        else:
            assert set(keys[name]) <= value.keys(), name
    assert keys["demo"] == keys["run"] and told["run"]["state"] == "done"


def test_values_of_collaborations_have_the_documented_keys(told_together):
    keys = documented()
    for name, value in told_together.items():
        assert keys[name] and set(keys[name]) <= value.keys(), name
    assert told_together["collaborate translator"]["spread"] is None
    assert told_together["collaborate tune"]["message"] == f"{NAMES[0]}.message"


def test_all_commands_are_tried(told, told_together):
    elsewhere = {"compare --dry-run"}  # tests/cli/test_compare.py
    assert {*told, *told_together, "demo"} == set(documented()) - elsewhere


def test_a_number_that_json_does_not_have_is_null():
    value = {"a": [math.nan, 1.5, (math.inf, "é")], 2: {"b": -math.inf}}
    assert json.loads(to_json(value)) == {"a": [None, 1.5, [None, "é"]], "2": {"b": None}} and "é" in to_json(value)
    with pytest.raises(TypeError):
        to_json(SimpleNamespace())
