"""Columns beside a row's ids and labels: numbers for a row or a token, spans of tokens, and texts.

A column has one type over all rows. One pass over the kept fields finds the types, so that the contents of a batch do not
depend on the order of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from luthier.support.errors import RecipeError

Level = Literal["row", "token", "span", "text"]
Span = tuple[int, int, int]  # first token, the token after the last, type
RESERVED = ("label", "slot", "words")  # row columns with a meaning of their own
TYPES = {"int64": pa.int64(), "float32": pa.float32()}
LARGEST = float(np.finfo(np.float32).max)


class Column(NamedTuple):
    """The name of a column and how it is stored.

    level  "row": a number a row, or a vector of `width` numbers; "token": a number a token; "span": (start, end, type)
           of tokens; "text": a text a row, which never becomes a tensor
    names  the texts of a span's types, by number; empty if the user gave numbers
    """

    level: Level
    name: str
    type: str = "float32"
    width: int = 0
    names: tuple[str, ...] = ()

    @property
    def field(self) -> pa.Field:
        """How Arrow stores it."""
        one = TYPES.get(self.type, pa.string())
        vector = pa.list_(one, self.width) if self.width else one
        kinds = {"row": vector, "token": pa.list_(one), "span": pa.list_(pa.int64()), "text": pa.string()}
        metadata = {"names": json.dumps(self.names), "type": self.type, "width": str(self.width)}
        return pa.field(f"{self.level}:{self.name}", kinds[self.level], metadata=metadata)

    def cell(self, value: Any) -> Any:
        """A value as Arrow takes it: the three numbers of each span, one after another."""
        return [int(n) for span in value for n in span] if self.level == "span" else value

    def value(self, cell: pa.Scalar) -> Any:
        """A stored value as `collate` takes it: a number, a text, or an array of its own."""
        if self.level == "text" or (self.level == "row" and not self.width):
            return cell.as_py()
        values = cell.values.to_numpy(zero_copy_only=False).copy()  # the map itself cannot be written to
        return values.reshape(-1, 3) if self.level == "span" else values

    @classmethod
    def of(cls, field: pa.Field) -> Column | None:
        """The column of a stored field; None for the fields that every row has."""
        level, colon, name = field.name.partition(":")
        if not colon:
            return None
        more = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
        return cls(level, name, more["type"], int(more["width"]), tuple(json.loads(more["names"])))


class Carried(NamedTuple):
    """The fields of the user's rows that are kept.

    keep   names of fields; a number becomes a row column, a list of numbers a vector, a text stays a text
    spans  a field with [[start, end, label], ...] over the characters of the answer; it becomes spans of tokens
    fill   the value for rows without a field; a row without field and fill is refused
    """

    keep: tuple[str, ...] = ()
    spans: str | None = None
    fill: Mapping[str, Any] = {}

    @property
    def fields(self) -> tuple[str, ...]:
        return self.keep if self.spans is None else (*self.keep, self.spans)

    @property
    def content(self) -> tuple[Any, ...]:
        """Changes with everything above."""
        return (self.keep, self.spans, json.dumps(self.fill, sort_keys=True, default=str))

    def value(self, key: str, values: Mapping[str, Any], name: str) -> Any:
        """A row's value of a field. Raises RecipeError with the row's key if it has none."""
        found = values.get(name)
        found = self.fill.get(name) if found is None else found
        if found is None:
            asks = "data.spans" if name == self.spans else "data.keep"
            has = ", ".join(sorted(map(str, values))) or "no fields"
            raise RecipeError(
                key, f"has no field {name!r}, which {asks} names; it has {has}",
                f"correct the row, or write data.fill: {{{name}: VALUE}}",
            )  # fmt: skip
        return found


class Survey:
    """The types of the kept fields over many rows. A row with another type than the rows before it is refused."""

    def __init__(self, carried: Carried) -> None:
        self.carried = carried
        self._found: dict[str, tuple[Column, str]] = {}  # by field: the column so far, and the first row's key
        self._labels: set[str] = set()

    def look(self, key: str, values: Mapping[str, Any]) -> None:
        """Look at a row. Raises RecipeError with its key, the field and the value if the type differs. A refused row does not
        count for the rows after it.
        """
        found, labels = {}, set[str]()
        for name in self.carried.fields:
            value = self.carried.value(key, values, name)
            column = span_column(key, name, value) if name == self.carried.spans else column_of(key, name, value)
            labels |= set(column.names)
            before, first = self._found.get(name, (column, key))
            found[name] = (_both(before, column, first, key), first)
        self._found |= found
        self._labels |= labels

    def columns(self) -> list[Column]:
        """The columns of all rows that were looked at, in the recipe's order."""
        found = [self._found[name][0] for name in self.carried.fields if name in self._found]
        names = tuple(sorted(self._labels))
        return [c._replace(type="int64", names=names) if c.level == "span" else c for c in found]


