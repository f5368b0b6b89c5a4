"""Requests and calls; in a part of the training rows the calls are dealt out anew among themselves."""

import json
from pathlib import Path

from luthier.data.builtin.requests import demo_rows
from luthier.support.rng import Streams


def write(folder: Path) -> None:
    """train-0, -20, -40: that percentage has the call of another row; valid and eval are clean."""
    folder.mkdir(parents=True)
    train, evaluated = (
        [{"prompt": r["prompt"], "completion": r["answer"]} for r in rows] for rows in demo_rows(0, train=600, test=100)
    )
    for percent in (0, 20, 40):
        _put(folder / f"train-{percent}.jsonl", corrupted(train[:500], percent / 100))
    _put(folder / "valid.jsonl", train[500:])
    _put(folder / "eval.jsonl", evaluated)


def corrupted(rows: list[dict], share: float) -> list[dict]:
    """Answers of that share move on by one place among the drawn rows, so each of them is somebody else's."""
    drawn = Streams(0).at("corrupt").permutation(len(rows))[: round(share * len(rows))].tolist()
    out = [dict(r) for r in rows]
    for here, other in zip(drawn, [*drawn[1:], *drawn[:1]], strict=True):
        out[here]["completion"] = rows[other]["completion"]
    return out


def _put(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
