"""Parties as processes of their own on loopback, over flwr: equal to one process. Killed, slow and hostile ones are for the soak;
`test_flower.py` shows the same logic with a grid made up."""

import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from helpers.collaborations import recipe
from helpers.commands import LUTHIER, luthier
from luthier.collaboration.parties import in_process
from luthier.demos.private import NAMES
from luthier.federation.folder import Workspace
from luthier.federation.network import Client, address, join, serve
from luthier.federation.outcome import read_given
from luthier.support.errors import LuthierError
from luthier.update.files import load

MARK = "zebra-9f27-quagga"  # in the rows of clients


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Network:
    """A server's folder and one for each client, with commands that run in them."""

    def __init__(self, folder, protocol):
        recipe(folder, collaborate=protocol)
        assert luthier("collaborate", "contract", "r.yaml", "server", cwd=folder).returncode == 0
        for name in NAMES:
            (folder / name).mkdir()
            (folder / name / "contract.json").write_bytes((folder / "server/contract.json").read_bytes())
        self.folder, self.at, self.running = folder, f"127.0.0.1:{free_port()}", []

    def start(self, *words, **environment):
        log = (self.folder / f"log-{len(self.running)}").open("w")
        process = subprocess.Popen(
            [*LUTHIER, "collaborate", *map(str, words)], cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self.running.append(process)
        return process

    def serve(self, *names, patience=240):
        words = ["--clients", ",".join(names), "--address", self.at, "--patience", patience, "--output", "out"]
        return self.start("serve", "server", *words)

    def join(self, name, *more, **environment):
        words = ["--name", name, "--address", self.at, "--canaries", 0, *more]
        return self.start("join", name, f"{name}.jsonl", *words, **environment)

    def said(self):
        return "\n".join(f.read_text() for f in sorted(self.folder.glob("log-*")))

    def end(self):
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def network(tmp_path):
    made = []

    def make(protocol):
        made.append(Network(tmp_path, protocol))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_over_a_network_the_same_parties_come_to_the_same_numbers_and_no_row_is_sent(count, tmp_path):
    """flwr's own processes, on loopback; the functions of `serve` and `join` run in threads here."""
    net, names, said = Network(tmp_path, {"one-shot": {}}), NAMES[:count], []
    for name in names:
        with (net.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": f"{MARK}\n", "completion": MARK}) + "\n")
    files, at = {n: str(net.folder / f"{n}.jsonl") for n in names}, address(net.at, None, False)
    with ThreadPoolExecutor(3) as pool:
        server = pool.submit(serve, net.folder / "server", names, at, 240.0, net.folder / "out", said.append)
        clients = [pool.submit(join, net.folder / n, Client(n, files[n], canaries=0), at, said.append) for n in names]
        try:
            server.result(timeout=240)
            assert [c.result(timeout=60) for c in clients] == [net.folder / n / "given" / n for n in names], said
        finally:
            for child in psutil.Process().children(recursive=True):  # after a failure, so that the threads end
                child.kill()
    workspace = Workspace(net.folder / "server")
    alone = workspace.protocol.server(workspace.contract, names, None, workspace.lab)
    parties = [
        workspace.protocol.client(n, workspace.contract, workspace.first, workspace.rows_in(files[n])) for n in names
    ]
    in_process([alone, *parties], alone.begin(), lambda sent, disclosure: None)
    expected = alone.update.dense()
    given = [folder / n for n in names for folder in (net.folder / "out", net.folder / n / "given")]
    for adapter in (*given, net.folder / "out/so-far"):
        found = load(adapter).dense()
        assert max(float((found[k] - expected[k]).abs().max()) for k in expected) < 1e-6
        assert read_given(adapter).contract == workspace.contract.digest
    noted = [json.loads(x) for x in (net.folder / names[0] / "sent.jsonl").read_text().splitlines()]
    assert len(noted) == 1 and noted[0]["to"] == "server" and noted[0]["bytes"][0] > 0
    assert not (net.folder / names[0] / "provider.json").exists(), "a client needs the contract alone"
    ids = np.array(workspace.lab.renderer.tokenizer(MARK)["input_ids"])
    marks = [MARK.encode(), *(ids.astype(t).tobytes() for t in (np.int64, np.int32, np.uint16))]
    servers = [f for part in ("server", "out") for f in (net.folder / part).rglob("*") if f.is_file()]
    assert len([f for f in servers if f.suffix == ".message"]) == count + 1, "the updates and the result"
    assert not [f for f in servers if any(m in f.read_bytes() for m in marks)], "no row is in what the server has"


@pytest.mark.soak
def test_a_killed_client_a_killed_server_and_whoever_is_late(network):
    """Minutes. The first client answers, then its process and the server's are killed; the second never comes."""
    net = network({"one-shot": {}})
    server, client = net.serve(*NAMES[:2], patience=40), net.join(NAMES[0])
    journal = net.folder / "server/arrived"
    until = time.monotonic() + 200
    while not list(journal.glob("*.message")) and time.monotonic() < until:
        time.sleep(0.3)
    assert len(list(journal.glob("*.message"))) == 1, net.said()
    for process in (client, server):
        os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "-f", f"{net.folder}"], check=False)
    subprocess.run(["pkill", "-KILL", "-f", net.at.rpartition(":")[2]], check=False)
    net.at = f"127.0.0.1:{free_port()}"
    server = net.serve(*NAMES[:2], patience=40)
    assert server.wait(timeout=280) == 0, net.said()
    assert "time is up" in net.said()
    assert counted(net) == {(0, NAMES[0])}, "what had arrived counts"


