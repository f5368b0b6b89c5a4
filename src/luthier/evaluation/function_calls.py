"""Function calls: is it the right function, with the right arguments, in the right order?"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from luthier.data.store import Row
from luthier.evaluation.base import Answering, Exam, Question
from luthier.evaluation.measures import Measure, mean
from luthier.evaluation.text import equal_json
from luthier.method import Source, Traits
from luthier.support.errors import LuthierError

TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)  # Hermes, Qwen
MARKED = re.compile(r"^\s*(\[TOOL_CALLS\]|<\|python_tag\|>)\s*")  # Mistral, Llama
LEFT_OUT = ""  # among the accepted values of an argument: the argument may be left out


class Call(NamedTuple):
    """A function's name, and what it accepts for each argument."""

    name: str
    arguments: Mapping[str, Any]


class Judged(NamedTuple):
    """A judged answer: the share of wanted calls whose name is there, the share with right arguments, the share of steps in the
    wanted order, and whether all is right.
    """

    name: float
    arguments: float
    order: float
    right: bool


def calls_of(text: str, name_key: str, arguments_key: str | None) -> list[Call] | None:
    """The calls in a text: a JSON object, a list of them, or objects in the marks of a chat template. None for other texts.

    arguments_key  None: an object's other keys are its arguments
    """
    tagged = TAGGED.findall(text)
    found = [_value(t) for t in tagged or [MARKED.sub("", text, count=1)]]
    if any(v is None for v in found):
        return None
    value = found if tagged else found[0]
    items = value if isinstance(value, list) else [value]
    out = []
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get(name_key), str):
            return None
        rest = {k: v for k, v in item.items() if k != name_key}
        given = "parameters" if arguments_key == "arguments" and "arguments" not in item else arguments_key
        arguments = rest if given is None else item.get(given, {})
        if isinstance(arguments, str):  # some interfaces write arguments as text
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        out.append(Call(item[name_key], arguments))
    return out


def _value(text: str) -> Any:
    """The value of a JSON text; None for other texts."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def accepted_calls(row: Row, column: str) -> list[Call]:
    """The calls that a row accepts: a list of {name: {argument: [accepted values]}}. Raises LuthierError for anything else."""
    listed = row.values.get(column)
    out = []
    for item in listed if isinstance(listed, list) else [None]:
        pairs = list(item.items()) if isinstance(item, dict) else []
        if len(pairs) != 1 or not _lists_values(pairs[0][1]):
            raise LuthierError(f"{row.key}: {column} is not a list of {{name: {{argument: [values]}}}}; write it so")
        out.append(Call(*pairs[0]))
    return out


def _lists_values(arguments: Any) -> bool:
    return isinstance(arguments, dict) and all(isinstance(values, list) for values in arguments.values())


def agrees(said: Mapping[str, Any], wanted: Mapping[str, Any], listed: bool) -> bool:
    """True if every argument has an accepted value and no argument is made up.

    listed  `wanted` holds for each argument the list of accepted values; "" in the list: the argument may be left out
    """
    accepted = {k: v if listed else [v] for k, v in wanted.items()}
    if not set(said) <= set(accepted):
        return False
    missing = [k for k in accepted if k not in said]
    return all(LEFT_OUT in accepted[k] for k in missing) and all(
        any(equal_json(said[k], v, trimmed=True) for v in accepted[k]) for k in said
    )


def judge(said: Sequence[Call] | None, wanted: Sequence[Call], listed: bool = False, ordered: bool = True) -> Judged:
    """Match each wanted call with the first unused call that agrees with it, or else with the first of its name."""
    if said is None:
        return Judged(0.0, 0.0, 0.0, False)
    free, places = list(range(len(said))), []
    for w in wanted:  # those that agree come first, so that another call of the same name does not take their place
        same = [i for i in free if said[i].name == w.name and agrees(said[i].arguments, w.arguments, listed)]
        places.append(same[0] if same else None)
        if same:
            free.remove(same[0])
    whole = [p is not None for p in places]
    named = list(whole)
    for j, w in enumerate(wanted):
        if not whole[j] and (same := [i for i in free if said[i].name == w.name]):
            named[j], places[j] = True, same[0]
            free.remove(same[0])
    taken = [p for p in places if p is not None]
    steps = [a < b for a, b in pairwise(taken)]
    order = sum(steps) / len(steps) if steps else float(bool(taken) or not wanted)
    complete = all(whole) and len(said) == len(wanted) and (order == 1.0 or not ordered)
    n = max(len(wanted), 1)
    return Judged(sum(named) / n if wanted else 1.0, sum(whole) / n if wanted else 1.0, order, complete)


class FunctionCalls(Answering):
    """Generated calls compared with the right ones: the name, the arguments, the order, and all of these together.

    A right call is the answer itself (JSON, one call or a list, or a turn's `tool_calls` as the chat template writes them), or
    the row's column `accepted_column`: a list of {name: {argument: [accepted values]}}, as in the Berkeley leaderboard, where
    "" among the values means that the argument may be left out. An answer that is not JSON is wrong in everything.
    Made-up arguments and calls are wrong.
    Cost: one generated answer for each question.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "The Berkeley Function Calling Leaderboard", 2025, "https://proceedings.mlr.press/v267/patil25a.html"
    )

    name_key: str = "name"
    """Key of a call that holds the function's name."""
    arguments_key: str | None = "arguments"
    """Key of a call that holds its arguments; null: its other keys are the arguments."""
    accepted_column: str | None = None
    """Column of the rows that lists accepted values, instead of the answer."""
    ordered: bool = True
    """Several calls must come in the wanted order."""

    def names(self) -> tuple[str, ...]:
        return ("call_right", "call_name", "call_arguments", "call_order")

    def evaluate(self, exam: Exam) -> list[Measure]:
        questions, replies = self.replies(exam)
        judged = []
        for q, reply in zip(questions, replies, strict=True):
            said = calls_of(reply, self.name_key, self.arguments_key)
            options = [judge(said, w, self.accepted_column is not None, self.ordered) for w in self._wanted(q)]
            judged.append(max(options, key=lambda j: (j.right, j.arguments, j.name)))
        keys = tuple(q.key for q in questions)
        shares = [("call_name", [j.name for j in judged]), ("call_arguments", [j.arguments for j in judged])]
        out = [mean("call_right", [j.right for j in judged], keys, unit="share of answers", judges=True)]
        out += [mean(name, values, keys, unit="share of calls") for name, values in shares]
        return [*out, mean("call_order", [j.order for j in judged], keys, unit="share of steps")]

    def _wanted(self, question: Question) -> list[list[Call]]:
        """The lists of calls that count as right. Raises LuthierError with the row if the wanted answer is not a call."""
        if self.accepted_column is not None:
            return [accepted_calls(question.row, self.accepted_column)]
        out = []
        for reference in question.references:
            found = calls_of(reference, self.name_key, self.arguments_key)
            if found is None:
                raise LuthierError(
                    f"{question.row.key}: the wanted answer {reference[:60]!r} is not a call in JSON; write one, or a list"
                )
            out.append(found)
        return out
