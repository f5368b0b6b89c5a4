"""Claims: read, measured with pauses, judged and recorded."""

import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from helpers.claims import CLAIM
from helpers.commands import luthier
from luthier.claims import claim as claims
from luthier.claims.claim import Claim, Condition, load, measured
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.statistics import estimate

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
from pathlib import Path
from beside import SHIFT
def measure(arm, seed, say):
    with Path("calls.txt").open("a") as f:
        f.write(f"{arm} {seed}\\n")
    return {"m": seed + 0.01 * seed * (arm == "better") + SHIFT * (arm == "better")}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/thing.yaml").write_text(CLAIM)
    (tmp_path / "claims/thing.py").write_text(EXPERIMENT)
    (tmp_path / "claims/beside.py").write_text("SHIFT = 1.0\n")
    return tmp_path


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines()


def test_a_claim_is_measured_once_and_recorded(folder):
    done = luthier("claim", "thing", "--record", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["thing"]
    (condition,) = result["conditions"]
    assert result["verdict"] == condition["outcome"] == "held" and result["seeds"] == 3
    by_hand = estimate(np.array([[1.0], [1.01], [1.02]]))
    assert (condition["mean"], condition["low"]) == pytest.approx((by_hand.value, by_hand.low), rel=1e-4)
    assert calls(folder) == ["base 0", "better 0", "base 1", "better 1", "base 2", "better 2"]
    assert "# A remark that stays." in (folder / "claims/thing.yaml").read_text()
    recorded = load(folder / "claims/thing.yaml").measured
    assert recorded is not None and recorded["verdict"] == "held"
    luthier("claim", "thing", cwd=folder)
    assert len(calls(folder)) == 6, "what is done is read"
    luthier("claim", "--tier", "tiny", "--fresh", cwd=folder)
    assert len(calls(folder)) == 12


class OneThread(ThreadPoolExecutor):
    """In place of processes, which take seconds to start."""

    def __init__(self, processes, context, initializer, arguments):
        super().__init__(1)


@pytest.mark.parametrize(
    "executor",
    [OneThread, pytest.param(ProcessPoolExecutor, marks=pytest.mark.soak)],
    ids=["thread", "processes"],
)
def test_seeds_side_by_side_give_the_same_and_what_is_stored_says_where_it_was_measured(executor, folder, monkeypatch):
    monkeypatch.setattr(claims, "ProcessPoolExecutor", executor)
    done = luthier("claim", "thing", "--processes", "2", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["thing"]
    assert result["verdict"] == "held" and result["machine"] == claims.machine()
    assert sorted(calls(folder)) == sorted(f"{arm} {seed}" for arm in ("base", "better") for seed in range(3))
    for file in (folder / "runs/claims/thing").glob("*-2-*.json"):  # as if one seed had come from elsewhere
        file.write_text(json.dumps({**json.loads(file.read_text()), "machine": "a GPU"}))
    assert claims.run("thing")["machine"] == f"a GPU; {claims.machine()}" and len(calls(folder)) == 6


def test_another_experiment_is_measured_again(folder):
    luthier("claim", "thing", cwd=folder)
    (folder / "claims/beside.py").write_text("SHIFT = 0.000\n")
    done = luthier("claim", "thing", cwd=folder)
    assert len(calls(folder)) == 12 and "thing: not held" in done.stdout


def test_what_other_experiments_import_changes_nothing(folder):
    luthier("claim", "thing", cwd=folder)
    (folder / "claims/other.py").write_text("x = 1\n")
    luthier("claim", "thing", cwd=folder)
    assert len(calls(folder)) == 6


def test_interrupted_it_goes_on(folder):
    (folder / "claims/thing.py").write_text(
        EXPERIMENT.replace("    return", "    if seed == 1 and not Path('ok').exists(): 1 / 0\n    return")
    )
    with pytest.raises(ZeroDivisionError):
        claims.run("thing")
    Path("ok").write_text("")
    assert claims.run("thing")["verdict"] == "held"
    assert calls(folder).count("base 0") == 1


@pytest.mark.parametrize(
    ("bounds", "values", "outcome"),
    [
        ({"at_least": 0.5}, [1.0, 1.1, 0.9], "held"), ({"at_least": 0.5}, [0.1, 0.2, 0.15], "not held"),
        ({"at_least": 0.5}, [0.2, 0.9, 0.5], "inconclusive"), ({"at_most": 0.5}, [0.1, 0.2, 0.15], "held"),
        ({"at_most": 0.5}, [1.0, 1.1, 0.9], "not held"), ({"at_most": 0.5}, [0.2, 0.9, 0.5], "inconclusive"),
        ({"at_least": 1.0}, [1.0, 1.0, 1.0], "held"), ({"at_most": 0.0}, [0.0, 0.0, 0.0], "held"),
    ],
)  # fmt: skip
def test_conditions(bounds, values, outcome):
    condition = Condition(says="", measure="m", arm="a", **bounds)
    assert condition.outcome(estimate(np.array(values)[:, None])) == outcome


def test_all_conditions_must_hold():
    claim = Claim(method="x", claim="", source="", tier="tiny", arms=("a", "b"), conditions=(
        Condition(says="level", measure="m", arm="a", at_least=0.0),
        Condition(says="ratio", measure="m", arm="a", against="b", factor=2.0, at_most=0.0)))  # fmt: skip
    found = {"a": {s: {"m": 1.0 + 0.01 * s} for s in range(3)}, "b": {s: {"m": 0.6} for s in range(3)}}
    result = measured(claim, found, 1.0)
    assert [c["outcome"] for c in result["conditions"]] == ["held", "held"] and result["verdict"] == "held"
    assert result["conditions"][1]["seeds"] == pytest.approx([-0.2, -0.19, -0.18])
    worse = {**found, "b": {s: {"m": 0.1} for s in range(3)}}
    assert measured(claim, worse, 1.0)["verdict"] == "not held"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds: 3", "seeds: 1", "thing.yaml:7: seeds"),
        ("tier: tiny", "tier: huge", "thing.yaml:5: tier"),
        ("arm: better", "arm: best", "names the arm 'best'"),
        ("at_least: 0.5", "at_leat: 0.5", "thing.yaml:9: conditions.0"),
        ("at_least: 0.5", "at_least: 0.5, at_most: 1", "write at_least or at_most"),
    ],
)
def test_a_faulty_claim_is_refused_with_its_line(folder, old, new, words):
    (folder / "claims/thing.yaml").write_text(CLAIM.replace(old, new))
    said = luthier("claim", "thing", cwd=folder)
    assert said.returncode == 2 and words in said.stderr, said.stderr


