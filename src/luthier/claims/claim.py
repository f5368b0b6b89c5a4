"""Claims of papers, written so that a program can test them. Results are dated and kept, whether a claim holds or not.

A claim is `claims/NAME.yaml`, with arms, seeds and conditions. Its experiment is the Python file of the same name, which has
`measure(arm, seed, say) -> {measure: value}`. The latest results are stored in the YAML file under `measured:`.
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
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ruamel.yaml import YAML

from luthier.method import registry
from luthier.method.building import Lines, validated
from luthier.recipe.text import parse, read_text
from luthier.support.cache import content_of, key_of
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import write_text
from luthier.support.machine import end_with_parent
from luthier.support.sources import code_key, imported
from luthier.support.statistics import Estimate, Outcome, estimate

TIERS = {"tiny": 120.0, "small": 1800.0, "gpu": math.inf}  # seconds a claim may take
FOLDER = Path("claims")
WHERE = "claims are in the folder claims of a clone of luthier, so run this there, or name that folder with --folder"
_STRICT = ConfigDict(frozen=True, extra="forbid")


class Condition(BaseModel):
    """A bound on a mean over seeds: `measure` in `arm`, minus `factor` times `measure` in `against`."""

    model_config = _STRICT

    says: str
    measure: str
    arm: str
    against: str | None = None
    factor: float = 1.0  # multiplies the value of `against` before it is subtracted
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one(self) -> Condition:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("write at_least or at_most")
        return self

    @property
    def bound(self) -> float:
        """The number that the mean is compared with."""
        return float(self.at_least if self.at_least is not None else self.at_most or 0.0)

    def values(self, found: Mapping[str, Mapping[int, Mapping[str, float]]], seeds: Sequence[int]) -> list[float]:
        """The value of each seed."""
        out = []
        for s in seeds:
            value = found[self.arm][s][self.measure]
            out.append(value if self.against is None else value - self.factor * found[self.against][s][self.measure])
        return out

    def outcome(self, e: Estimate) -> Outcome:
        """The verdict: held if the whole interval is on the right side of the bound, not held if it is on the wrong side."""
        right, wrong = (e.low >= self.bound, e.high < self.bound)
        if self.at_most is not None:
            right, wrong = (e.high <= self.bound, e.low > self.bound)
        return "held" if right else "not held" if wrong else "inconclusive"


class Claim(BaseModel):
    """The contents of a claim file in claims/."""

    model_config = _STRICT

    method: str
    """The name of the method that the claim is about."""
    claim: str
    """The statement, in a sentence."""
    source: str
    """Where the paper says it."""
    tier: Literal["tiny", "small", "gpu"]
    """How much the measurement costs."""
    arms: tuple[str, ...] = Field(min_length=1)
    """What is measured with each seed; the experiment knows these names."""
    seeds: int = Field(5, ge=2)
    """Number of seeds, from 0 on."""
    data: str = "made by the experiment"
    """The rows of the experiment."""
    conditions: tuple[Condition, ...] = Field(min_length=1)
    """The claim holds if all of them do."""
    measured: dict[str, Any] | None = None
    """The latest results, as `measured` returns them; None before the first measurement."""

    @model_validator(mode="after")
    def _known(self) -> Claim:
        for c in self.conditions:
            for arm in (c.arm, c.against):
                if arm is not None and arm not in self.arms:
                    raise ValueError(f"a condition names the arm {arm!r}; there are {', '.join(self.arms)}")
        return self


def load(path: Path) -> Claim:
    """Read a claim from its file. Raises RecipeError with line and key."""
    if not path.exists():
        known = ", ".join(_named(path.parent))
        raise RecipeError(str(path), "there is no such claim", f"known are {known}" if known else WHERE)
    values, lines = parse(read_text(path), str(path))
    claim: Claim = validated(Claim, values, (), Lines(str(path), lines, frozenset()))
    return claim


def names(folder: Path = FOLDER) -> list[str]:
    """The names of all claims in a folder. Raises LuthierError if there is none."""
    found = _named(folder)
    if not found:
        raise LuthierError(f"--folder {folder}: holds no claims; {WHERE}")
    return found


def _named(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.yaml") if p.stem != "methods")


def of_tier(tier: str, folder: Path = FOLDER) -> list[str]:
    """The names of the claims of one tier."""
    return [n for n in names(folder) if load(folder / f"{n}.yaml").tier == tier]


# --- measuring ---


def experiment(name: str, folder: Path) -> Any:
    """Import the experiment beside the claim. It can import other modules of its folder."""
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
        for known, loaded in list(sys.modules.items()):  # another folder may have modules with the same names
            if Path(getattr(loaded, "__file__", None) or "/").parent == place:
                del sys.modules[known]
    return module


def tell(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def run(
    name: str, folder: Path = FOLDER, runs: Path = Path("runs/claims"), fresh: bool = False, processes: int = 1
) -> dict[str, Any]:
    """Measure a claim and return the contents of `measured`. Finished arms and seeds are read from disk, not run again.

    processes  how many seeds are measured at the same time, each with its share of the cores; use 1 if a condition is
               about seconds
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
    """Measure all arms of a seed. Returns arm -> stored results: values, seconds, date and machine.

    The loop over arms is the inner one, so that an interrupted measurement leaves complete pairs.
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
    """The experiment's file, and the files of its folder that it imports."""
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
    """A key that changes with the experiment, and with every source of luthier that it or the method's class imports."""
    files = _files(name, folder)
    used = {m for f in files for m in imported(f.read_text(encoding="utf-8"))}
    used |= {m["module"] for m in registry.read() if m["name"] == method}
    return key_of(*(content_of(f) for f in files), code_key(*sorted(used)))


