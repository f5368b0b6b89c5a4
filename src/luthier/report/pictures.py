"""PNG files of a finished run or comparison, for model cards and slides. matplotlib draws them, without a window."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.report.page import loss_unit
from luthier.support.errors import LuthierError

SIZE, DPI = (6.4, 3.2), 160  # inches; dots an inch
INK, COLOURS = "#1d2126", ("#9a4f1c", "#2f6f8f", "#2b7a4b", "#7a4fa3", "#b3382c", "#6b6a12", "#a03a77", "#4a5a66")
MARK = "<!-- pictures -->"


def pictures(folder: Path) -> list[Path]:
    """Draw loss.png and scores.png of a run and put them into its card, or differences.png and costs.png of a comparison.

    Raises LuthierError for a folder that is neither, or if matplotlib is missing.
    """
    state = _json(folder / "run.json")
    if state.get("state") == "done":
        made = [p for p in (_loss(folder, state), _scores(folder, state)) if p is not None]
        _put_into_card(folder / "README.md", made)
        return made
    standings = _json(folder / "standings.json")
    if not standings:
        raise LuthierError(f"{folder}: is neither a finished run nor a finished comparison")
    return [p for p in (_differences(folder, standings), _costs(folder, standings)) if p is not None]


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _axes(title: str, x_name: str, y_name: str = "", height: float = SIZE[1]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LuthierError("pictures need matplotlib: pip install 'luthier[pictures]'") from error
    figure = Figure(figsize=(SIZE[0], height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x_name, fontsize=9)
    axes.set_ylabel(y_name, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    return figure, axes


def _saved(figure: Any, file: Path) -> Path:
    figure.savefig(file)
    return file


def _loss(folder: Path, state: dict[str, Any]) -> Path | None:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, axes = _axes(f"Loss, {loss_unit(state)}", "step")
    for i, (key, name) in enumerate((("loss", "training"), ("eval_loss", "held out"))):
        points = [(e["step"], e[key]) for e in log if key in e]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[i], label=name, linewidth=1.6)
    if not axes.lines:
        return None
    axes.legend(frameon=False, fontsize=8)
    return _saved(figure, folder / "loss.png")


def _scores(folder: Path, state: dict[str, Any]) -> Path | None:
    """Draw the shares before and after. Other measures have other scales."""
    after = {n: m for n, m in (state.get("after") or {}).items() if m["unit"].startswith("share")}
    if not after:
        return None
    figure, axes = _axes("Before and after tuning", "share", height=0.9 + 0.55 * len(after))
    for i, name in enumerate(reversed(after)):
        before, now = state["before"][name]["value"], after[name]["value"]
        axes.barh(i + 0.2, before, 0.36, color="#b9bec4")
        axes.barh(i - 0.2, now, 0.36, color=COLOURS[0])
        axes.text(now, i - 0.2, f" {now:.0%}", va="center", fontsize=8)
        axes.text(before, i + 0.2, f" {before:.0%}", va="center", fontsize=8)
    axes.set_yticks(range(len(after)), [n.replace("_", " ") for n in reversed(after)])
    axes.set_xlim(0, 1.12)
    return _saved(figure, folder / "scores.png")


def _differences(folder: Path, standings: dict[str, Any]) -> Path | None:
    primary = standings["primary"]
    judged = [a for a in standings["arms"] if (a["levels"].get(primary) or {}).get("better_by")]
    if not judged:
        return None
    title = f"Better than {standings['baseline']} in {primary.replace('_', ' ')}, 95% intervals"
    figure, axes = _axes(title, "difference (right is better)", height=1.1 + 0.4 * len(judged))
    axes.axvline(0, color=INK, linewidth=1, linestyle="--")
    for i, arm in enumerate(reversed(judged)):
        by = arm["levels"][primary]["better_by"]
        if math.isfinite(by["low"]):
            axes.plot([by["low"], by["high"]], [i, i], color=COLOURS[i % len(COLOURS)], linewidth=2.5)
        axes.plot([by["value"]], [i], "o", color=COLOURS[i % len(COLOURS)])
    axes.set_yticks(range(len(judged)), [a["arm"] for a in reversed(judged)])
    return _saved(figure, folder / "differences.png")


def _costs(folder: Path, standings: dict[str, Any]) -> Path | None:
    primary = standings["primary"]
    points = [(a["arm"], a["spent"]["seconds"], a["levels"][primary]["value"]["value"])
              for a in standings["arms"] if primary in a["levels"]]  # fmt: skip
    if len(points) < 2:
        return None
    figure, axes = _axes(
        f"{primary.replace('_', ' ')} against time", "seconds of training a run", primary.replace("_", " ")
    )
    for i, (name, x, y) in enumerate(points):
        axes.plot([x], [y], "o", color=COLOURS[i % len(COLOURS)])
        axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.margins(0.18)
    return _saved(figure, folder / "costs.png")


def _put_into_card(card: Path, made: Sequence[Path]) -> None:
    """Put pictures below the card's text, once."""
    if not card.exists() or not made:
        return
    text = card.read_text(encoding="utf-8").split(MARK)[0].rstrip()
    shown = "\n\n".join(f"![{p.stem}]({p.name})" for p in made)
    card.write_text(f"{text}\n\n{MARK}\n\n{shown}\n", encoding="utf-8")
