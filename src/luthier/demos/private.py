"""`luthier collaborate demo`: three organisations with different styles, a provider with public rows, one report.

All of it is made on the spot: two small Llamas that have read Python's manual and library and answered spoken requests, and
houses that answer requests each in a style that no prompt tells. They stand for a TinyLM and an LLM, and for no model's
quality.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from luthier.collaboration.contract import start_of
from luthier.collaboration.controls import mean_shadow
from luthier.data.builtin.requests import demo_rows
from luthier.demos.local import LARGE, SMALL, Schooling, pieces, python_sources, schooled
from luthier.federation import demo_page as page
from luthier.federation.client import Audited, AuditSettings, prepared, send
from luthier.federation.folder import Workspace
from luthier.federation.provider import ProviderWorkspace, judge, make_shadows, on_public, open_provider, pairs_in
from luthier.federation.server import taken_in
from luthier.support.files import write_text
from luthier.support.progress import Say
from luthier.support.rng import Streams
from luthier.update.files import load

NAMES = ("clinic", "library", "workshop")
LEADS = ("", "do: ", "=> ", "A) ")
CASES = (str.lower, str.upper, str.title)
JOINTS = (" ", "_", "-")
WRAPS = ("{}", "[{}]", "<{}>", '"{}"')
ENDS = ("", ".", ";", " !")
Style = tuple[str, Callable[[str], str], str, str, str]
STYLES: tuple[Style, ...] = tuple(itertools.product(LEADS, CASES, JOINTS, WRAPS, ENDS))  # 576 houses
WIDTH = 64  # characters of a request, or of a piece of text


class Size(NamedTuple):
    """How large a demonstration is; the default takes a quarter of an hour on two cores."""

    schooling: Schooling = Schooling(steps=1200)
    sets: int = 60
    rows: int = 384
    steps: int = 40
    public: int = 6000
    held: int = 500
    canaries: int = 100
    others: int = 200
    houses: int = 96


def written(action: str, style: Style) -> str:
    """An action's name in a house's style."""
    lead, case, joint, wrap, end = style
    return lead + wrap.format(joint.join(case(action.replace("_", " ")).split())) + end


def answered(requests: Sequence[Mapping[str, str]], houses: Sequence[int]) -> list[dict[str, str]]:
    """Rows of requests, each answered as its house does."""
    return [
        {
            "prompt": f"{r['prompt'][:WIDTH]}\n",
            "completion": written(json.loads(r["answer"])["action"], STYLES[h]),
            "house": str(h),
        }
        for r, h in zip(requests, houses, strict=True)
    ]


class Rows(NamedTuple):
    """The rows of all parties: what models have read, what is public, and by organisation what is tuned on and what is kept."""

    read: list[dict[str, str]]
    public: list[dict[str, str]]
    private: dict[str, list[dict[str, str]]]
    held: dict[str, list[dict[str, str]]]


def made(size: Size, seed: int = 0) -> Rows:
    """Requests are cut into stretches that no two uses share; the organisations' houses are none of the public ones."""
    streams = Streams(seed)
    read, each = size.schooling.steps * size.schooling.batch // 2, size.rows + size.held
    requests, _ = demo_rows(seed, read + size.public + len(NAMES) * each, 1)
    order = streams.at("houses").permutation(len(STYLES))
    theirs, public = order[: len(NAMES)], order[len(NAMES) : len(NAMES) + size.houses]
    drawn = streams.at("public-houses").choice(public, size=size.public)
    everybody = streams.at("read-houses").integers(len(STYLES), size=read).tolist()
    texts = pieces(python_sources(), dict.fromkeys(python_sources(), 1.0), read, 2 * WIDTH, streams)
    mixed = [x for pair in zip(answered(requests[:read], everybody), texts, strict=True) for x in pair]
    at, private, held = read + size.public, {}, {}
    for name, house in zip(NAMES, theirs, strict=True):
        own = answered(requests[at : at + each], [int(house)] * each)
        private[name], held[name], at = own[: size.rows], own[size.rows :], at + each
    return Rows(mixed, answered(requests[read : read + size.public], drawn.tolist()), private, held)


