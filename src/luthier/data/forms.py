"""The forms in which people keep rows, and how each becomes one of luthier's shapes. Forms that no task reads are known by name.

A form is recognised by its fields. A mapping (`data.columns`) wins over what the fields look like: a form that uses mapped fields
comes before one that does not. A row keeps the fields of one shape only, so reading, rendering and evaluation cannot choose
differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

Values = Mapping[str, Any]
MESSAGES, PAIR, LABELLED, TEXT = "messages", "prompt and completion", "text and label", "text"
TWO_LABELLED, TAGGED = "two texts and label", "words and tags"
SHAPES = {  # the fields of each shape; luthier's rows have one shape
    MESSAGES: ("messages",),
    PAIR: ("prompt", "completion"),
    TWO_LABELLED: ("text", "text_pair", "label"),
    LABELLED: ("text", "label"),
    TEXT: ("text",),
    TAGGED: ("tokens", "tags"),
}
# Two shapes are told apart by these.
SHAPE_FIELDS = frozenset({"messages", "prompt", "completion", "text", "text_pair"})
TEXT_PAIRS: tuple[tuple[str, str], ...] = (  # names of two texts that are classified together
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"), ("text_a", "text_b"), ("query", "passage"), ("question", "passage"), ("sentence_A", "sentence_B"),
)  # fmt: skip
ROLES = {  # other names of roles, as files have them
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "chatbot": "assistant", "bard": "assistant", "bing": "assistant",
    "claude": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "ipython": "tool", "function_call": "function_call",
}  # fmt: skip
WORDS = ("tokens", "words")  # names of the words of a sentence
TAGS = (
    "tags",
    "ner_tags",
    "labels",
    "ner",
    "upos",
    "pos_tags",
    "chunk_tags",
)  # names of their tags, the first one is read
TURN = {"messages.role": "role", "messages.content": "content"}  # names in data.columns for the fields of a turn


class Form(NamedTuple):
    """One way to write rows.

    name      for messages
    fields    a row of this form has all of these
    shape     what it is read as
    convert   its values with the fields of the shape; raises ValueError for values that do not fit
    optional  fields that it reads as well
    fits      a test of the values, besides their names
    """

    name: str
    fields: tuple[str, ...]
    shape: str
    convert: Callable[[Values], dict[str, Any]]
    optional: tuple[str, ...] = ()
    fits: Callable[[Values], bool] = lambda values: True


class Unread(NamedTuple):
    """A known form that the task does not read.

    name    for messages
    fields  a row of this form has all of these
    tells   fields that only this form has
    remedy  what a user can do instead
    fits    a test of the values, besides their names
    shape   what another task reads it as; empty if no task reads it
    """

    name: str
    fields: tuple[str, ...]
    tells: tuple[str, ...]
    remedy: Callable[[Values], str]
    fits: Callable[[Values], bool] = lambda values: True
    shape: str = ""

    @property
    def told(self) -> str:
        """The form for a reader, and who does not read it."""
        return f"is {self.name}, which {'this task does not read' if self.shape else 'no task here reads'}"

    def named_in(self, names: Collection[str]) -> bool:
        """True if a row with these fields may have this form. One that needs no field has one that tells it."""
        return all(n in names for n in self.fields) and bool(self.fields or any(n in names for n in self.tells))


# --- conversions ---


def _same(values: Values) -> dict[str, Any]:
    return dict(values)


def _labelled(values: Values) -> dict[str, Any]:
    """Labels that are true or false become these words; 1.0, as some tools write whole numbers, becomes 1.

    White space around a label does not count: "good " would be another class than "good".
    """
    label = values["label"].strip() if isinstance(values["label"], str) else values["label"]
    if isinstance(label, bool):
        label = "true" if label else "false"
    elif isinstance(label, float) and label.is_integer():
        label = int(label)
    elif isinstance(label, list):
        raise ValueError(f"has several labels ({str(label)[:40]}), and luthier's classification chooses one")
    elif label == "":
        raise ValueError("has an empty label")
    return {**values, "label": label}


def _two_labelled(first: str, second: str) -> Callable[[Values], dict[str, Any]]:
    """A conversion of two texts under these names, and their label."""

    def convert(values: Values) -> dict[str, Any]:
        rest = {n: v for n, v in values.items() if n not in (first, second)}
        return _labelled({**rest, "text": values[first], "text_pair": values[second]})

    return convert


def _tagged(words: str, tags: str) -> Callable[[Values], dict[str, Any]]:
    """A conversion of words and their tags under these names."""

    def convert(values: Values) -> dict[str, Any]:
        rest = {n: v for n, v in values.items() if n not in (words, tags)}
        return {**rest, "tokens": decoded(values[words], words), "tags": decoded(values[tags], tags)}

    return convert


def decoded(value: Any, kind: str) -> Any:
    """The value, or what its JSON text holds: cells of CSV and Parquet files hold lists as text. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind} is a text that is not JSON ({error})") from error


