"""The turns of a conversation as files hold them: content as text, as parts or null, calls of tools, weights.

`template_turn` gives the form that chat templates of transformers expect: content as text, arguments of calls as objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.support.errors import RecipeError

ASSISTANT = "assistant"
OURS = frozenset({"weight", "function_call"})  # read by luthier, never by a template


def content_text(content: Any) -> str:
    """The text of a turn's content: a text, a list of parts with text, or null."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def told_by(turn: Mapping[str, Any]) -> str:
    """Everything that a turn says: its text, its thoughts and the functions that it calls."""
    thoughts = (turn.get(n) or "" for n in ("reasoning_content", "reasoning", "thinking"))
    calls = (str(call["function"].get("name")) for call in calls_of(turn))
    return " ".join([content_text(turn.get("content")), *map(str, thoughts), *calls])


def supervised(turn: Mapping[str, Any]) -> bool:
    """True for a turn to train on: the assistant's, without weight 0."""
    return turn["role"] == ASSISTANT and turn.get("weight") != 0


def calls_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a turn, each as {"function": {"name", "arguments"}, ...}, with arguments as an object."""
    calls = turn.get("tool_calls") or []
    if turn.get("function_call"):  # the older form of one call
        calls = [*calls, {"type": "function", "function": turn["function_call"]}]
    out = []
    for call in calls:
        whole = call if isinstance(call.get("function"), Mapping) else {"type": "function", "function": call}
        function = whole["function"]
        out.append({**whole, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return out


def _arguments(given: Any) -> Any:
    """Arguments of a call; a text holds them in JSON. Raises ValueError for a text that is no JSON."""
    if isinstance(given, str):
        return json.loads(given) if given.strip() else {}
    return {} if given is None else given


def template_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn in the form for chat templates. Keys without a value are left out, as transformers does."""
    out = {k: v for k, v in turn.items() if v is not None and k not in OURS}
    if "content" in out:
        out["content"] = content_text(out["content"])
    out.pop("tool_calls", None)
    if calls := calls_of(turn):
        out["tool_calls"] = calls
    if out["role"] == "function":
        out["role"] = "tool"
    return out


def tools_of(values: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row: its column `tools`, as a list or as JSON text; None if it has none. Raises ValueError for bad JSON."""
    tools = values.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    if not tools and values.get("functions"):  # the older name
        functions = values["functions"]
        functions = json.loads(functions) if isinstance(functions, str) else functions
        tools = [{"type": "function", "function": f} for f in functions]
    return tools or None


def last_answer(turns: Sequence[Mapping[str, Any]]) -> int | None:
    """The place of the answer that a conversation ends in; results of tools may follow it. None if it ends in another turn."""
    for i in range(len(turns) - 1, -1, -1):
        if turns[i]["role"] == ASSISTANT:
            return i
        if turns[i]["role"] not in ("tool", "function"):
            return None
    return None


def until_answer(values: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the results of tools that follow its last answer."""
    turns = values.get("messages")
    last = None if turns is None else last_answer(turns)
    return dict(values) if turns is None or last is None else {**values, "messages": turns[: last + 1]}


def check_messages(key: str, values: Mapping[str, Any]) -> None:
    """Raises RecipeError with the row's key and the turn for messages that cannot be rendered as text."""
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise RecipeError(key, "messages is not a list of turns", 'write [{"role": "user", "content": ...}, ...]')
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise RecipeError(
                key, f"turn {number} has no role and content as text", 'write {"role": "user", "content": "..."}'
            )
        _check_content(key, number, turn)
        _check_calls(key, number, turn)
        weight = turn.get("weight")
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise RecipeError(key, f"turn {number} has weight {weight!r}", "a turn's weight is 0 or 1")
    try:
        tools = tools_of(values)
    except (ValueError, TypeError) as error:
        raise RecipeError(key, f"tools is not JSON ({error})", "write a list of objects") from error
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools)):
        raise RecipeError(key, f"tools is {str(tools)[:40]!r}", "write a list of objects, one for each tool")


def _check_content(key: str, number: int, turn: Mapping[str, Any]) -> None:
    content = turn.get("content")
    if isinstance(content, str) or (content is None and (turn.get("tool_calls") or turn.get("function_call"))):
        return
    if not isinstance(content, list) or not content:
        raise RecipeError(
            key, f"turn {number} has no role and content as text", 'write {"role": "user", "content": "..."}'
        )
    for part in content:
        if isinstance(part, str) or (
            isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        ):
            continue
        kind = part.get("type", "unknown") if isinstance(part, dict) else type(part).__name__
        raise RecipeError(
            key,
            f"turn {number} holds a part of type {kind!r}",
            "luthier trains on text; leave out rows with other parts",
        )


def _check_calls(key: str, number: int, turn: Mapping[str, Any]) -> None:
    calls, old = turn.get("tool_calls"), turn.get("function_call")
    listed = [*(calls if isinstance(calls, list) else [calls] * (calls is not None)), *([] if old is None else [old])]
    for call in listed:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            what = f"turn {number} has the call {str(call)[:40]!r}, which names no function"
            raise RecipeError(key, what, 'write {"function": {"name": "...", "arguments": {...}}}')
        try:
            arguments = _arguments(function.get("arguments"))
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            what = f"turn {number} calls {function['name']} with {str(function.get('arguments'))[:40]!r}"
            raise RecipeError(key, what, "write the arguments as an object, or as its JSON text")
