"""What a chat template writes around an answer, and the answer without it."""

from __future__ import annotations

from typing import NamedTuple

THOUGHTS = {  # what opens a thought -> what closes it
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|channel>thought": "<channel|>",
    "◁think▷": "◁/think▷",
    "Here are my reasoning steps:": "[BEGIN FINAL RESPONSE]",
}


class Wrap(NamedTuple):
    """What a template writes around an answer.

    lead     between the prompt that generation starts from and the answer: an empty thought, the name of a channel, a space
    tail     after the answer: its end token and what follows
    opened   the thought that the prompt opens; "" for none
    closes   what closes a thought in this template; "" if it knows no thoughts
    header   what the prompt ends in after a question: the beginning of the answer's turn
    """

    lead: str = ""
    tail: str = ""
    opened: str = ""
    closes: str = ""
    header: str = ""

    @property
    def is_text(self) -> bool:
        """True if it can be seen in an answer: then special tokens must be read too."""
        return bool(self.lead.strip() or self.closes)


def opened_in(prompt: str) -> str:
    """The thought that a prompt ends in; "" for none."""
    end = prompt.rstrip()
    return next((o for o in THOUGHTS if end.endswith(o)), "")


def closing_in(template: str) -> str:
    """What closes a thought in the source of a template; "" if it has no thoughts."""
    return next((c for c in THOUGHTS.values() if c in template), "")


def unwrapped(text: str, wrap: Wrap) -> tuple[str, str]:
    """(answer, thought) of a text that a model wrote.

    A thought that is not closed is no answer: the answer is then empty.
    """
    mark, openers = wrap.lead.strip(), tuple(o for o, c in THOUGHTS.items() if c == wrap.closes)
    if text.startswith(wrap.lead):
        text = text[len(wrap.lead) :]
        if mark and not text.lstrip().startswith(openers):
            return text, ""
    if wrap.closes and wrap.closes in text:
        thought, _, answer = text.rpartition(wrap.closes)
        return answer.lstrip(), _thought(thought)
    if wrap.closes and (wrap.opened or text.lstrip().startswith(openers)):
        return "", _thought(text)
    if mark.startswith("<|") and mark in text:  # the name of a channel, after others
        before, _, answer = text.rpartition(mark)
        return answer, before.strip()
    return text, ""


def without_thought(text: str, wrap: Wrap) -> str:
    """A right answer without the thought that stands before it, if the template knows thoughts."""
    return text.rpartition(wrap.closes)[2].lstrip() if wrap.closes and wrap.closes in text else text


def _thought(text: str) -> str:
    text = text.strip()
    return next((text.removeprefix(o) for o in THOUGHTS if text.startswith(o)), text).strip()