def _messages(values: Values) -> dict[str, Any]:
    turns = decoded(values["messages"], "messages")
    return {**values, "messages": [_in_roles(t) for t in turns] if isinstance(turns, list) else turns}


def _in_roles(turn: Any) -> Any:
    """A turn with the usual name of its role, where it has another one that is known: human, model."""
    role = turn.get("role") if isinstance(turn, dict) else None
    usual = ROLES.get(role.lower(), role) if isinstance(role, str) else role
    return turn if role == usual or usual == "function_call" else {**turn, "role": usual}


def _is_turns(value: Any) -> bool:
    """True for a list of turns; the text of one counts too."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{")
    return isinstance(value, list) and bool(value) and all(isinstance(t, dict) for t in value)


def _talk(values: Values) -> dict[str, Any]:
    """TRL's conversational prompt and completion: one conversation in which only the completion is trained on."""
    prompt, completion = (decoded(values[n], n) or [] for n in ("prompt", "completion"))
    before = [{**t, "weight": 0} if t.get("role") == "assistant" else t for t in map(_in_roles, prompt)]
    rest = {n: v for n, v in values.items() if n not in ("prompt", "completion")}
    return {**rest, "messages": [*before, *map(_in_roles, completion)]}


def _joined(*parts: Any) -> Any:
    """The texts that are not empty, a blank line between them; a value that is no text stays as it is, to be refused."""
    given = [p for p in parts if p is not None and p != ""]
    if not all(isinstance(p, str) for p in given):
        return next(p for p in given if not isinstance(p, str))
    return "\n\n".join(given)


def _asked(question: str, answer: str, *more: str) -> Callable[[Values], dict[str, Any]]:
    """A conversion of an instruction, further texts of the question, and its answer."""

    def convert(values: Values) -> dict[str, Any]:
        gone = {question, answer, *more, "history"}
        out = {n: v for n, v in values.items() if n not in gone}
        prompt = _joined(values[question], *(values.get(n) for n in more))
        earlier = decoded(values.get("history"), "history")
        if "history" not in values:
            return {**out, "prompt": prompt, "completion": values[answer]}
        turns: list[dict[str, Any]] = []
        for pair in earlier or []:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise ValueError("history is not a list of [question, answer]")
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        last = [{"role": "user", "content": prompt}, {"role": "assistant", "content": values[answer]}]
        return {**out, "messages": [*turns, *last]}

    return convert


def _talked(field: str) -> Callable[[Values], dict[str, Any]]:
    """A conversion of turns as {"from", "value"}, {"role", "content"} or {"input", "output"}."""

    def convert(values: Values) -> dict[str, Any]:
        turns = decoded(values[field], field)
        if not isinstance(turns, list):
            raise ValueError(f"{field} is not a list of turns")
        out = {n: v for n, v in values.items() if n != field}
        return {**out, "messages": [t for i, turn in enumerate(turns, start=1) for t in _turns(turn, i)]}

    return convert


