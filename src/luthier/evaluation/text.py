"""When two texts count as the same answer."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from typing import Any

FORMS = ("text", "caseless", "normalised", "contains", "number", "json")
_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty"""
_NUMBERS = {word: str(n) for n, word in enumerate(_WORDS.split())}
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, number words as digits, single spaces."""
    words = text.lower().translate(_NO_PUNCTUATION).split()
    return " ".join(_NUMBERS.get(w, w) for w in words if w not in ("a", "an", "the"))


def last_number(text: str) -> float | None:
    """The last number written in the text; thousands may be set apart by commas."""
    found = [m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    return float(found[-1].replace(",", "")) if found else None


def token_f1(answer: str, wanted: str) -> float:
    """F1 of the words of the two normalised texts; 1 for two empty ones."""
    a, w = Counter(normalised(answer).split()), Counter(normalised(wanted).split())
    if not a or not w:
        return float(a == w)
    common = sum((a & w).values())
    return 2 * common / (sum(a.values()) + sum(w.values()))


def matches(answer: str, wanted: str, form: str) -> bool:
    """True if the answer counts as right.

    form  "text": equal after trimming; "caseless": also in lower case; "normalised": equal when normalised; "contains": the
    normalised answer contains the right one as whole words; "number": the last numbers are equal; "json": equal values
    """
    match form:
        case "text":
            return answer.strip() == wanted.strip()
        case "caseless":
            return answer.strip().lower() == wanted.strip().lower()
        case "normalised":
            return normalised(answer) == normalised(wanted)
        case "contains":
            return bool(normalised(wanted)) and f" {normalised(wanted)} " in f" {normalised(answer)} "
        case "number":
            said, right = last_number(answer), last_number(wanted)
            return said is not None and right is not None and abs(said - right) <= 1e-9 * max(1.0, abs(right))
        case "json":
            return _same_json(answer, wanted)
    raise ValueError(f"there is no form {form!r}; there are {', '.join(FORMS)}")


def _same_json(answer: str, wanted: str) -> bool:
    try:
        return equal_json(json.loads(answer), json.loads(wanted))
    except (ValueError, RecursionError):
        return False


def equal_json(a: Any, b: Any, trimmed: bool = False) -> bool:
    """True for equal JSON values. 2 equals 2.0, but true does not equal 1.

    trimmed  space around texts does not count
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, str) and isinstance(b, str):
        return a.strip() == b.strip() if trimmed else a == b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(equal_json(x, y, trimmed) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal_json(a[k], b[k], trimmed) for k in a)
    return bool(a == b)
