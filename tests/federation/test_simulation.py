"""`luthier collaborate simulate`: alone, together and shared are what they are called, and finished work is kept."""

import json
import shutil

import pytest
import torch

from helpers.collaborations import recipe
from helpers.commands import luthier
from luthier.collaboration.averaging import averaged
from luthier.collaboration.messages import Refused
from luthier.collaboration.one_shot import AverageServer
from luthier.demos.private import NAMES
from luthier.federation import simulation
from luthier.federation.folder import Workspace
from luthier.federation.simulation import simulate
from luthier.federation.simulation_page import ALONE, SHARED, TOGETHER, UNTOUCHED
from luthier.inference.scoring import mean_loss, row_scores
from luthier.support.errors import LuthierError
from luthier.update.files import load

TWO = NAMES[:2]


def words(*more):
    return ("collaborate", "simulate", "c", *[f"{n}={n}.jsonl" for n in TWO], "--held", 0.5, *more)


def contract(folder, protocol, **changes):
    recipe(folder, collaborate=protocol, **changes)
    done = luthier("collaborate", "contract", "r.yaml", "c", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = contract(tmp_path_factory.mktemp("simulated"), "one-shot")
    done = luthier(*words(), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "run     5 of 5: all rows in one place; 0 s left" in done.stderr and "together" in done.stdout
    return folder


def found(folder):
    return json.loads((folder / "simulated/found.json").read_text())


def test_alone_together_and_shared_are_what_they_are_called(simulated):
    workspace, out = Workspace(simulated / "c"), simulated / "simulated"
    alone = {n: load(out / "alone" / n) for n in TWO}
    together = [load(out / "together" / n).dense() for n in TWO]
    expected = averaged(alone, dict.fromkeys(TWO, 1)).dense()
    for got in together:
        assert max(float((got[k] - expected[k]).abs().max()) for k in expected) < 1e-6
    shared = load(out / "shared").dense()
    assert max(float((shared[k] - expected[k]).abs().max()) for k in expected) > 1e-6
    held = {n: simulation._split(workspace, n, str(simulated / f"{n}.jsonl"), 0.5).held for n in TWO}
    for name in TWO:
        with alone[name].bind(workspace.first):
            assert found(simulated)["losses"][ALONE][name] == pytest.approx(
                mean_loss(row_scores(workspace.first, held[name], 10**4))
            )
    assert list(found(simulated)["losses"]) == [UNTOUCHED, ALONE, TOGETHER, SHARED]


def test_rows_that_one_is_judged_on_are_not_tuned_on(simulated):
    client = simulation._split(Workspace(simulated / "c"), TWO[0], str(simulated / f"{TWO[0]}.jsonl"), 0.5)
    keys = [{json.dumps(r["ids"]) + str(r["key"]) for r in rows} for rows in client]
    assert len(client.rows) == len(client.held) == 4 and not keys[0] & keys[1]


def test_the_page_shows_arrivals_and_the_way_to_the_mean(simulated):
    f, page = found(simulated), (simulated / "simulated/report.html").read_text()
    assert [a["client"] for a in f["arrivals"]] == sorted(TWO) and [x for x, _ in f["line"]][:2] == [0.0, 0.25]
    assert f["line"][0][1] == pytest.approx(sum(f["everybody"][UNTOUCHED].values()) / 2)
    one = dict(map(tuple, f["line"]))[1.0]
    assert one == pytest.approx(f["arrivals"][-1]["loss"]) == pytest.approx(sum(f["losses"][TOGETHER].values()) / 2)
    for said in ("As they arrive", "Alone, together, shared", "How much each client counts", TWO[0]):
        assert said in page


def test_what_is_finished_is_not_made_again_and_other_rows_are_refused(simulated, tmp_path):
    shutil.copytree(simulated, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/simulated/shared")
    done = luthier(*words("--json"), cwd=tmp_path / "copy")
    assert done.returncode == 0 and done.stderr.count("made before") == 3, done.stderr
    assert json.loads(done.stdout)["losses"] == found(simulated)["losses"]
    again = luthier(*words(), "--held", 0.4, cwd=simulated)
    assert again.returncode == 2 and "holds a simulation of other rows" in again.stderr


def test_killed_between_messages_it_goes_on_with_what_had_arrived(simulated, tmp_path):
    """Two rounds; the third message never comes, the same call makes what is left."""
    folder = contract(tmp_path, {"one-shot": {"rounds": 2}})
    workspace, files = Workspace(folder / "c"), {n: str(folder / f"{n}.jsonl") for n in TWO}
    said = []

    def stop(text):
        said.append(text)
        if "round 2" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(workspace, files, 0.5, folder / "out", stop)
    assert len(list((folder / "out/arrived").glob("*"))) >= 3
    again = []
    simulate(workspace, files, 0.5, folder / "out", again.append)
    (tmp_path / "whole").mkdir()
    whole = contract(tmp_path / "whole", {"one-shot": {"rounds": 2}})
    simulate(Workspace(whole / "c"), files, 0.5, whole / "out")
    one, other = (load(f / "out/together" / TWO[0]).dense() for f in (folder, whole))
    assert all(torch.equal(one[k], other[k]) for k in one) and "3 messages have arrived" in "".join(again)


def test_a_client_whose_update_is_refused_is_named(simulated, monkeypatch):
    def accept(self, message):
        if message.header.sender == TWO[1]:
            raise Refused("not-finite", "a value")

    monkeypatch.setattr(AverageServer, "accept", accept)
    done = luthier(*words("--output", "refused"), cwd=simulated)
    assert done.returncode == 2 and f"the server refuses {TWO[1]}: not-finite: a value" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((f"{TWO[0]}=x.jsonl",), "is given twice"),
        (("--output", "o", "--held", 0.01), "rows would be held out"),
        (("--output", "o", "x"), "write name=path, for example clinic=clinic.jsonl"),
        (("--output", "o", "a/b=x.jsonl"), "cannot be the name of a party"),
        (("--output", "o", "third=no.jsonl"), "no.jsonl"),
    ],
)
def test_faults_are_said_first(simulated, more, says):
    done = luthier(*words(*more), cwd=simulated)
    assert done.returncode == 2 and says in done.stderr, done.stderr


def test_too_few_rows_are_refused_by_name(simulated):
    with pytest.raises(LuthierError, match=f"{TWO[0]}: 0 of"):
        simulate(Workspace(simulated / "c"), {TWO[0]: str(simulated / f"{TWO[0]}.jsonl")}, 0.0, simulated / "none")
