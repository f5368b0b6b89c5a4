"""What a message refuses, by name, and what a journal keeps through a kill."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from helpers.messages import LIMIT, message
from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import HEADER_LIMIT, MAGIC, Message, Refused, decode


def refusal(data, limit=LIMIT):
    with pytest.raises(Refused) as caught:
        decode(data, limit)
    return caught.value.name


def test_a_message_comes_back_as_it_was():
    sent = message()
    back = decode(sent.encode(), LIMIT)
    assert back == sent and back.digest == sent.digest
    assert torch.equal(back.tensors()["x"], torch.arange(6.0).view(2, 3)) and back.tensors()["n"].dtype == torch.int64
    assert back.header.notes == {"rows": 120}


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "-x", "a\nb", "x" * 65])
def test_a_sender_whose_name_is_a_path_is_refused(name):
    header = {**message().header.model_dump(), "sender": name}
    head = json.dumps({"header": header, "digest": "0" * 64, "size": 0}).encode()
    assert refusal(MAGIC + len(head).to_bytes(4, "little") + head) == "header"
    with pytest.raises(ValueError, match="sender"):
        Message.of("update", "run", name, message().header.base, {})


def test_every_message_has_its_own_nonce():
    assert message().header.nonce != message().header.nonce


@pytest.mark.parametrize("cut", [5, 11, 40, -1])
def test_a_cut_message_is_refused(cut):
    assert refusal(message().encode()[:cut]) in {"truncated", "version"}


def test_more_bytes_than_announced_are_refused():
    assert refusal(message().encode() + b"x") == "truncated"


def test_another_version_is_refused():
    assert refusal(MAGIC[:-1] + b"\x02" + message().encode()[len(MAGIC) :]) == "version"


def test_a_payload_over_the_limit_is_refused_before_it_is_read():
    assert refusal(message().encode(), limit=10) == "size"


def test_every_changed_byte_is_found():
    data = message().encode()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1
        assert refusal(bytes(changed)) in {"version", "truncated", "header", "size", "digest"}


def test_a_header_of_another_shape_is_refused():
    head = json.dumps({"header": {"kind": "gossip"}, "digest": "", "size": 0}).encode()
    assert refusal(MAGIC + len(head).to_bytes(4, "little") + head) == "header"
    whole = message().encode()
    length = int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 4], "little")
    found = json.loads(whole[len(MAGIC) + 4 :][:length])
    for text in (
        "[" * 60_000,
        "null",
        "1e999",
        json.dumps({**found, "size": math.inf}),
        json.dumps({**found, "size": -1}),
    ):
        assert refusal(MAGIC + len(text).to_bytes(4, "little") + text.encode()) == "header"
    assert refusal(MAGIC + (HEADER_LIMIT + 1).to_bytes(4, "little") + b"x" * HEADER_LIMIT) == "header"
    with pytest.raises(ValueError, match="header of"):
        message(notes={"long": "x" * HEADER_LIMIT}).encode()


def test_a_payload_that_is_no_safetensors_is_refused():
    broken = message().model_copy(update={"payload": b"\x00" * 20})
    with pytest.raises(Refused, match="payload: from clinic"):
        decode(broken.encode(), LIMIT).tensors()


def test_a_journal_gives_back_what_it_took_in_order(tmp_path):
    first = Journal(tmp_path, LIMIT)
    sent = [message() for _ in range(12)]
    for m in sent:
        first.append(m)
    again = Journal(tmp_path, LIMIT)
    assert list(again) == sent
    again.append(message())
    assert len(list(Journal(tmp_path, LIMIT))) == 13


def test_a_damaged_file_of_a_journal_is_named(tmp_path):
    file = Journal(tmp_path, LIMIT).append(message())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Refused, match=r"000000\.message"):
        list(Journal(tmp_path, LIMIT))


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from helpers.messages import LIMIT, message
from luthier.collaboration.journal import Journal
journal = Journal(Path(sys.argv[1]), LIMIT)
while True:
    journal.append(message())
    print(journal.count, flush=True)
"""


def test_a_write_that_was_cut_off_is_no_message_and_is_removed(tmp_path):
    """What a killed process leaves is a file beside its target, with the number of that process."""
    Journal(tmp_path, LIMIT).append(message())
    (tmp_path / f".000001.message.{2**22 + 1}").write_bytes(message().encode()[:-1])  # above every number of a process
    again = Journal(tmp_path, LIMIT)
    assert len(list(again)) == 1 and not list(tmp_path.glob(".*"))
    assert again.append(message()).name == "000001.message"


@pytest.mark.soak
def test_what_was_acknowledged_survives_a_kill(tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), tests], stdout=subprocess.PIPE, text=True
    ) as writer:
        said = 0
        for line in writer.stdout:
            said = int(line)
            if said == 20:
                writer.send_signal(signal.SIGKILL)
                break
    (tmp_path / f".000099.message.{writer.pid}").write_bytes(b"cut off")
    assert len(list(Journal(tmp_path, LIMIT))) >= said
    assert not list(tmp_path.glob(".*"))
