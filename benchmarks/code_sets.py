"""Do the reference solutions of MBPP and HumanEval pass in our sandbox, and does broken code fail there?

    python benchmarks/code_sets.py

Every reference that does not pass here would be counted against a model; they are named.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from machine_note import machine_note

from luthier.data.reading import read
from luthier.evaluation.pass_at_k import program
from luthier.support.sandbox import Limits, execute_all

HERE = Path(__file__).parent
MBPP = HERE.parents[1] / "shared/data/mbpp/test.jsonl.gz"


def measured(rows: list[dict[str, Any]], answers: list[str]) -> dict[str, Any]:
    """Share that passes, seconds, and which fail."""
    started = time.perf_counter()
    verdicts = execute_all([program(r, a) for r, a in zip(rows, answers, strict=True)], Limits(seconds=10.0))
    names = [str(r.get("task_id", r.get("id"))) for r in rows]
    failed = {n: v.stderr.strip().splitlines()[-1:] for n, v in zip(names, verdicts, strict=True) if v.status != "ok"}
    return {"programs": len(rows), "passed": len(rows) - len(failed), "seconds": round(time.perf_counter() - started, 1),
            "failed": dict(list(failed.items())[:5])}  # fmt: skip


def main() -> None:
    """Entry point."""
    out: dict[str, Any] = {**machine_note()}
    sets = {
        "mbpp": read(str(MBPP), {"completion": "code"}, Path(), "eval")[0],
        "humaneval": read("builtin:humaneval", {}, Path(), "eval")[0],
    }
    for name, found in sets.items():
        rows = [r.values for r in found]
        out[name] = {
            "reference solutions": measured(rows, [r["completion"] for r in rows]),
            "functions that return nothing": measured(rows, ["    return None\n"] * len(rows)),
        }
        print(name, json.dumps(out[name]))
    (HERE / "results" / "code_sets.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
