"""Ollama's Modelfile: where the weights are, how a conversation becomes a prompt, where an answer stops."""

from __future__ import annotations

from luthier.data.rendering import Renderer

SYSTEM, USER, ANSWER = "luthierSYSTEM", "luthierUSER", "luthierANSWER"


def modelfile(renderer: Renderer, file: str) -> str:
    """The text of a Modelfile. Where no template of Ollama's says what the chat template does, a comment says so."""
    lines = [f"FROM ./{file}"]
    template = ollama_template(renderer)
    if template is None:
        lines.append(
            "# The chat template has no counterpart in Ollama's language; send prompts rendered elsewhere (raw: true)."
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    if renderer.system:
        lines.append(f'SYSTEM """{renderer.system}"""')
    stops = (renderer.tokenizer.decode([i]) for i in renderer.stop_ids)
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop and "\n" not in stop]
    return "\n".join(lines) + "\n"


def ollama_template(renderer: Renderer) -> str | None:
    """The chat template in the language of Ollama (Go's text/template); None if it cannot be said there.

    It is read off renderings of conversations and tested on another one. The first token of a text is left out, because
    llama.cpp adds it.
    """
    if renderer.plain:
        lead = "{{ if .System }}{{ .System }}\n\n{{ end }}"
        return lead + "{{ .Prompt }}{{ .Response }}"
    try:
        pieces = _pieces(renderer)
    except (ValueError, IndexError, TypeError):  # a template refuses a role, or leaves a text out
        return None
    if pieces is None or any('"""' in p or "{{" in p for p in pieces.values()):
        return None
    before_user, before_answer, after_answer = pieces["user"], pieces["answer"], pieces["end"]
    system = pieces.get("system")
    head = "" if system is None else "{{ if .System }}" + system.replace(SYSTEM, "{{ .System }}") + "{{ end }}"
    turn = (
        f'{{{{ if eq .Role "user" }}}}{before_user}{{{{ .Content }}}}{before_answer}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{after_answer}{{{{ end }}}}'
    )
    return f"{pieces['start']}{head}{{{{ range .Messages }}}}{turn}{{{{ end }}}}"


def _pieces(renderer: Renderer) -> dict[str, str] | None:
    """The texts around contents: start, system (with its place for the content), user, answer, end."""
    one = [{"role": "user", "content": USER}]
    said = {"role": "assistant", "content": ANSWER}
    single, pair = _text(renderer, one), _text(renderer, [*one, said, *one])
    start_and_user, before_answer = single.split(USER)
    first, between = pair.split(ANSWER)
    after_answer, user, last = _cut_again(between, start_and_user, before_answer)
    if first != single or last != before_answer:
        return None
    start = start_and_user.removesuffix(user)
    if start + user != start_and_user:
        return None
    out = {"start": _without_first(renderer, start), "user": user, "answer": before_answer, "end": after_answer}
    found = _system(renderer, start, single)
    return out if found is None else {**out, "system": found}


def _cut_again(between: str, start_and_user: str, before_answer: str) -> tuple[str, str, str]:
    """Text between two answers -> (end of the answer, start of the user's turn, end of the user's turn)."""
    before, last = between.split(USER)
    common = next(n for n in range(len(before) + 1) if start_and_user.endswith(before[n:]))
    return before[:common], before[common:], last


def _system(renderer: Renderer, start: str, single: str) -> str | None:
    """What a system message with the text SYSTEM adds between the start and the first turn; None if it stands elsewhere."""
    try:
        text = _text(renderer, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}])
    except (ValueError, TypeError):
        return None
    rest = single.removeprefix(start)
    if SYSTEM not in text or not text.startswith(start) or not text.endswith(rest):
        return None
    return text[len(start) : len(text) - len(rest)]


def _text(renderer: Renderer, turns: list[dict[str, str]]) -> str:
    import jinja2

    try:
        text: str = renderer.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=turns[-1]["role"] == "user", **renderer.options
        )
    except jinja2.TemplateError as error:
        raise ValueError(str(error)) from error
    return text


def _without_first(renderer: Renderer, start: str) -> str:
    first = renderer.tokenizer.bos_token
    return start.removeprefix(first) if first else start
