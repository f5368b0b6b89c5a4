"""Rows to training rows: rendered, measured, and every fault counted before any work starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from luthier.data.batch import IGNORE
from luthier.data.reading import Row
from luthier.data.rendering import Renderer
from luthier.errors import RecipeError


@dataclass
class Census:
    """What was found in a set of rows."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    too_long: int = 0
    cut: int = 0
    dropped: int = 0
    unsupervised: int = 0
    duplicates: int = 0
    without_stop: int = 0
    doubled_bos: int = 0
    prompt_no_prefix: int = 0
    lengths: list[int] = field(default_factory=list)

    def limits(self) -> dict[str, int]:
        """Lengths that would keep 99% and 100% of the rows."""
        ordered = sorted(self.lengths)
        return {"99%": ordered[max(0, int(len(ordered) * 0.99) - 1)], "100%": ordered[-1]} if ordered else {}


@dataclass(frozen=True)
class Prepared:
    """Training rows with their census and a hash of their content."""

    rows: list[dict[str, Any]]
    census: Census
    digest: str


def prepare(
    rows: list[Row], renderer: Renderer, *, max_length: int, on_long: str = "refuse", on_unsupervised: str = "refuse",
    labels: dict[str | int, int] | None = None,
) -> Prepared:  # fmt: skip
    """Render every row and deal with the ones that do not fit.

    labels  class index by label, for classification rows
    Raises RecipeError naming the first row and the remedy where a fault is to be refused.
    """
    census, out, seen, digest = Census(), [], set(), hashlib.sha256()
    for row in rows:
        item = _rendered(row, renderer, labels)
        n = len(item["ids"])
        census.lengths.append(n)
        census.longest = max(census.longest, n)
        if n > max_length:
            census.too_long += 1
            shorter = _shortened(item, max_length, on_long)
            if shorter is None:
                census.dropped += on_long == "drop"
                continue
            census.cut += 1
            item = shorter
        if labels is None and all(y == IGNORE for y in item["labels"]):
            census.unsupervised += 1
            if on_unsupervised == "refuse":
                raise RecipeError(
                    row.key,
                    f"has no supervised token ({_why(row, item)})",
                    "mend the row, or set data.on_unsupervised: drop",
                )
            census.dropped += 1
            continue
        _measure(item, renderer, census, labels is not None)
        text = json.dumps(item["ids"])
        census.duplicates += text in seen
        seen.add(text)
        digest.update(text.encode())
        out.append(item)
    if census.too_long and on_long == "refuse":
        limits = census.limits()
        raise RecipeError(
            "data.max_length",
            f"{census.too_long} of {len(rows)} rows are longer than {max_length} tokens, the longest has {census.longest}",
            f"{limits['99%']} would keep 99% whole and {limits['100%']} all; or set data.on_long: drop, trim_prompt or trim_end",
        )
    if out and labels is None and census.without_stop == len(out):
        raise RecipeError(
            "data.train", "no answer ends in a stop token, so the tuned model would never stop",
            "use a chat template or a tokenizer with an end token",
        )  # fmt: skip
    return Prepared(out, census, digest.hexdigest())


def _rendered(row: Row, renderer: Renderer, labels: dict[str | int, int] | None) -> dict[str, Any]:
    if labels is not None:
        ids = renderer.tokenizer(row.values["text"])["input_ids"]
        return {
            "ids": ids,
            "labels": [IGNORE] * len(ids),
            "key": row.key,
            "row": {"label": labels[row.values["label"]]},
        }
    try:
        return renderer.render(row.values, row.key)
    except ValueError as error:
        raise RecipeError(row.key, str(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("jinja2"):  # a template's own refusal: roles out of order, say
            raise RecipeError(row.key, f"the chat template refuses it ({error})") from error
        raise


def _shortened(item: dict[str, Any], limit: int, how: str) -> dict[str, Any] | None:
    if how in ("refuse", "drop"):
        return None
    over = len(item["ids"]) - limit
    front = sum(item["token"]["prompt"]) if "token" in item else 0
    # trim_prompt takes from the middle of what stands before the answer: its end holds the turn's opening.
    start = max(0, front - over - 8) if how == "trim_prompt" and front >= over else limit
    cut = slice(start, start + over) if start != limit else slice(limit, None)
    keep = lambda values: values[: cut.start] + (values[cut.stop :] if cut.stop is not None else [])  # noqa: E731
    token = {k: keep(list(v)) for k, v in item.get("token", {}).items()}
    return {**item, "ids": keep(item["ids"]), "labels": keep(item["labels"]), "token": token}


def _measure(item: dict[str, Any], renderer: Renderer, census: Census, classes: bool) -> None:
    ids, labels = item["ids"], item["labels"]
    census.rows += 1
    census.tokens += len(ids)
    supervised = [y for y in labels if y != IGNORE]
    census.supervised += 1 if classes else len(supervised)
    bos = renderer.tokenizer.bos_token_id
    census.doubled_bos += len(ids) > 1 and bos is not None and ids[0] == bos and ids[1] == bos
    if not classes:
        census.without_stop += not supervised or supervised[-1] not in renderer.stop_ids
        whole = renderer.tokenizer(renderer.tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
        first = next((i for i, y in enumerate(labels) if y != IGNORE), len(ids))
        census.prompt_no_prefix += whole[:first] != ids[:first]


def _why(row: Row, item: dict[str, Any]) -> str:
    if row.values.get("completion") == "" or (not item["ids"]):
        return "its answer is empty"
    if "messages" in row.values and not any(t["role"] == "assistant" for t in row.values["messages"]):
        return "it has no assistant turn"
    return "its answer was cut off or is empty"