def _turns(turn: Any, number: int) -> list[Any]:
    """The turns that an item of a conversation holds: one, or a question with its answer."""
    if not isinstance(turn, dict):
        return [turn]
    if "input" in turn and "output" in turn:
        return [{"role": "user", "content": turn["input"]}, {"role": "assistant", "content": turn["output"]}]
    if "from" not in turn:
        return [_in_roles(turn)]
    more = {n: v for n, v in turn.items() if n not in ("from", "value", "text")}
    said = turn.get("value", turn.get("text"))
    role = ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise ValueError(f"turn {number} is from {turn['from']!r}; it should be one of {', '.join(sorted(ROLES))}")
    if role != "function_call":
        return [{**more, "role": role, "content": said}]
    calls = decoded(said, f"the call of turn {number}")
    return [{**more, "role": "assistant", "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}]


def _contents(values: Values) -> dict[str, Any]:
    """Gemini's form: turns with parts, and a system instruction beside them."""
    out = {n: v for n, v in values.items() if n not in ("contents", "systemInstruction", "system_instruction")}
    instruction = values.get("systemInstruction") or values.get("system_instruction")
    listed = decoded(values["contents"], "contents")
    told = [{**instruction, "role": "system"}] if isinstance(instruction, dict) else []
    return {**out, "messages": [_of_parts(t) for t in [*told, *listed]]}


def _of_parts(turn: Any) -> Any:
    if not isinstance(turn, dict) or not isinstance(turn.get("parts"), list):
        return turn
    return _in_roles({"role": turn.get("role", "user"), "content": turn["parts"]})


# --- what is known ---

FORMS = (
    Form("messages", ("messages",), MESSAGES, _messages, ("tools", "functions", "system")),
    Form(
        "conversational prompt and completion", ("prompt", "completion"), MESSAGES, _talk, ("tools", "system"),
        lambda v: _is_turns(v["prompt"]) and _is_turns(v["completion"]),
    ),
    Form("ShareGPT", ("conversations",), MESSAGES, _talked("conversations"), ("tools", "system")),
    Form(
        "ShareGPT", ("conversation",), MESSAGES, _talked("conversation"), ("tools", "system"),
        lambda v: _is_turns(v["conversation"]),
    ),
    Form("Gemini", ("contents",), MESSAGES, _contents, (), lambda v: _is_turns(v["contents"])),
    Form("prompt and completion", ("prompt", "completion"), PAIR, _same, ("system",)),
    Form(
        "Alpaca", ("instruction", "output"), MESSAGES, _asked("instruction", "output", "input"),
        ("input", "history", "system"), lambda v: "history" in v,
    ),
    Form("Alpaca", ("instruction", "output"), PAIR, _asked("instruction", "output", "input"), ("input", "system")),
    Form(
        "Dolly", ("instruction", "response"), PAIR, _asked("instruction", "response", "context", "input"),
        ("context", "input", "system"),
    ),
    Form(
        "ms-swift", ("query", "response"), MESSAGES, _asked("query", "response"), ("history", "system"),
        lambda v: "history" in v,
    ),
    Form("ms-swift", ("query", "response"), PAIR, _asked("query", "response"), ("system",)),
    Form("two texts and label", ("text", "text_pair", "label"), TWO_LABELLED, _labelled),
    Form("text and label", ("text", "label"), LABELLED, _labelled),
    *(
        Form(f"{first}, {second} and label", (first, second, "label"), TWO_LABELLED, _two_labelled(first, second))
        for first, second in TEXT_PAIRS
    ),
    Form("text", ("text",), TEXT, _same),
    *(
        Form(TAGGED if (words, tags) == SHAPES[TAGGED] else f"{words} and {tags}", (words, tags), TAGGED, _tagged(words, tags))
        for words in WORDS
        for tags in TAGS
    ),
)  # fmt: skip

_TRAIN = "luthier trains on answers alone"
_MEDIA = ("images", "image", "audio", "videos")


def _chosen(values: Values) -> str:
    """How to train on the answers that were preferred."""
    if "messages" in values:
        mapping = "{messages: messages}"
    elif not _is_turns(values["chosen"]):
        mapping = "{completion: chosen}" if "prompt" in values else "{text: chosen}"
    elif "prompt" in values and _is_turns(values["prompt"]):
        mapping = "{completion: chosen}"
    else:  # whole conversations, perhaps with their first question beside them
        mapping = "{messages: chosen}"
    which = "messages" if "messages" in values else "answers that were chosen"
    return f"{_TRAIN}: to train on the {which}, set data.columns: {mapping}"


def _says_whether(value: Any) -> bool:
    """True for a label that says whether an answer is good, not which class a text has."""
    return isinstance(value, bool) or str(value).strip().lower() in ("true", "false")


def _has(values: Values, shape: str) -> bool:
    return all(n in values for n in SHAPES[shape])


def _always(remedy: str) -> Callable[[Values], str]:
    return lambda values: remedy


UNREAD = (
    Unread(
        "OpenAI's preference form", ("input", "preferred_output", "non_preferred_output"),
        ("preferred_output", "non_preferred_output"), _always(f"{_TRAIN}: write messages that end in the preferred answer"),
    ),
    Unread("preference data", ("chosen", "rejected"), ("chosen", "rejected"), _chosen),
    Unread(
        "unpaired preference data", ("prompt", "completion", "label"), ("label",),
        _always(
            f"{_TRAIN}: keep the rows whose label is true and leave out label; or, to train on all of them, set "
            "data.columns: {prompt: prompt, completion: completion}"
        ),
        lambda v: _says_whether(v["label"]),
    ),
    Unread(
        "stepwise supervision", ("prompt", "completions", "labels"), ("completions", "labels"),
        _always(f"{_TRAIN}: join the right steps into one completion"),
    ),
    Unread(
        "token tagging", ("tokens",), TAGS, _always("write task: token-classification"),
        lambda v: any(n in v for n in TAGS) and not any(shape != TAGGED and _has(v, shape) for shape in SHAPES), TAGGED,
    ),
    Unread(
        "axolotl's segments", ("segments",), ("segments",),
        _always("write prompt and completion, or messages with weight 0 for turns that are not trained on"),
        lambda v: not any(_has(v, shape) for shape in SHAPES),
    ),
    Unread(
        "a pair of texts with a label", ("label",), (),
        _always(
            "write task: classification, without prompt and words; or join the two texts in a column named text, or name "
            "one of them with data.columns: {text: ...}"
        ),
        lambda v: any(a in v and b in v for a, b in TEXT_PAIRS if "text" not in v) or ("text" in v and "text_pair" in v),
        TWO_LABELLED,
    ),
    Unread(
        "a prompt without an answer", ("prompt",), (), _always("add a completion"),
        lambda v: set(v) <= {"prompt", "id", "system", "tools", "source", "prompt_id"},
    ),
    Unread(
        "text with images or sound", (), _MEDIA, _always("luthier trains on text; leave the column out"),
        lambda v: any(v.get(n) for n in _MEDIA),
    ),
)  # fmt: skip
# Names of questions and answers in files of no known form: they become a proposal.
QUESTIONS = (
    "prompt", "question", "query", "instruction", "input", "inputs", "problem", "source", "document", "article",
)  # fmt: skip
ANSWERS = (
    "completion", "answer", "response", "output", "target", "targets", "solution", "summary", "highlights", "reply",
)  # fmt: skip
TEXTS = ("sentence", "content", "review", "comment", "tweet", "document", "body", "question", "text")
CLASSES = ("label", "labels", "category", "class", "intent", "sentiment", "target", "label_text", "gold_label")


class Found(NamedTuple):
    """The form of a row.

    form      as FORMS describes it
    left_out  fields of the row that would make it another form, and are therefore taken out of it
    unread    all fields of the row that belong to other forms and are not read
    """

    form: Form
    left_out: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def told(self) -> str:
        """The form for a reader."""
        read = "" if self.form.name == self.form.shape else f" (read as {self.form.shape})"
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{self.form.name}{read}{unread}"


class Known(NamedTuple):
    """What fits the names of a row's fields: forms that no task reads, and forms in the order in which they are tried."""

    unread: tuple[Unread, ...]
    forms: tuple[Found, ...]


class Finder:
    """Finds the form of rows and gives them the fields of one shape.

    shapes   that the task reads
    columns  as `data.columns`: the form that uses most of its fields wins, then the first of FORMS
    kept     fields that the recipe keeps: they stay, unless they would change the shape of the row
    """

    def __init__(
        self, shapes: Sequence[str], columns: Mapping[str, str] | None = None, kept: Collection[str] = ()
    ) -> None:
        columns = columns or {}
        self.shapes, self.kept = tuple(shapes), frozenset(kept)
        self.mapped = frozenset(n.partition(".")[0] for n in columns)
        self.sources = frozenset(columns.values())
        self._known: dict[tuple[str, ...], Known] = {}  # by the names of fields, which are few

    def read(self, values: Values) -> tuple[Found, dict[str, Any]]:
        """(form, values with the fields of its shape). Raises ValueError with a reason, LookupError for an unknown form."""
        names = tuple(values)
        known = self._known.get(names)
        if known is None:
            if len(self._known) > 1000:  # rows with names of their own: nothing to remember
                self._known.clear()
            known = self._known[names] = self._of(values)
        for unread in known.unread:
            if unread.fits(values):
                raise ValueError(f"{unread.told}; {unread.remedy(values)}")
        for found in known.forms:
            if found.form.fits(values):
                converted, out = found.form.convert(values), found.left_out
                return found, {n: v for n, v in converted.items() if n not in out} if out else converted
        raise LookupError

    def _of(self, names: Collection[str]) -> Known:
        own = {n for form in FORMS for n in form.fields}
        unread = tuple(u for u in UNREAD if u.shape not in self.shapes and u.named_in(names))
        forms = [f for f in FORMS if f.shape in self.shapes and all(n in names for n in f.fields)]
        # A stable order: that of FORMS decides the rest.
        forms.sort(key=lambda f: -sum(n in self.mapped for n in f.fields))
        said = bool(self.mapped & own)  # the user says what to read
        tells = {n for u in unread for n in u.tells} if said else set()
        return Known(() if said else unread, tuple(self._found(f, names, tells) for f in forms))

    def _found(self, form: Form, names: Collection[str], tells: Collection[str]) -> Found:
        own = {*form.fields, *form.optional, *SHAPES[form.shape]}
        of_others = {n for f in FORMS for n in f.fields if n != "label"} | set(tells)
        others = of_others.intersection(names) - own
        left_out = {n for n in others if self._must_go(n, form.shape, tells)}
        return Found(form, tuple(sorted(left_out)), tuple(sorted(others - self.sources - (self.kept - left_out))))

    def _must_go(self, name: str, shape: str, tells: Collection[str]) -> bool:
        """True for a field that would make the row another form when it is read again; a kept field, another shape."""
        if name in self.kept:
            return name in SHAPE_FIELDS and self._reshapes(name, shape)
        return name in SHAPE_FIELDS or name in tells

    def _reshapes(self, name: str, shape: str) -> bool:
        """True if rows of this shape would have another one with this field."""
        fields = {*SHAPES[shape], name}
        return next(s for s in self.shapes if fields.issuperset(SHAPES[s])) != shape


def proposal(values: Values, shapes: Sequence[str]) -> str:
    """A mapping that would give these values one of the shapes; an empty text if the names of the fields say nothing."""
    names = {str(n).lower(): n for n in values}  # Question, as spreadsheets have it
    texts = {n for n, theirs in names.items() if isinstance(values[theirs], str)}
    if PAIR in shapes:
        question = next((n for n in QUESTIONS if n in texts), None)
        answer = next((n for n in ANSWERS if n in texts and n != question), None)
        if question and answer:
            return f"data.columns: {{prompt: {names[question]}, completion: {names[answer]}}}"
    label = next((n for n in CLASSES if n in names), None)
    if TWO_LABELLED in shapes and label:
        for first, second in (("text", "text_pair"), *((a.lower(), b.lower()) for a, b in TEXT_PAIRS)):
            if first in texts and second in texts:
                return f"data.columns: {{text: {names[first]}, text_pair: {names[second]}, label: {names[label]}}}"
    if LABELLED in shapes:
        text = next((n for n in (*TEXTS, *QUESTIONS) if n in texts and n != label), None)
        if text and label:
            return f"data.columns: {{text: {names[text]}, label: {names[label]}}}"
    return ""


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth: columnar files give every object the keys of all others."""
    if isinstance(value, dict):
        return {n: without_nulls(v) for n, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def at_path(values: Values, path: str) -> Any:
    """A field of a row, or a value within one: translation.en, answers.text.0. Raises KeyError if there is none."""
    if path in values:
        return values[path]
    here: Any = values
    for step in path.split("."):
        if isinstance(here, Mapping) and step in here:
            here = here[step]
        elif isinstance(here, list) and step.isdigit() and int(step) < len(here):
            here = here[int(step)]
        else:
            raise KeyError(path)
    return here


def renamed(values: Values, columns: Mapping[str, str]) -> dict[str, Any]:
    """The values with luthier's names beside the file's, as `data.columns` says.

    Raises KeyError with the key of `columns` that names no field.
    """
    out = dict(values)
    for ours, theirs in columns.items():
        if ours in TURN:
            continue
        try:
            out[ours] = at_path(values, theirs)
        except KeyError:
            raise KeyError(ours) from None
    names = {TURN[n]: theirs for n, theirs in columns.items() if n in TURN}
    if names and isinstance(out.get("messages"), (str, list)):
        out["messages"] = [_with_names(t, names) for t in decoded(out["messages"], "messages") or []]
    return out


def _with_names(turn: Any, names: Mapping[str, str]) -> Any:
    """A turn with luthier's names of its fields."""
    if not isinstance(turn, dict):
        return turn
    rest = {n: v for n, v in turn.items() if n not in names.values()}
    return {**rest, **{ours: turn[theirs] for ours, theirs in names.items() if theirs in turn}}
