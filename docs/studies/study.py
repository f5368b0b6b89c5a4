"""Carry out a study: make its rows, run its comparisons, and write the tables into its page.

    python docs/studies/study.py corrupted-targets            # goes on where it was
    python docs/studies/study.py corrupted-targets --dry-run  # what would it take?
    python docs/studies/study.py corrupted-targets recipe.max_steps=100 --processes 4  # larger, for a GPU

A study is a folder here: `rows.py` writes what its comparisons train on, and each .yaml is one `luthier compare`.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNS = Path("runs/studies")
START, END = "<!-- measured: made by study.py -->", "<!-- end -->"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Carry out a study.")
    parser.add_argument("name", choices=sorted(p.name for p in HERE.iterdir() if (p / "rows.py").exists()))
    parser.add_argument("--dry-run", action="store_true", help="Only say what it would take.")
    parser.add_argument("--so-far", action="store_true", help="Write what is finished; train nothing.")
    parser.add_argument("--processes", help="Runs side by side; as cores and memory allow by default.")
    parser.add_argument("overrides", nargs="*", help="Keys of the comparisons to change: recipe.max_steps=100.")
    asked = parser.parse_args()
    place = HERE / asked.name
    if not (place / "rows").exists():
        runpy.run_path(str(place / "rows.py"))["write"](place / "rows")
    more = [*asked.overrides, *(["--processes", asked.processes] if asked.processes else [])]
    more += ["--so-far"] if asked.so_far else []
    found = {f.stem: compared(f, asked.name, asked.dry_run, more) for f in sorted(place.glob("*.yaml"))}
    if not asked.dry_run:
        made = " ".join(["python docs/studies/study.py", asked.name, *asked.overrides])
        tables = [f"Made by `{made}`, {where(asked.name)}.\n", *(table(*item) for item in found.items())]
        put(HERE / f"{asked.name}.md", "\n".join(tables))


def compared(file: Path, study: str, dry: bool, more: list[str]) -> dict[str, Any]:
    """What `luthier compare` says of one file; an unfinished one raises."""
    folder = RUNS / study / file.stem
    words = [sys.executable, "-m", "luthier", "compare", str(file), *more, "--output-dir", str(folder)]
    done = subprocess.run([*words, "--dry-run" if dry else "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return {} if dry else json.loads(done.stdout.splitlines()[-1])


def where(study: str) -> str:
    """Cores, GPU and torch, as the runs noted them."""
    notes = {f.read_text(encoding="utf-8") for f in (RUNS / study).glob("*/arms/*/seed-*/env.txt")}
    said = {", ".join(x for x in n.splitlines() if x.startswith(("cores", "gpu", "torch"))) for n in notes}
    return "; ".join(sorted(said))


def table(name: str, result: dict[str, Any]) -> str:
    """Arms as rows: each measure's mean and 95% interval, the difference in the primary one, what it took."""
    arms = result["arms"]
    shown = [n for n in arms[0]["levels"] if n not in ("answer_tokens", "stopped")]
    primary = next(n for n in shown if any((a["levels"][n]["outcome"] or "") for a in arms))
    head = [
        "arm",
        *(n.replace("_", " ") for n in shown),
        f"better by ({primary.replace('_', ' ')})",
        "verdict",
        "visible",
    ]
    lines = [f"### {name}", "", f"| {' | '.join(head)} | rate | steps |", "|" + "---|" * (len(head) + 2)]
    for arm in arms:
        by = arm["levels"][primary]["better_by"]
        words = {"held": "better", "not held": "not better"}.get(arm["levels"][primary]["outcome"] or "", "")
        cells = [arm["arm"], *(_range(arm["levels"][n]["value"]) for n in shown)]
        cells += ["baseline", "", ""] if by is None else [_range(by), words or "inconclusive", f"{visible(by):.3g}"]
        lines.append(f"| {' | '.join(cells)} | {arm['learning_rate']:.2g} | {arm['spent']['steps']:.0f} |")
    return "\n".join([*lines, ""])


def visible(by: dict[str, float]) -> float:
    """The smallest difference that would most likely have been seen."""
    from luthier.support.statistics import Estimate

    return Estimate(**by).visible


def _range(e: dict[str, float]) -> str:
    return f"{e['value']:.3g} ({e['low']:.3g} to {e['high']:.3g})"


def put(page: Path, text: str) -> None:
    """Between the page's marks."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    page.write_text(f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
