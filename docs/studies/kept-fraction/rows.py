"""Requests to function calls: Snips, from shared/data (or $LUTHIER_DATA); a second copy with a part of the calls dealt anew."""

import gzip
import json
import os
from pathlib import Path

from luthier.support.rng import Streams

DATA = Path(os.environ.get("LUTHIER_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
WRONG = 0.3


def write(folder: Path) -> None:
    """train-clean and train-wrong (300 rows each, the same requests), valid and eval (100 each, clean)."""
    folder.mkdir(parents=True)
    train = _rows("train", 300)
    _put(folder / "train-clean.jsonl", train)
    _put(folder / "train-wrong.jsonl", corrupted(train))
    _put(folder / "valid.jsonl", _rows("valid", 100))
    _put(folder / "eval.jsonl", _rows("test", 100))


def corrupted(rows: list[dict]) -> list[dict]:
    """Calls of that share move on by one place among the drawn rows."""
    drawn = Streams(0).at("corrupt").permutation(len(rows))[: round(WRONG * len(rows))].tolist()
    out = [dict(r) for r in rows]
    for here, other in zip(drawn, [*drawn[1:], *drawn[:1]], strict=True):
        out[here]["completion"] = rows[other]["completion"]
    return out


def _rows(split: str, count: int) -> list[dict]:
    with gzip.open(DATA / "snips" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    drawn = Streams(0).at("rows", split).permutation(len(rows))[:count]
    return [{"prompt": rows[i]["text"], "completion": rows[i]["call"]} for i in drawn]


def _put(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