def measured(claim: Claim, found: Mapping[str, Mapping[int, Mapping[str, float]]], seconds: float) -> dict[str, Any]:
    """The values by arm and seed, the interval and outcome of each condition, and the verdict of the claim."""
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
    """One line about this machine."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    return f"{platform.machine()}, {device}, torch {torch.__version__}"


def commit() -> str:
    """The commit of the working tree, with a plus sign if it has changes; empty outside git."""
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
    """Write the result under `measured:`. Everything else in the file stays the same."""
    yaml, path = YAML(), folder / f"{name}.yaml"
    yaml.width = 118
    tree = yaml.load(path.read_text(encoding="utf-8"))
    tree["measured"] = dict(result)
    text = io.StringIO()
    yaml.dump(tree, text)
    write_text(path, text.getvalue())


# --- evidence ---


def evidence(folder: Path = FOLDER) -> str:
    """The text of docs/evidence.md: one row for each of the forty-eight papers, with code, claim and verdict."""
    listed = YAML(typ="safe", pure=True).load((folder / "methods.yaml").read_text(encoding="utf-8"))
    have = {m["name"]: m for m in registry.read()}
    written = {n: load(folder / f"{n}.yaml") for n in names(folder)}
    lines = [
        "# Evidence",
        "",
        "This page has one row for each of the forty-eight papers: the code, the claim that luthier tests, and the verdict.",
        "",
        "Each claim has conditions with bounds. luthier computes a mean and a 95% interval over seeds for each condition. The",
        "claim is **held** if the interval of every condition is completely on the right side of its bound. It is **not held**",
        "if one interval is completely on the wrong side. Otherwise it is **inconclusive**.",
        "",
        "Claims of the tiers tiny and small run on two cores with tiny models. They show that the code does what the paper",
        "describes. They do not show what a 7B model would gain. Claims of the tier gpu need a GPU.",
        "",
        "`luthier claim NAME` measures a claim again; see [claims](howto/claims.md). `make docs` makes this page from `claims/`.",
        'A *sheet* is the project\'s summary of a paper; its checks are numbered. In conditions, "A minus B" is the difference',
        "of two arms on the same seed.",
        "",
        "| method | source | code | claim | verdict | measured |",
        "|---|---|---|---|---|---|",
    ]
    for m in listed:
        claim = written.get(m["name"])
        # The method may have another name in the code than in the list.
        entry = have.get(m["name"]) or (have.get(claim.method) if claim else None)
        page = f"[{entry['kind']}](methods/{entry['name']}.md)" if entry else "no code yet"
        code = m.get("code", page)  # `code:` is given where the method has no key in recipes
        lines.append(f"| {m['name']} | {m['title']}, {m['year']}, {m['reference']} | {code} | {_told(claim)} |")
    others = [n for n in written if n not in {m["name"] for m in listed}]
    lines += ["", "## Further claims", ""] if others else []
    lines += [f"- {n}: {_told(written[n]).replace(' | ', ', ').rstrip(', ')}" for n in others]
    return "\n".join([*lines, "", *_details(written)]) + "\n"


def _told(claim: Claim | None) -> str:
    if claim is None:
        return "no claim yet | | "
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
