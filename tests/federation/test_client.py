"""A client's work, as files and over a network alike: tuned from where the server says, audited, sent once or held back."""

import json

import pytest
import torch

from helpers.collaborations import recipe
from helpers.commands import luthier
from luthier.collaboration.audit.gate import Verdict
from luthier.collaboration.messages import Message, Refused, decode
from luthier.collaboration.rounds import SERVER
from luthier.collaboration.wire import headers, packed, unpacked
from luthier.demos.private import NAMES
from luthier.federation import client as sending
from luthier.federation.client import AuditSettings, prepared
from luthier.federation.flower import answered
from luthier.federation.folder import LIMIT, Workspace
from luthier.federation.network import Client
from luthier.support.errors import RecipeError
from luthier.update.files import load


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sending")
    recipe(folder, collaborate={"one-shot": {"rounds": 2}})
    done = luthier("collaborate", "contract", "r.yaml", "c", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workspace(agreed, tmp_path):
    (tmp_path / "contract.json").write_bytes((agreed / "c/contract.json").read_bytes())
    return Workspace(tmp_path)


def who(agreed, **more):
    return Client(NAMES[0], str(agreed / f"{NAMES[0]}.jsonl"), canaries=0, **more)


def state(workspace, round=0, update=None):
    tensors, notes = (packed(update), {"parts": headers(update)}) if update is not None else ({}, {})
    base = workspace.contract.base
    return Message.of("state", workspace.contract.digest, SERVER, base, tensors, round=round, notes=notes)


def notes(workspace):
    return [json.loads(x) for x in (workspace.path / "sent.jsonl").read_text().splitlines()]


def test_a_round_is_answered_once_and_every_sending_is_noted(agreed, workspace):
    first = answered(workspace.path, who(agreed), state(workspace).encode())
    again = answered(workspace.path, who(agreed), state(workspace).encode())
    assert first == again, "tuned anew it would have another nonce, and cost a promise twice"
    assert [n["round"] for n in notes(workspace)] == [0, 0] and len({n["digest"] for n in notes(workspace)}) == 1
    other = answered(workspace.path, who(agreed), state(workspace, 1).encode())
    assert other != first and decode(other, LIMIT).header.round == 1
    assert (workspace.path / "sent" / f"{NAMES[0]}-1.html").exists()
    with pytest.raises(Refused, match="round 3 of 2: the contract has no more rounds"):
        answered(workspace.path, who(agreed), state(workspace, 2).encode())


def test_a_model_may_lie_elsewhere_than_the_contract_says(agreed, workspace, tmp_path):
    stored = json.loads((tmp_path / "contract.json").read_text())
    here = stored["models"]["model"]
    (tmp_path / "contract.json").write_text(json.dumps({**stored, "models": {"model": "/on/the/servers/disk"}}))
    client = who(agreed, models={"model": here})
    assert Client.from_config(client.to_config()) == client
    with pytest.raises(RecipeError, match="/on/the/servers/disk"):
        answered(workspace.path, who(agreed), state(workspace).encode())
    assert decode(answered(workspace.path, client, state(workspace).encode()), LIMIT).header.kind == "update"


def test_tuning_and_audit_say_how_far_they_are(agreed, workspace, monkeypatch):
    monkeypatch.setattr("luthier.support.progress.EVERY", 0.0)
    said = []
    rows = workspace.rendered(workspace.rows(str(agreed / f"{NAMES[0]}.jsonl"), agreed))
    prepared(workspace, NAMES[0], rows, AuditSettings([], canaries=2, others=3), say=said.append)
    heard = [line.partition(",")[0] for line in said]
    assert "tune    step 2 of 2" in heard and "audit   canary 3 of 4" in heard
    assert "audit   drawn answer 80 of 80" in heard


def test_what_a_server_gives_is_kept_as_an_adapter(agreed, workspace):
    sent = decode(answered(workspace.path, who(agreed), state(workspace).encode()), LIMIT)
    result = Message.of(
        "result", workspace.contract.digest, SERVER, workspace.contract.base, sent.tensors(), round=2,
        notes={"parts": sent.header.notes["parts"]},
    )  # fmt: skip
    for _ in range(2):
        assert answered(workspace.path, who(agreed), result.encode()) == b""
    given = load(workspace.path / "given" / NAMES[0])
    expected = unpacked(sent).dense()
    assert all(torch.equal(given.dense()[k], expected[k]) for k in expected) and given.base.same_base(
        workspace.first.base
    )
    assert (workspace.path / "given" / NAMES[0] / "adapter_config.json").exists(), "as peft opens it"


def test_what_an_audit_holds_back_is_not_sent_and_the_server_hears_no_reason(agreed, workspace, monkeypatch):
    monkeypatch.setattr(sending, "judged", lambda *_: Verdict("fail", ["40% of the tokens can be read off a.x"], []))
    said = decode(answered(workspace.path, who(agreed), state(workspace).encode()), LIMIT)
    assert said.header.kind == "refusal" and said.tensors() == {} and "40%" not in json.dumps(said.header.notes)
    assert "40% of the tokens" in (workspace.path / f"{NAMES[0]}.held-back").read_text()
    assert not (workspace.path / "sent.jsonl").exists() and not list(workspace.path.glob("sent/*.message"))
    anyway = decode(answered(workspace.path, who(agreed, send_anyway=True), state(workspace).encode()), LIMIT)
    assert anyway.header.kind == "update" and len(notes(workspace)) == 1


def test_a_later_round_is_audited_from_where_it_started(agreed, workspace):
    rows = workspace.rendered(workspace.rows(str(agreed / f"{NAMES[0]}.jsonl"), workspace.path))
    held = workspace.rendered(workspace.rows(str(agreed / f"{NAMES[0]}-held.jsonl"), workspace.path))
    first = prepared(workspace, NAMES[0], rows, AuditSettings(held, 0))
    later = prepared(workspace, NAMES[0], rows, AuditSettings(held, 0), state(workspace, 1, 40.0 * first.update))
    alone = sending._membership(workspace, later.update, rows, held)
    assert later.leaks.membership != alone, "an observer knows the start, so the audit begins there"
    start, _ = (40.0 * first.update).to("dense")
    with start.bind(workspace.first):
        assert later.leaks.membership == sending._membership(workspace, later.update, rows, held)


def test_canaries_do_not_count_as_rows(agreed, workspace):
    rows = workspace.rendered(workspace.rows(str(agreed / f"{NAMES[0]}.jsonl"), workspace.path))
    audited = prepared(workspace, NAMES[0], rows, AuditSettings((), 3, 5))
    assert audited.message.header.notes["rows"] == len(rows) and audited.leaks.memory.canaries == 3


def test_what_seeds_say_is_audited_as_what_they_do(agreed, tmp_path):
    recipe(
        tmp_path, collaborate={"seed-rounds": {"rounds": 1}}, tuner={"fedkseed": {"num_seeds": 8}}, learning_rate=1e-4,
        lr_scheduler_type="constant", warmup_fraction=0.0,
    )  # fmt: skip
    assert luthier("collaborate", "contract", "r.yaml", "c", cwd=tmp_path).returncode == 0
    workspace = Workspace(tmp_path / "c")
    rows = workspace.rendered(workspace.rows(str(tmp_path / f"{NAMES[0]}.jsonl"), tmp_path))
    audited = prepared(workspace, NAMES[0], rows, AuditSettings((), 0))
    sent = audited.message.tensors()
    (part,) = audited.update.parts
    assert len(part.tensors()) and set(sent) == {"index", "scalar"}
    moved = audited.update.to("dense")[0].parts[0].tensors()
    assert sum(float(t.double().pow(2).sum()) for t in moved.values()) > 0
    assert torch.isfinite(sent["scalar"]).all() and "tokens were not looked for" in audited.verdict.gaps[0]


def test_files_carry_one_round(agreed):
    done = luthier("collaborate", "tune", "c", f"{NAMES[0]}.jsonl", "--name", "x", cwd=agreed)
    assert done.returncode == 2 and "asks for several rounds" in done.stderr


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 65, "x\n", "server", "so-far", "Report.html"])
def test_a_name_that_is_a_path_or_taken_is_refused(agreed, name):
    done = luthier("collaborate", "tune", "c", f"{NAMES[0]}.jsonl", "--name", name, cwd=agreed)
    assert done.returncode == 2 and "cannot be the name of a party" in done.stderr