HOOK = """
import sys, importlib.abc, importlib.util

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "luthier.federation.MODULE":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def patched(module):
            run(module)
            patch(module)
        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Hook())
"""
STRICT = (
    HOOK.replace("MODULE", "client")
    + """
def patch(module):
    module.judged = lambda *given: module.Verdict("fail", ["everything can be read"], [])
"""
)
HOSTILE = (
    HOOK.replace("MODULE", "flower")
    + """
def patch(module):
    honest = module.answered
    module.answered = lambda *given: corrupted(honest(*given))

def corrupted(data):
    import pathlib
    import time

    import torch
    from luthier.collaboration.messages import Message, decode
    how = HOW
    if not data:
        return data
    if how == "truncated":
        return data[:-7]
    if how == "changed":
        return data[:-1] + bytes([data[-1] ^ 1])
    if how == "pickle":
        import pickle
        return pickle.dumps({"a": 1})
    m, first = decode(data, 1 << 30), pathlib.Path(__file__).with_name("first")
    if how == "size":
        import json
        head = json.dumps({"header": m.header.model_dump(), "digest": m.digest, "size": 1 << 40}).encode()
        return data[:8] + len(head).to_bytes(4, "little") + head + m.payload
    if how == "replay":
        if m.header.round == 0:
            first.write_bytes(data)
        return first.read_bytes()
    if how == "slow" and m.header.round == 0:
        while len(list(pathlib.Path(JOURNAL).glob("*.message"))) < 2:  # until the round is closed without it
            time.sleep(0.5)
        return data
    if how == "stall":
        time.sleep(600)
    head, tensors = m.header, m.tensors()
    if how == "scale":  # nothing that a tensor shows
        parts = head.notes["parts"].replace('"scale": {', '"scale": {"x": "y", ')
        head = head.model_copy(update={"notes": {**head.notes, "parts": parts}})
    if how == "not-finite":
        tensors = {n: t * float("nan") for n, t in tensors.items()}
    if how == "shape":
        tensors = {n: t[:-1] for n, t in tensors.items()}
    if how == "base":
        head = head.model_copy(update={"base": head.base.model_copy(update={"weights": "0" * 64})})
    if how == "contract":
        head = head.model_copy(update={"run": "0" * 64})
    if how == "sender":
        head = head.model_copy(update={"sender": "clinic"})
    return Message.of(head.kind, head.run, head.sender, head.base, tensors, round=head.round, notes=head.notes).encode()
"""
)


def corrupting(net, how):
    """The environment of a client whose process corrupts what it sends."""
    folder = net.folder / "hostile"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        HOSTILE.replace("HOW", repr(how)).replace("JOURNAL", repr(str(net.folder / "server/arrived")))
    )
    return {"PYTHONPATH": str(folder)}


def counted(net):
    """(round, client) of everything that counted."""
    report = json.loads((net.folder / "out/report.json").read_text())["report"]
    return {(r["round"], r["client"]) for r in report}


