"""The gate: what fails, what is not enough to pass, and the five answers."""

import pytest

from luthier.collaboration.audit.canaries import Memory
from luthier.collaboration.audit.gate import Leaks, Limits, answers, judged
from luthier.collaboration.audit.membership import Membership
from luthier.collaboration.audit.tokens import Found
from luthier.collaboration.parties import Disclosure

QUIET = Leaks(
    [
        Found("a.q", 2, 48, "soft", {1e-4: 0.02, 1e-3: 0.05}, 0.55, 0.0),
        Found("b.q", 2, 2, "saturated", {}, float("nan"), 0.0),
    ],
    Memory(0.0, 0.0, 1.5, 1.4, 0.2, 0.01, 10.0, 100),
    Membership(0.52, 0.012, 0.1, 600, 600),
)
SENT = Disclosure("how the model moved", "server", (4096, 4400), "nothing", "no formal privacy")


def test_a_quiet_payload_passes():
    assert judged(QUIET) == ("pass", [], [])


assert QUIET.tokens is not None and QUIET.memory is not None and QUIET.membership is not None
FOUND, MEMORY, MEMBERSHIP = QUIET.tokens[0], QUIET.memory, QUIET.membership


@pytest.mark.parametrize(
    ("change", "epsilon", "words"),
    [
        (
            {"tokens": [FOUND._replace(recall={1e-4: 0.11, 1e-3: 0.2})]},
            None,
            "11% of the tokens can be read off a.q",
        ),
        ({"memory": MEMORY._replace(extracted=0.04)}, None, "4% of the planted secrets come out whole"),
        ({"memory": MEMORY._replace(exposure=2.5)}, None, "stand out by 2.5 bits, controls by 1.4"),
        ({"membership": MEMBERSHIP._replace(epsilon_low=1.2)}, 1.0, "epsilon is at least 1.20, but 1.00 is claimed"),
    ],
)
def test_each_threshold_stops_a_payload(change, epsilon, words):
    verdict = judged(QUIET._replace(**change), epsilon=epsilon)
    assert verdict.outcome == "fail" and len(verdict.failures) == 1 and words in verdict.failures[0]


def test_thresholds_are_arguments():
    loud = QUIET._replace(memory=MEMORY._replace(exposure=2.5))
    assert judged(loud, Limits(exposure_bits=2)).outcome == "pass"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": None, "untested": "inputs depend on the position"}, "tokens were not looked for: inputs depend"),
        ({"memory": None}, "no canaries were used"),
        ({"memory": MEMORY._replace(canaries=99)}, "99 canaries were planted; a verdict needs 100"),
        ({"membership": None}, "membership was not measured"),
        ({"membership": MEMBERSHIP._replace(others=499)}, "600 tuned and 499 held-out rows"),
    ],
)
def test_too_little_is_no_pass(change, words):
    verdict = judged(QUIET._replace(**change))
    assert verdict.outcome == "unknown" and words in verdict.gaps[0]


def test_the_five_answers():
    loud = QUIET._replace(memory=MEMORY._replace(exposure=4.0))
    said = answers(SENT, loud, judged(loud))
    assert [a.question for a in said] == [
        "What is sent?", "To whom?", "What could be read from it?", "How sure is that?", "What would lower it?",
    ]  # fmt: skip
    text = {a.question: " ".join(a.lines) for a in said}
    assert "4,096 bytes of numbers, 4,400 as sent" in text["What is sent?"] and "server" in text["To whom?"]
    assert "4.0 bits" in text["What could be read from it?"] and "says nothing" in text["What could be read from it?"]
    assert "no upper bound" in text["How sure is that?"] and "at least 0.10" in text["How sure is that?"]
    assert "differential privacy" in text["What would lower it?"] and "fewer epochs" in text["What would lower it?"]
    private = {a.question: " ".join(a.lines) for a in answers(SENT, QUIET, judged(QUIET, epsilon=3.0), 3.0)}
    assert "upper bound: epsilon 3.00" in private["How sure is that?"]
    assert "differential privacy" not in private["What would lower it?"]
