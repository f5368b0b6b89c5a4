"""Claims: what a source says, put so that a machine can find it to hold or not; measured, dated, and kept either way.

A claim is `claims/NAME.yaml`: arms, seeds, conditions, and an experiment, which is a Python file of the same name beside it
with `measure(arm, seed, say) -> {measure: value}`. What was measured last is written under `measured:`.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML

from luthier.method import registry
from luthier.recipe.text import parse
from luthier.support.cache import content_of, key_of
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import write_text
from luthier.support.machine import end_with_parent
from luthier.support.sources import code_key, imported
from luthier.support.statistics import Estimate, Outcome, estimate

TIERS = {"tiny": 120.0, "small": 1800.0, "gpu": math.inf}  # seconds a claim may take
FOLDER = Path("claims")
_STRICT = ConfigDict(frozen=True, extra="forbid")


class Condition(BaseModel):
    """One thing that must be so: the mean over seeds of `measure` in `arm`, less that in `against`, times `factor`."""

    model_config = _STRICT

    says: str
    measure: str
    arm: str
    against: str | None = None
    factor: float = 1.0  # of the other arm's value, before it is taken away
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Condition:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("write at_least or at_most")
        return self

    def values(self, found: Mapping[str, Mapping[int, Mapping[str, float]]], seeds: Sequence[int]) -> list[float]:
        """One a seed."""
        out = []
        for s in seeds:
            value = found[self.arm][s][self.measure]
            out.append(value if self.against is None else value - self.factor * found[self.against][s][self.measure])
        return out

    def outcome(self, e: Estimate) -> Outcome:
        """Held where the whole interval is on the right side of the bound, not held where it is on the wrong one."""
        low, high = (e.low, e.high) if self.at_least is not None else (-e.high, -e.low)
        bound = self.at_least if self.at_least is not None else -float(self.at_most or 0.0)
        return "held" if low >= bound else "not held" if high < bound else "inconclusive"


class Claim(BaseModel):
    """A file in claims/."""

    model_config = _STRICT

    method: str
    claim: str
    source: str
    tier: Literal["tiny", "small", "gpu"]
    arms: tuple[str, ...] = Field(min_length=1)
    seeds: int = Field(5, ge=2)
    data: str = "made by the experiment"
    conditions: tuple[Condition, ...] = Field(min_length=1)
    measured: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _known(self) -> Claim:
        for c in self.conditions:
            for arm in (c.arm, c.against):
                if arm is not None and arm not in self.arms:
                    raise ValueError(f"a condition names the arm {arm!r}; there are {', '.join(self.arms)}")
        return self


def load(path: Path) -> Claim:
    """A claim from its file. Raises RecipeError with line and key."""
    try:
        values, lines = parse(path.read_text(encoding="utf-8"), str(path))
        return Claim.model_validate(values)
    except OSError as error:
        known = ", ".join(names(path.parent)) or "none here: claims are in a clone of luthier, so run this there"
        raise RecipeError(str(path), "there is no such claim", f"known are {known}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = tuple(str(p) for p in first["loc"])
        line = next((lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in lines), 1)
        raise RecipeError(f"{path}:{line}: {'.'.join(where)}", first["msg"]) from None


def names(folder: Path = FOLDER) -> list[str]:
    """Claims that are written."""
    return sorted(p.stem for p in folder.glob("*.yaml") if p.stem != "methods")


def of_tier(tier: str, folder: Path = FOLDER) -> list[str]:
    """Claims of one tier."""
    return [n for n in names(folder) if load(folder / f"{n}.yaml").tier == tier]


# --- measuring ---


def experiment(name: str, folder: Path) -> Any:
    """The module beside the claim; its folder can be imported from."""
    file = folder / f"{name.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"claims_{file.stem}", file)
    if spec is None or spec.loader is None or not file.exists():
        raise LuthierError(f"{file}: there is no experiment for this claim")
    place = folder.resolve()
    sys.path.insert(0, str(place))
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
        for known, loaded in list(sys.modules.items()):  # another folder may have modules of the same names
            if Path(getattr(loaded, "__file__", None) or "/").parent == place:
                del sys.modules[known]
    return module


def tell(text: str) -> None:
    """Progress goes to standard error."""
    print(text, file=sys.stderr, flush=True)


def run(
    name: str, folder: Path = FOLDER, runs: Path = Path("runs/claims"), fresh: bool = False, processes: int = 1
) -> dict[str, Any]:
    """Measure a claim and return what goes under `measured`; arms and seeds that are done are read, not run again.

    processes  seeds measured side by side, each with its share of the cores; 1 where a condition is about seconds
    """
    claim = load(folder / f"{name}.yaml")
    if processes > 1:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (processes,)) as pool:
            parts = [pool.submit(_of_seed, name, folder, runs, seed, fresh) for seed in range(claim.seeds)]
            stored = [part.result() for part in parts]
    else:
        stored = [_of_seed(name, folder, runs, seed, fresh) for seed in range(claim.seeds)]
    found = {arm: {seed: stored[seed][arm]["values"] for seed in range(claim.seeds)} for arm in claim.arms}
    every = [one for by_arm in stored for one in by_arm.values()]
    out = measured(claim, found, sum(one["seconds"] for one in every))
    machines = "; ".join(sorted({one["machine"] for one in every}))
    return {**out, "date": max(one["date"] for one in every), "machine": machines}


def _begin(processes: int) -> None:
    import torch

    end_with_parent()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def _of_seed(name: str, folder: Path, runs: Path, seed: int, fresh: bool) -> dict[str, dict[str, Any]]:
    """arm -> what is stored of it: values, seconds, date and machine.

    All arms of a seed, so that what is there when it is interrupted is paired.
    """
    claim, module = load(folder / f"{name}.yaml"), experiment(name, folder)
    version = _version(name, claim.method, folder)
    stored: dict[str, dict[str, Any]] = {}
    for arm in claim.arms:
        file = runs / name / f"{arm}-{seed}-{version[:8]}.json"
        if not file.exists() or fresh:
            started = time.perf_counter()
            values = {k: float(v) for k, v in module.measure(arm, seed, tell).items()}
            took = {"seconds": time.perf_counter() - started, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps({"values": values, **took}))
        stored[arm] = json.loads(file.read_text(encoding="utf-8"))
        shown = ", ".join(f"{k} {v:.4g}" for k, v in stored[arm]["values"].items())
        tell(f"{name}  {arm}, seed {seed} of {claim.seeds}: {shown}")
    return stored


def _files(name: str, folder: Path) -> list[Path]:
    """The experiment, and what it imports from beside it."""
    found: dict[Path, None] = {}
    left = [folder / f"{name.replace('-', '_')}.py"]
    while left:
        file = left.pop()
        if file in found or not file.exists():
            continue
        found[file] = None
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                left.append(folder / f"{node.module.split('.')[0]}.py")
            elif isinstance(node, ast.Import):
                left += [folder / f"{a.name.split('.')[0]}.py" for a in node.names]
    return sorted(found)


def _version(name: str, method: str, folder: Path) -> str:
    """Changes with the experiment, and with every source of ours that it or the method's class reaches."""
    files = _files(name, folder)
    used = {m for f in files for m in imported(f.read_text(encoding="utf-8"))}
    used |= {m["module"] for m in registry.read() if m["name"] == method}
    return key_of(*(content_of(f) for f in files), code_key(*sorted(used)))


