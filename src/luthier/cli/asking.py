"""`luthier generate`: what is asked, how answers are drawn, and a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.cli.shared import to_json
from luthier.method.building import method
from luthier.support.errors import LuthierError


def changes(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """The keys of a run's recipe that these options change."""
    out: dict[str, Any] = {} if seed is None else {"seed": seed}
    if temperature == 0:
        if top_p is not None:
            raise LuthierError("--top-p: is not read with --temperature 0, which draws nothing; leave one of them out")
        return {**out, "decode": method("decode", "greedy", "command line")}
    fields = {"temperature": temperature, "top_p": top_p}
    drawn = {name: value for name, value in fields.items() if value is not None}
    if drawn:
        out["decode"] = method("decode", {"sample": drawn}, "command line")
    return out


def lines(prompts: Sequence[str] | None) -> list[str]:
    """The prompts of the command line, or the lines of standard input. Raises LuthierError if there are none."""
    found = [line.rstrip("\n") for line in sys.stdin] if prompts is None else list(prompts)
    asked = [text for text in found if text.strip()]
    if not asked:
        raise LuthierError("generate: there is nothing to ask; write prompts, or give lines on standard input")
    for text in asked:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python keeps bytes that it cannot read as halves of characters
            what = f"generate: {text!r} holds bytes that are no text in the encoding of this terminal"
            raise LuthierError(f"{what}; set the variable LANG to C.UTF-8, and write UTF-8") from error
    return asked


def converse(folder: Path, max_new_tokens: int, allow_code: bool, changed: dict[str, Any], as_json: bool) -> None:
    """Answer each line of standard input as the next turn, until it ends."""
    from luthier.tuned.open import Conversation, open_run

    talk = Conversation(open_run(folder, allow_code, **changed), max_new_tokens)
    terminal = sys.stdin.isatty()
    if terminal:
        print("One line is a turn; /new begins again, Ctrl-D ends.", file=sys.stderr)
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip() == "/new":
            talk.turns = []
        elif line.strip():
            answer = talk.say(line.rstrip("\n"))
            print(to_json({"prompt": line.rstrip("\n"), "answer": answer}) if as_json else answer, flush=True)
