"""Who is refused, by which name, and that a restart loses nothing that had arrived."""

import pytest
import torch

from luthier.collaboration.journal import Journal
from luthier.collaboration.messages import Message, Refused
from luthier.collaboration.parties import Disclosure, Gathering, Sent, in_process, refusal
from luthier.model.fingerprint import Fingerprint

BASE = Fingerprint(name="tiny", weights="w" * 64, tokenizer="t" * 64)
CLINICS = ("north", "south", "west")


def message(sender="north", run="run", base=BASE, value=1.0, **more):
    return Message.of("update", run, sender, base, {"x": torch.full((2,), value)}, **more)


def positive(m):
    if m.tensors()["x"].min() < 0:
        raise Refused("negative", m.header.sender)


def gathering(journal=None, round=0):
    return Gathering("update", "run", BASE, CLINICS, positive, journal, round, journal or ())


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (message(sender="stranger"), "unknown"),
        (message(run="other"), "contract"),
        (Message.of("scalars", "run", "north", BASE, {"x": torch.ones(2)}), "kind"),
        (message(round=1), "round"),
        (message(base=BASE.model_copy(update={"weights": "v" * 64})), "base"),
        (message(base=BASE.model_copy(update={"tokenizer": "u" * 64})), "tokenizer"),
        (message(value=-1.0), "negative"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name_and_does_not_count(sent, name):
    g = gathering()
    with pytest.raises(Refused) as caught:
        g.take(sent)
    assert caught.value.name == name and not g.arrived
    answer = refusal(caught.value, sent, "server", BASE)
    assert answer.to == sent.header.sender and answer.message.header.notes["name"] == name


def test_a_duplicate_counts_once_and_a_second_message_is_refused():
    g, first = gathering(), message()
    assert g.take(first) and not g.take(first)
    with pytest.raises(Refused, match="second"):
        g.take(message())  # the same tensors under another nonce: a replay with a new envelope
    assert list(g.arrived) == ["north"] and g.missing == {"south", "west"}


def test_a_restarted_server_has_everything_that_had_arrived(tmp_path):
    g = gathering(Journal(tmp_path, 1000))
    first, second = message("north"), message("west", value=2.0)
    assert g.take(first) and g.take(second)
    again = gathering(Journal(tmp_path, 1000))
    assert again.arrived == {"north": first, "west": second} and again.missing == {"south"}
    assert not again.take(first)
    with pytest.raises(Refused, match="second"):
        again.take(message("west"))
    assert again.take(message("south")) and not again.missing


def test_a_refused_message_is_not_on_disk(tmp_path):
    g = gathering(Journal(tmp_path, 1000))
    with pytest.raises(Refused):
        g.take(message(value=-1.0))
    assert list(Journal(tmp_path, 1000)) == []


def declined(sender="north", **more):
    return Message.of("refusal", "run", sender, BASE, {}, notes={"name": "held-back"}, **more)


def test_whoever_declines_is_not_waited_for_and_may_change_its_mind():
    g = gathering()
    g.decline(declined())
    assert g.missing == {"south", "west"} and not g.arrived
    assert g.take(message("north")) and not g.declined
    for odd, name in ((declined("stranger"), "unknown"), (declined(round=2), "round")):
        with pytest.raises(Refused, match=name):
            g.decline(odd)


class Counter:
    """Sends a number on until it is zero."""

    def __init__(self, name, other):
        self.name, self.other, self.seen = name, other, []

    def handle(self, event):
        n = int(event.tensors()["n"])
        self.seen.append(n)
        return [Sent(self.other, counted(n - 1, self.name))] if n else []

    def disclosure(self, out):
        return Disclosure(
            "a number", out.to, (len(out.message.payload), len(out.message.encode())), "nothing", "no formal privacy"
        )


def counted(n, sender):
    return Message.of("state", "run", sender, BASE, {"n": torch.tensor(n)})


def test_messages_go_to_and_fro_and_each_passes_the_gate():
    a, b, told = Counter("a", "b"), Counter("b", "a"), []
    in_process([a, b], [Sent("a", counted(3, "outside"))], lambda sent, d: told.append((sent.to, d.what)))
    assert a.seen == [3, 1] and b.seen == [2, 0]
    assert told == [("b", "a number"), ("a", "a number"), ("b", "a number")]


def test_a_gate_that_raises_stops_a_message():
    def gate(sent, disclosure):
        raise Refused("audit", "too much")

    a, b = Counter("a", "b"), Counter("b", "a")
    with pytest.raises(Refused, match="audit"):
        in_process([a, b], [Sent("a", counted(3, "outside"))], gate)
    assert b.seen == []