def measured(claim: Claim, found: Mapping[str, Mapping[int, Mapping[str, float]]], seconds: float) -> dict[str, Any]:
    """Values by arm and seed, each condition's interval and outcome, and the verdict over all."""
    seeds = sorted(set.intersection(*(set(by) for by in found.values())))
    conditions, outcomes = [], []
    for c in claim.conditions:
        values = c.values(found, seeds)
        e = estimate(np.array(values)[:, None])
        outcomes.append(c.outcome(e))
        conditions.append(
            {"says": c.says, "mean": _short(e.value), "low": _short(e.low), "high": _short(e.high),
             "seeds": [_short(v) for v in values], "outcome": outcomes[-1]}
        )  # fmt: skip
    every = {arm: {m: [_short(by[s][m]) for s in seeds] for m in by[seeds[0]]} for arm, by in found.items()}
    return {
        "verdict": _over_all(outcomes), "conditions": conditions, "values": every, "seeds": len(seeds),
        "seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d"), "machine": machine(), "commit": commit(),
    }  # fmt: skip


def _over_all(outcomes: Sequence[Outcome]) -> Outcome:
    if "not held" in outcomes:
        return "not held"
    return "inconclusive" if "inconclusive" in outcomes else "held"


def _short(x: float) -> float:
    return float(f"{x:.5g}")