def test_what_is_not_there_is_said(folder):
    for words, message in (
        (("nothing",), "known are thing"),
        ((), "name one, or give --tier"),
        (("--tier", "huge"), "there are tiny, small, gpu"),
    ):
        said = luthier("claim", *words, cwd=folder)
        assert said.returncode == 2 and message in said.stderr
    (folder / "claims/thing.py").unlink()
    with pytest.raises(LuthierError, match="no experiment for this claim"):
        claims.run("thing")
    with pytest.raises(RecipeError, match="there is no such claim; known are thing"):
        load(folder / "claims/none.yaml")
    with pytest.raises(
        RecipeError, match="there is no such claim; claims are in the folder claims of a clone of luthier"
    ):
        load(folder / "elsewhere/none.yaml")


@pytest.mark.parametrize("name", claims.names(ROOT / "claims"))
def test_every_claim_of_ours_has_its_experiment_and_its_method(name, monkeypatch):
    from luthier.method import registry as manifest

    claim = load(ROOT / f"claims/{name}.yaml")
    module = claims.experiment(name, ROOT / "claims")
    listed = YAML(typ="safe", pure=True).load((ROOT / "claims/methods.yaml").read_text(encoding="utf-8"))
    known = {m["name"] for m in manifest.read()} | {m["name"] for m in listed if "code" in m}
    assert callable(module.measure) and claim.method in known and claim.seeds >= 5
    if claim.measured is not None:
        assert claim.measured["machine"] and claim.measured["date"]
        again = measured(claim, _found(claim), 0.0)
        assert again["verdict"] == claim.measured["verdict"], "the verdict follows from the numbers beside it"


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", [n for n in claims.names(ROOT / "claims") if load(ROOT / f"claims/{n}.yaml").tier == "tiny"]
)
def test_a_short_claim_of_ours_can_be_measured(name, monkeypatch):
    claim = load(ROOT / f"claims/{name}.yaml")
    module = claims.experiment(name, ROOT / "claims")
    asked = {c.measure for c in claim.conditions if c.arm == claim.arms[0]}
    assert asked <= set(module.measure(claim.arms[0], 0, lambda text: None))


def _found(claim):
    values = claim.measured["values"]
    return {
        a: {s: {m: v[s] for m, v in by.items()} for s in range(claim.measured["seeds"])} for a, by in values.items()
    }


def test_the_evidence_page_has_a_row_for_each_of_the_forty_eight():
    page = claims.evidence(ROOT / "claims")
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and any(code in line for code in ("](methods/", "](howto/", "no code yet"))
    ]
    assert len(rows) == 48
    assert (ROOT / "docs/evidence.md").read_text(encoding="utf-8") == page, "run make docs"