def column_of(key: str, name: str, value: Any) -> Column:
    """The column of a value. Raises RecipeError for a value that fits no column."""
    if isinstance(value, str):
        return Column("text", name, "string")
    if isinstance(value, list) and value:
        for number in value:
            _number(key, name, number)
        return Column("row", name, "float32", len(value))
    return Column("row", name, _number(key, name, value))


def _number(key: str, name: str, value: Any) -> str:
    """The type of a number. Raises RecipeError for other values, and for numbers that no tensor holds."""
    if _whole(value):
        return "int64"
    if isinstance(value, float) and abs(value) <= LARGEST:
        return "float32"
    raise RecipeError(
        key, f"{name} is {str(value)[:40]!r}", "a kept field holds a finite number, numbers or a text in every row"
    )


def span_column(key: str, name: str, value: Any) -> Column:
    """The column of a row's spans, with their labels as names. Raises RecipeError if they are not [[start, end, label], ...]."""
    good = isinstance(value, list) and all(
        isinstance(s, list) and len(s) == 3 and all(_whole(n) for n in s[:2]) and (_whole(s[2]) or isinstance(s[2], str))
        for s in value
    )  # fmt: skip
    if not good:
        raise RecipeError(key, f"{name} is {str(value)[:60]!r}", "write [[start, end, label], ...] in characters")
    labels = [s[2] for s in value]
    texts = tuple({x for x in labels if isinstance(x, str)})
    if texts and any(_whole(x) for x in labels):
        raise RecipeError(
            key, f"{name} has labels that are texts and labels that are numbers", "write one or the other"
        )
    return Column("span", name, "string" if texts else "int64" if labels else "", names=texts)


def _both(before: Column, now: Column, first: str, key: str) -> Column:
    """The column that holds both; whole numbers become fractions if the other column has fractions."""
    if before.level == "span":  # a row without spans has no type of labels
        before, now = (before if before.type else now), (now if now.type else before)
    numbers = before.level == "row" == now.level and before.width == now.width
    if not numbers and before[:4] != now[:4]:
        raise RecipeError(
            key, f"{now.name} is {_told(now)}, in {first} it is {_told(before)}", "give all rows the same type"
        )
    return now if before.type == "int64" else before


def _told(column: Column) -> str:
    if column.level == "span":
        return "spans with texts as labels" if column.type == "string" else "spans with numbers as labels"
    if column.level == "text":
        return "a text"
    return f"{column.width} numbers" if column.width else "a number"


def _whole(value: Any) -> bool:
    """True for whole numbers of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def arrow_type(values: np.ndarray) -> str:
    """The stored type of an array's numbers."""
    return "float32" if values.dtype.kind == "f" else "int64"


def cells(items: Sequence[Mapping[str, Any]], column: Column) -> pa.Array:
    """One column of rendered rows. Raises RecipeError with the key of the first row that lacks it."""
    out = []
    for item in items:
        held: Mapping[str, Any] = item.get(column.level, {})
        if column.name not in held:
            raise RecipeError(item["key"], f"has no {column.level} column {column.name!r}", "give it to all rows")
        out.append(column.cell(held[column.name]))
    return pa.array(out, column.field.type)


def columns_in(schema: Iterable[pa.Field]) -> list[Column]:
    """The columns except those that every row has."""
    return [c for c in map(Column.of, schema) if c is not None]