def machine() -> str:
    """In a line."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return f"{platform.machine()}, {device}, torch {torch.__version__}"


def commit() -> str:
    """The commit of the working tree, with a mark where it has changes; empty outside git."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "src", "claims/*.py"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if dirty.stdout.strip() else "")


def record(name: str, result: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Write the result under `measured:`; everything else in the file stays as it is."""
    yaml, path = YAML(), folder / f"{name}.yaml"
    yaml.width = 118
    tree = yaml.load(path.read_text(encoding="utf-8"))
    tree["measured"] = dict(result)
    text = io.StringIO()
    yaml.dump(tree, text)
    write_text(path, text.getvalue())


# --- evidence ---


def evidence(folder: Path = FOLDER) -> str:
    """docs/evidence.md: a row for each of the forty-eight methods, from paper to verdict; what is missing is said."""

    listed = YAML(typ="safe").load((folder / "methods.yaml").read_text(encoding="utf-8"))
    have = {m["name"]: m for m in registry.read()}
    written = {n: load(folder / f"{n}.yaml") for n in names(folder)}
    lines = [
        "# Evidence",
        "",
        "One row for each method, from paper to verdict. A claim is held where its whole 95% interval over seeds lies on the",
        "right side of the bound, not held where it lies on the wrong one, else inconclusive. Claims of the tiny and small",
        "tiers run on two cores and tiny models: they show that the code does what the source describes, not what a",
        "7B model would gain. `luthier claim NAME` measures one again. Made by `make docs` from `claims/`.",
        "",
        "| method | source | code | claim | verdict | measured |",
        "|---|---|---|---|---|---|",
    ]
    for m in listed:
        claim = written.get(m["name"])
        entry = have.get(m["name"]) or (have.get(claim.method) if claim else None)  # the code may have another name
        page = f"[{entry['kind']}](methods/{entry['name']}.md)" if entry else "not there yet"
        code = m.get("code", page)  # of what is no method of a recipe
        lines.append(f"| {m['name']} | {m['title']}, {m['year']}, {m['reference']} | {code} | {_told(claim)} |")
    others = [n for n in written if n not in {m["name"] for m in listed}]
    lines += ["", "## Further claims", ""] if others else []
    lines += [f"- {n}: {_told(written[n]).replace(' | ', ', ').rstrip(', ')}" for n in others]
    return "\n".join([*lines, "", *_details(written)]) + "\n"


def _told(claim: Claim | None) -> str:
    if claim is None:
        return "missing | | "
    m = claim.measured
    if m is None:
        return f"{claim.claim} ({claim.tier}) | not measured | "
    when = f"{m['date']}, {m['seeds']} seeds, {m['seconds']:.0f} s, {m['commit']}"
    return f"{claim.claim} ({claim.tier}) | **{m['verdict']}** | {when}"


def _details(written: Mapping[str, Claim]) -> list[str]:
    out = ["## Numbers", ""]
    for name, claim in written.items():
        if claim.measured is None:
            continue
        out += [f"### {name}", "", f"{claim.source}. Data: {claim.data}. Machine: {claim.measured['machine']}.", ""]
        out += ["| condition | mean | 95% interval | outcome |", "|---|---|---|---|"]
        for c in claim.measured["conditions"]:
            out.append(f"| {c['says']} | {c['mean']} | {c['low']} to {c['high']} | {c['outcome']} |")
        out.append("")
    return out
