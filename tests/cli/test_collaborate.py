"""`luthier collaborate`: every role by its command, killed in the middle, with bad messages and a shut gate."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoTokenizer

from helpers.collaborations import recipe
from helpers.commands import LUTHIER, luthier
from luthier import recipe as recipes
from luthier.collaboration.averaging import averaged
from luthier.collaboration.messages import Message, decode
from luthier.collaboration.wire import unpacked
from luthier.demos.private import NAMES
from luthier.federation.client import public_payloads
from luthier.federation.folder import LIMIT, Workspace
from luthier.federation.provider import _side_by_side, make_shadows, open_provider
from luthier.federation.server import write_so_far
from luthier.model.loading import locate
from luthier.support.errors import LuthierError
from luthier.update.files import load


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roles")
    recipe(folder)
    done = luthier("collaborate", "contract", "r.yaml", "c", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = luthier("collaborate", "shadow", "c", "--processes", 1, cwd=folder)
    assert done.returncode == 0 and "11 more sets of 8 rows" in done.stderr, done.stderr
    return folder


def tune(folder, name, *more):
    return luthier("collaborate", "tune", "c", f"{name}.jsonl", "--name", name, "--canaries", 0, *more, cwd=folder)


def test_a_contract_is_pinned_and_made_once(agreed):
    stored = json.loads((agreed / "c/contract.json").read_text())
    assert stored["digest"] == Workspace(agreed / "c").contract.digest and "public" not in json.dumps(stored)
    again = luthier("collaborate", "contract", "r.yaml", "c", cwd=agreed)
    assert again.returncode == 2 and "holds a contract already" in again.stderr


@pytest.mark.parametrize(
    ("change", "template", "words"),
    [
        (lambda t: t.add_tokens(["new"]), "plain", "has other tokens than `model`"),
        (lambda t: setattr(t, "chat_template", "{{ messages }}"), "auto", "has another chat template than `model`"),
        (lambda t: setattr(t, "chat_template", "{{ messages }}"), "plain", ""),
    ],
)
def test_models_that_would_read_rows_otherwise_are_refused(change, template, words, tmp_path):
    path = recipe(tmp_path, data={"train": "public.jsonl", "template": template})
    large = YAML().load(path)["collaborate"]["grad-transformer"]["large"]
    shutil.copytree(large, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(large)
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path / "other")
    changed = "collaborate.grad-transformer.large=other"
    done = luthier("collaborate", "contract", "r.yaml", "c", changed, cwd=tmp_path)
    assert done.returncode == (2 if words else 0) and words in done.stderr, done.stderr
    assert (tmp_path / "c").exists() == (not words)


@pytest.mark.parametrize(
    "words",
    ["objective=q-tuning", "dtype=bfloat16", "data.limit=5", "save_steps=3", "curate=[{random: {keep_fraction: 0.5}}]"],
)
def test_keys_that_no_party_would_hear_of_are_refused(words, agreed, tmp_path):
    done = luthier("collaborate", "contract", agreed / "r.yaml", tmp_path / "c", words, cwd=tmp_path)
    key = words.partition("=")[0]
    assert done.returncode == 2 and f"luthier: {key}: is not read by collaborations" in done.stderr, done.stderr
    assert not (tmp_path / "c").exists()


def test_several_sources_are_refused(agreed, tmp_path):
    done = luthier(
        "collaborate", "contract", agreed / "r.yaml", tmp_path / "c", "data.train=[{path: a.jsonl}]", cwd=tmp_path
    )
    assert done.returncode == 2 and "data.train: holds several sources" in done.stderr and not (tmp_path / "c").exists()


def test_a_revision_is_the_small_models_and_stays_in_the_contract(tmp_path, monkeypatch):
    path = recipe(tmp_path)
    values = YAML().load(path)
    small, large = values["model"], values["collaborate"]["grad-transformer"]["large"]
    here, asked = {"a/small@v1": small, "b/large": large}, []

    def found(name):
        asked.append(name)
        return locate(here[name])

    monkeypatch.setattr("luthier.federation.folder.locate", found)
    changed = {"model": "a/small", "revision": "v1", "collaborate": {"grad-transformer": {"large": "b/large"}}}
    workspace = Workspace.create(
        recipes.load(json.dumps({"luthier": 1, **values, **changed}), "r"), tmp_path, tmp_path / "c"
    )
    assert workspace.models == {"small": "a/small@v1", "large": "b/large"} and set(asked) == set(here)
    asked.clear()
    assert Workspace(tmp_path / "c").first.base == workspace.first.base and asked[-1] == "a/small@v1"


def test_a_changed_contract_is_refused(agreed, tmp_path):
    stored = json.loads((agreed / "c/contract.json").read_text())
    stored["agreement"]["settings"]["learning_rate"] = 0.5
    (tmp_path / "contract.json").write_text(json.dumps(stored))
    done = luthier("collaborate", "tune", tmp_path, "x.jsonl", "--name", "x", cwd=tmp_path)
    assert done.returncode == 2 and "was changed after it was agreed on" in done.stderr


def shadow_files(folder):
    return {f.name: f.read_bytes() for f in folder.glob("c/shadows/*.safetensors")}


def test_shadow_runs_that_were_stopped_or_killed_go_on(agreed, tmp_path, monkeypatch):
    """Stopped in this process after three sets; then a worker process is killed; then they are made to the end."""
    recipe(tmp_path)
    assert luthier("collaborate", "contract", "r.yaml", "c", cwd=tmp_path).returncode == 0
    workspace, keep = Workspace(tmp_path / "c"), Workspace.keep_shadow

    def stopped(self, number, made):
        if number == 3:
            raise KeyboardInterrupt
        keep(self, number, made)

    monkeypatch.setattr(Workspace, "keep_shadow", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_shadows(workspace, 1, lambda _: None)
    monkeypatch.undo()
    assert sorted(workspace.missing_shadows(12)) == list(range(3, 12))

    def kill(what, done, total):
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(LuthierError, match="a process that made shadow sets was killed"):
        _side_by_side(workspace.path, range(3, 12), os.cpu_count() or 1, kill)  # a thread each, as in this process
    half = shadow_files(tmp_path)
    assert 4 <= len(half) < 12
    said = []
    make_shadows(workspace, 1, said.append)
    assert f"{12 - len(half) - 1} more sets" in said[0]
    found = shadow_files(tmp_path)
    assert half.items() <= found.items() and found == shadow_files(agreed), "equal to a run that was never stopped"


@pytest.mark.soak
@pytest.mark.parametrize("endings", [(signal.SIGKILL,), (signal.SIGKILL, signal.SIGINT)])
def test_shadow_runs_killed_at_any_moment_go_on(endings, agreed, tmp_path):
    recipe(tmp_path)
    assert luthier("collaborate", "contract", "r.yaml", "c", cwd=tmp_path).returncode == 0
    command = [*LUTHIER, "collaborate", "shadow", "c", "--processes", "2"]
    for ending in endings:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = len(list(tmp_path.glob("c/shadows/*.safetensors")))
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("c/shadows/*.safetensors"))) <= before and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(ending)
        process.wait(timeout=60)
    half = shadow_files(tmp_path)
    assert half
    done = luthier("collaborate", "shadow", "c", "--processes", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = shadow_files(tmp_path)
    assert half.items() <= found.items() and found == shadow_files(agreed), "equal to a run that was never stopped"


def test_what_audits_compare_with_may_be_handed_to_clients(agreed, tmp_path):
    (tmp_path / "contract.json").write_bytes((agreed / "c/contract.json").read_bytes())
    client, its = Workspace(tmp_path), Workspace(agreed / "c")
    assert client.calibrated() == [] and public_payloads(client) == ()
    (tmp_path / "calibration.safetensors").write_bytes((agreed / "c/calibration.safetensors").read_bytes())
    provider, made = open_provider(its), its.shadows(12, 1)
    for k, (x, tokens) in enumerate(client.calibrated()):
        assert torch.equal(x, made[k]["x"][-1]) and tokens == sorted({t for r in provider.of_set(k) for t in r["ids"]})
    assert len(public_payloads(client)) == 12 and set(public_payloads(client)[0][0]) == set(
        client.contract.small.shapes
    )
    x, tokens = client.calibrated()[0]
    client.contract = client.contract.model_copy(update={"large_learning_rate": 0.5})
    with pytest.raises(LuthierError, match="belongs to another contract"):
        client.calibrated()


@pytest.fixture(scope="module")
def judged(agreed):
    done = luthier("collaborate", "translator", "c", "--json", cwd=agreed)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_translator_is_judged_beside_all_controls(judged):
    assert [n.split()[0] for n in judged["judged"]] == ["C0", "C1", "C2", "C3", "C4", "C5", "translated", "true"]
    assert judged["judged"]["true update"]["share"] == 1.0 and judged["judged"]["C0 no update"]["share"] == 0.0
    assert judged["verdict"].startswith("translations")


def test_messages_are_audited_written_and_translated_and_a_bad_one_does_not_stop_the_others(agreed, judged):
    for name in NAMES[:2]:
        done = tune(agreed, name, "--held", f"{name}-held.jsonl")
        assert done.returncode == 0 and "What is sent?" in done.stderr and "verdict unknown" in done.stderr, done.stderr
    audit = json.loads((agreed / f"{NAMES[0]}.audit.json").read_text())
    assert audit["verdict"]["outcome"] == "unknown" and len(audit["answers"]) == 5
    assert "What could be read from it?" in (agreed / f"{NAMES[0]}.html").read_text()
    cut = (agreed / f"{NAMES[0]}.message").read_bytes()[:-10]
    (agreed / "cut.message").write_bytes(cut)
    whole = decode((agreed / f"{NAMES[1]}.message").read_bytes(), LIMIT)
    broken = Message.of(
        "update", whole.header.run, "ward", whole.header.base, {"update": whole.tensors()["update"] * float("nan")},
        notes={"rows": 8},
    )  # fmt: skip
    (agreed / "nan.message").write_bytes(broken.encode())
    own = (whole.header.run, "report.html", whole.header.base, whole.tensors())
    (agreed / "own.message").write_bytes(Message.of("update", *own, notes={"rows": 8}).encode())
    files = [f"{n}.message" for n in (*NAMES[:2], "cut", "nan", "own")]
    done = luthier("collaborate", "translate", "c", *files, "--output", "out", cwd=agreed)
    assert done.returncode == 0, done.stderr
    assert "refused cut.message: truncated" in done.stderr and "refused nan.message: not-finite" in done.stderr
    assert "refused own.message: 'report.html' cannot be the name of a party" in done.stderr
    workspace = Workspace(agreed / "c")
    for name in NAMES[:2]:
        assert load(agreed / "out" / name).base.same_base(workspace.lab.view("large").base)
    page, report = (agreed / "out/report.html").read_text(), json.loads((agreed / "out/report.json").read_text())
    assert set(report["report"]) == set(NAMES[:2]) and f"{report['cosine']:.2f}" in page
    assert "truncated" in page and NAMES[0] in page and "Share of the true gain" in page
    none = luthier("collaborate", "translate", "c", "cut.message", cwd=agreed)
    assert none.returncode == 2 and "no message could be used" in none.stderr


def test_a_translation_is_simulated_too(agreed):
    files = [f"{n}={n}.jsonl" for n in NAMES[:2]]
    done = luthier("collaborate", "simulate", "c", *files, "--held", 0.5, cwd=agreed)
    assert done.returncode == 0, done.stderr
    found, workspace = json.loads((agreed / "simulated/found.json").read_text()), Workspace(agreed / "c")
    assert found["arrivals"] == [] and "small model" in (agreed / "simulated/report.html").read_text()
    assert load(agreed / "simulated/alone" / NAMES[0]).base.same_base(workspace.lab.view("small").base)
    for folder in ("together/" + NAMES[0], "shared"):
        assert load(agreed / "simulated" / folder).base.same_base(workspace.lab.view("large").base)


def test_a_shut_gate_keeps_the_message_back(agreed, monkeypatch):
    from luthier.collaboration.audit.gate import Verdict
    from luthier.federation import client as sending

    monkeypatch.setattr(sending, "judged", lambda *_: Verdict("fail", ["40% of the tokens can be read off a.x"], []))
    done = tune(agreed, NAMES[2])
    assert done.returncode == 2 and "not written, because 40% of the tokens" in done.stderr
    assert not (agreed / f"{NAMES[2]}.message").exists() and (agreed / f"{NAMES[2]}.html").exists()
    assert tune(agreed, NAMES[2], "--send-anyway").returncode == 0 and (agreed / f"{NAMES[2]}.message").exists()


def test_one_shot_by_files(agreed, tmp_path):
    recipe(tmp_path, collaborate={"one-shot": {"privacy": {"epsilon": 0.5, "delta": 0.01}}})
    assert luthier("collaborate", "contract", "r.yaml", "c", cwd=tmp_path).returncode == 0
    for name in NAMES[:2]:
        done = tune(tmp_path, name, "--held", f"{name}-held.jsonl")
        assert done.returncode == 0 and "epsilon 0.5" in done.stderr and "whether a row is there" in done.stderr, (
            done.stderr
        )
        assert "upper bound: epsilon 0.50, by accounting" in done.stderr
        low = float(re.search(r"epsilon is at least (\S+) with 95%", done.stderr)[1])
        assert low <= 0.5, "what the attack shows stays under what is accounted for"
    done = luthier("collaborate", "translate", "c", *[f"{n}.message" for n in NAMES[:2]], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    workspace, updates = Workspace(tmp_path / "c"), [load(tmp_path / "results" / n) for n in NAMES[:2]]
    assert updates[0].base.same_base(workspace.first.base) and len({u.digest() for u in updates}) == 1
    page = (tmp_path / "results/report.html").read_text()
    assert "How much each client counts" in page and "not shared" in page


def test_one_party_alone_tunes_under_a_limit(tmp_path):
    """A run with differential privacy outside of a federation: a contract with oneself."""
    recipe(tmp_path, collaborate={"one-shot": {"privacy": {"epsilon": 2.0, "delta": 0.01}}})
    assert luthier("collaborate", "contract", "r.yaml", "c", cwd=tmp_path).returncode == 0
    name = NAMES[0]
    done = tune(tmp_path, name, "--held", f"{name}-held.jsonl")
    assert done.returncode == 0 and "epsilon 2" in done.stderr, done.stderr
    done = luthier("collaborate", "translate", "c", f"{name}.message", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    place = tmp_path / "results" / name
    sent = unpacked(decode((tmp_path / f"{name}.message").read_bytes(), LIMIT))
    assert (place / "adapter_model.safetensors").exists() and load(place).digest() == sent.digest()
    told = luthier("evaluate", place, "--data", f"{name}-held.jsonl", "--json", cwd=tmp_path)
    assert told.returncode == 0 and json.loads(told.stdout)["loss"]["change"] is not None, told.stderr


def test_the_mean_so_far_lies_there_after_each_arrival(agreed, tmp_path):
    recipe(tmp_path, collaborate="one-shot", seed=7)
    assert luthier("collaborate", "contract", "r.yaml", "c", cwd=tmp_path).returncode == 0
    workspace, seen = Workspace(tmp_path / "c"), {}
    assert workspace.contract.settings.seed == 7 == workspace.lab.seed
    server = workspace.protocol.server(workspace.contract, NAMES[:2], None, workspace.lab)
    write_so_far(workspace, server, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "nothing has arrived"
    for name in NAMES[:2]:
        party = workspace.protocol.client(
            name, workspace.contract, workspace.first, workspace.rendered(workspace.rows(f"{name}.jsonl", tmp_path))
        )
        (sent,) = party.handle(server.begin()[0].message)
        seen[name] = party.moved(sent.message)
        server.handle(sent.message)
        write_so_far(workspace, server, tmp_path / "out")
        found, expected = load(tmp_path / "out/so-far").dense(), averaged(seen, dict.fromkeys(seen, 1)).dense()
        assert max(float((found[k] - expected[k]).abs().max()) for k in expected) < 1e-6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("contract", "r.yaml", "new", "~collaborate"), "collaborate: is missing; name a protocol"),
        (("contract", "r.yaml", "new", "collaborate.grad-transformer.large=null"), "large: is missing; name a model"),
        (("contract", "r.yaml", "new", "tuner=full"), "tuner: full has no fixed start"),
        (("shadow", "nowhere"), "make one with `luthier collaborate contract`"),
        (("tune", "c", "no.jsonl", "--name", "x"), "no.jsonl"),
        (
            ("tune", "c", "clinic.jsonl", "--name", "x", "--model", "middle=x"),
            "--model middle: the contract's models are",
        ),
        (("tune", "c", "clinic.jsonl", "--name", "x", "--model", "small"), "write name=path"),
        (("translate", "c", "missing.message"), "missing.message: No such file"),
    ],
)
def test_faults_are_said_before_anything_is_tuned(agreed, words, says):
    done = luthier("collaborate", *words, cwd=agreed)
    assert done.returncode != 0 and says in done.stderr, done.stderr


def test_a_recipe_with_a_protocol_is_not_run_as_one(agreed):
    done = luthier("run", "r.yaml", cwd=agreed)
    assert done.returncode == 2 and "collaborate: is for `luthier collaborate`" in done.stderr


def test_check_says_what_leaves(agreed):
    done = luthier("check", "r.yaml", cwd=agreed)
    assert done.returncode == 0 and "the server gets an update of each organisation's small model" in done.stdout


def test_help_says_what_each_argument_is(agreed):
    done = luthier("collaborate", "tune", "--help", cwd=agreed)
    assert done.returncode == 0 and "Your rows; they stay here." in done.stdout