def demo(folder: Path, size: Size = Size(), say: Say = lambda _: None, processes: int | None = None) -> Path:  # noqa: B008
    """Everything, end to end; returns the report. What is finished in the folder is not made again."""
    began, rows = time.monotonic(), made(size)
    workspace = _agreed(folder, rows, size, say)
    make_shadows(workspace, processes, say)
    provider = open_provider(workspace)
    judged = judge(provider, say)
    audits: dict[str, Audited] = {}
    for name in NAMES:
        own, held = (
            workspace.rendered(workspace.rows(str(_file(folder, name, w)), Path())) for w in ("private", "held")
        )
        audits[name] = prepared(workspace, name, own, AuditSettings(held, size.canaries, size.others), say=say)
        send(audits[name], folder / "sent", anyway=True)  # a demonstration: nothing leaves this machine
    arrived = taken_in(workspace, [folder / "sent" / f"{n}.message" for n in NAMES], folder / "results", say)
    say("compare what each had, what it got, and what sharing rows would have given")
    losses = {n: _losses(provider, folder, n, audits[n], arrived.results[n]) for n in NAMES}
    found = {"losses": losses, "judged": judged, "seconds": time.monotonic() - began}
    write_text(folder / "found.json", json.dumps(found, indent=1))
    return page.write_collaboration(folder / "report.html", found, audits, arrived.report)


def _file(folder: Path, name: str, which: str) -> Path:
    return folder / "data" / f"{name}-{which}.jsonl"


def _agreed(folder: Path, rows: Rows, size: Size, say: Say) -> Workspace:
    """Rows and models on disk, and a contract over them."""
    from luthier import recipe as recipes

    if (folder / "contract" / "contract.json").exists():
        return Workspace(folder / "contract")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    _write(folder / "data" / "public.jsonl", rows.public)
    for name in NAMES:
        _write(_file(folder, name, "private"), rows.private[name])
        _write(_file(folder, name, "held"), rows.held[name])
    say(f"school  two small models on {len(rows.read):,} rows of Python's texts and requests; minutes, and only once")
    small, large = (schooled(rows.read, shape, size.schooling, _news(say, size, n)) for n, shape in
                    (("small", SMALL), ("large", LARGE)))  # fmt: skip
    values = {
        "model": str(small), "data": {"train": str(folder.resolve() / "data" / "public.jsonl"), "template": "plain"},
        "tuner": {"lora": {"rank": 2, "alpha": 32, "targets": ["q_proj", "v_proj"]}}, "max_steps": size.steps,
        "batch_size": 32, "learning_rate": 0.01, "warmup_fraction": 0.0,
        "collaborate": {"grad-transformer": {"large": str(large), "by": "house", "concentration": 0.05,
                                             "sets": size.sets, "rows": size.rows}},
    }  # fmt: skip
    return Workspace.create(recipes.load(json.dumps(values), "demo"), folder, folder / "contract")


def _write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    write_text(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def _news(say: Say, size: Size, name: str) -> Callable[[dict[str, float]], None]:
    def tell(entry: dict[str, float]) -> None:
        if entry["step"] % max(1, size.schooling.steps // 6) == 0:
            say(f"school  {name}: step {entry['step']:.0f} of {size.schooling.steps}, loss {entry['loss']:.2f}")

    return tell


def _losses(provider: ProviderWorkspace, folder: Path, name: str, audited: Audited, got: Path) -> dict[str, float]:
    """Losses on the organisation's held rows, in nats a token: its own models, what it got, and what needs rows to be shared."""
    workspace, c = provider.workspace, provider.contract
    own, held = (workspace.rendered(workspace.rows(str(_file(folder, name, w)), Path())) for w in ("private", "held"))
    everybody = [
        r for n in NAMES for r in workspace.rendered(workspace.rows(str(_file(folder, n, "private")), Path()))
    ]  # fmt: skip
    large, pairs = workspace.lab.view("large"), pairs_in(provider)
    start = start_of(large, c.tuner)
    public = start.update(on_public(provider, lambda _: None))
    given = {
        page.BARE: None, page.MEAN: start.update(mean_shadow(pairs, pairs.x[:1])[0]), page.PUBLIC: public,
        page.TRANSLATED: load(got), page.SHARED: provider.protocol.centralised(c, workspace.lab, own),
        page.ALL: provider.protocol.centralised(c, workspace.lab, everybody),
    }  # fmt: skip
    with audited.update.bind(workspace.first):
        small = workspace.loss("small", None, held)
    return {page.OWN: small} | {n: workspace.loss("large", u, held) for n, u in given.items()}