@pytest.mark.soak
@pytest.mark.parametrize(
    "how", ["truncated", "changed", "pickle", "size", "not-finite", "shape", "scale", "base", "contract", "sender"]
)
def test_a_hostile_client_is_refused_by_name_and_the_others_count(network, how):
    """A client whose process corrupts what it sends; the server names it, and closes the round without it."""
    net = network({"one-shot": {}})
    server = net.serve(*NAMES[:2], patience=45)
    honest, hostile = net.join(NAMES[0]), net.join(NAMES[1], **corrupting(net, how))
    assert server.wait(timeout=280) == 0, net.said()
    assert honest.wait(timeout=60) == 0 and hostile.poll() in (None, 0)
    names = {"changed": "digest", "pickle": "version", "scale": "form"}
    assert f"refused {NAMES[1]}: {names.get(how, how)}" in net.said(), net.said()
    assert counted(net) == {(0, NAMES[0])}


@pytest.mark.soak
@pytest.mark.parametrize(("how", "also"), [("replay", {(0, NAMES[1])}), ("slow", {(1, NAMES[1])})])
def test_a_message_of_another_round_is_refused_by_name(network, how, also):
    """One client sends its first message again in the second round; the other answers the first when it is over."""
    net = network({"one-shot": {"rounds": 2}})
    server = net.serve(*NAMES[:2], patience=90)
    honest = net.join(NAMES[0])
    net.join(NAMES[1], **corrupting(net, how))
    assert server.wait(timeout=400) == 0, net.said()
    assert honest.wait(timeout=60) == 0
    assert f"refused {NAMES[1]}: round" in net.said(), net.said()
    assert counted(net) == {(0, NAMES[0]), (1, NAMES[0]), *also}, net.said()


@pytest.mark.soak
def test_a_client_that_is_killed_joins_again_and_counts(network):
    net = network({"one-shot": {}})
    server, _ = net.serve(*NAMES[:2], patience=400), net.join(NAMES[0])
    killed = net.join(NAMES[1], **corrupting(net, "stall"))
    until = time.monotonic() + 200
    while not list((net.folder / NAMES[1]).glob("sent/*.message")) and time.monotonic() < until:
        time.sleep(0.3)
    os.killpg(killed.pid, signal.SIGKILL)
    again = net.join(NAMES[1])
    assert server.wait(timeout=300) == 0, net.said()
    assert again.wait(timeout=60) == 0 and net.said().count(f"joined  {NAMES[1]}") == 2
    assert counted(net) == {(0, NAMES[0]), (0, NAMES[1])}
    assert "get the same answer" in net.said()


@pytest.mark.soak
def test_a_message_that_its_audit_holds_back_never_leaves(network):
    """The client's gate finds fault with everything."""
    net = network({"one-shot": {}})
    (net.folder / "strict").mkdir()
    (net.folder / "strict/sitecustomize.py").write_text(STRICT)
    server, honest = net.serve(*NAMES[:2], patience=240), net.join(NAMES[0])
    strict = net.join(NAMES[1], PYTHONPATH=str(net.folder / "strict"))
    assert server.wait(timeout=280) == 0, net.said()
    assert honest.wait(timeout=60) == 0 and strict.wait(timeout=60) == 2
    assert f"without {NAMES[1]}: its audit failed, so it sends no message" in net.said()
    assert counted(net) == {(0, NAMES[0])} and not (net.folder / NAMES[1] / "sent.jsonl").exists()
    assert "not written, because" in net.said() and not list((net.folder / NAMES[1]).glob("sent/*.message"))


@pytest.mark.parametrize(
    ("text", "insecure", "says"),
    [
        ("somewhere", False, "is not an address"),
        ("10.0.0.7:9092", False, "others can read and change"),
        ("example.org:9092", False, "others can read and change"),
    ],
)
def test_a_line_that_anybody_could_read_is_asked_for(text, insecure, says):
    with pytest.raises(LuthierError, match=says):
        address(text, None, insecure)


def test_loopback_certificates_and_those_who_say_so_are_fine(tmp_path):
    assert address("127.0.0.1:1", None, False).port == address("localhost:1", None, False).port == 1
    assert address("10.0.0.7:9092", tmp_path, False).certificates == tmp_path
    assert str(address("10.0.0.7:9092", None, True)) == "10.0.0.7:9092"
