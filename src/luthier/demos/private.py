"""`luthier collaborate demo`: three organisations with different styles, a provider with public rows, one report.

Everything is made here: two small Llamas, pretrained on Python's manual and library and on answered requests, and
organisations that answer requests, each in a style that no prompt names. The models stand for a small and a large language
model; their quality says nothing about real ones.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luthier import recipe as recipes
from luthier.collaboration.contract import start_of
from luthier.collaboration.controls import mean_shadow
from luthier.data.builtin.requests import demo_rows
from luthier.demos.local import LARGE, SMALL, Pretraining, pieces, pretrained, python_sources
from luthier.federation import demo_page as page
from luthier.federation.client import Audited, AuditSettings, prepared, send
from luthier.federation.folder import Workspace
from luthier.federation.provider import ProviderWorkspace, judge, make_shadows, on_public, open_provider, pairs_in
from luthier.federation.server import one_round
from luthier.support.files import write_text
from luthier.support.progress import Say
from luthier.support.rng import Streams
from luthier.update import Update
from luthier.update.files import load

NAMES = ("clinic", "library", "workshop")
LEADS = ("", "do: ", "=> ", "A) ")
CASES = (str.lower, str.upper, str.title)
JOINTS = (" ", "_", "-")
WRAPS = ("{}", "[{}]", "<{}>", '"{}"')
ENDS = ("", ".", ";", " !")
Style = tuple[str, Callable[[str], str], str, str, str]
STYLES: tuple[Style, ...] = tuple(itertools.product(LEADS, CASES, JOINTS, WRAPS, ENDS))  # 576 styles
WIDTH = 64  # characters of a request, or of a piece of text


class Size(NamedTuple):
    """How large a demonstration is; the default takes a quarter of an hour on two cores."""

    pretraining: Pretraining = Pretraining(steps=1200)
    sets: int = 60
    rows: int = 384
    steps: int = 40
    public: int = 6000
    held: int = 500
    canaries: int = 100
    others: int = 200
    styles: int = 96


USUAL = Size()


def written(action: str, style: Style) -> str:
    """An action's name in a style."""
    lead, case, joint, wrap, end = style
    return lead + wrap.format(joint.join(case(action.replace("_", " ")).split())) + end


def answered(requests: Sequence[Mapping[str, str]], styles: Sequence[int]) -> list[dict[str, str]]:
    """Rows of requests, each answered in the style with its number."""
    return [
        {
            "prompt": f"{r['prompt'][:WIDTH]}\n",
            "completion": written(json.loads(r["answer"])["action"], STYLES[style]),
            "style": str(style),
        }
        for r, style in zip(requests, styles, strict=True)
    ]


class Rows(NamedTuple):
    """The rows of all parties: what models have read, what is public, and by organisation what is tuned on and what is kept."""

    read: list[dict[str, str]]
    public: list[dict[str, str]]
    private: dict[str, list[dict[str, str]]]
    held: dict[str, list[dict[str, str]]]


def all_rows(size: Size, seed: int = 0) -> Rows:
    """The rows of all parties. No two uses share a request; the organisations' styles are not among the public ones."""
    streams = Streams(seed)
    read, each = size.pretraining.steps * size.pretraining.batch // 2, size.rows + size.held
    requests, _ = demo_rows(seed, read + size.public + len(NAMES) * each, 1)
    order = streams.at("styles").permutation(len(STYLES))
    theirs, public = order[: len(NAMES)], order[len(NAMES) : len(NAMES) + size.styles]
    drawn = streams.at("public-styles").choice(public, size=size.public)
    everybody = streams.at("read-styles").integers(len(STYLES), size=read).tolist()
    sources = python_sources()
    texts = pieces(sources, dict.fromkeys(sources, 1.0), read, 2 * WIDTH, streams)
    mixed = [x for pair in zip(answered(requests[:read], everybody), texts, strict=True) for x in pair]
    at, private, held = read + size.public, {}, {}
    for name, style in zip(NAMES, theirs, strict=True):
        own = answered(requests[at : at + each], [int(style)] * each)
        private[name], held[name], at = own[: size.rows], own[size.rows :], at + each
    return Rows(mixed, answered(requests[read : read + size.public], drawn.tolist()), private, held)


def demo(folder: Path, size: Size = USUAL, say: Say = lambda _: None, processes: int | None = None) -> Path:
    """Everything, end to end; returns the report. What is finished in the folder is not made again."""
    began, rows = time.monotonic(), all_rows(size)
    workspace = _agreed(folder, rows, size, say)
    make_shadows(workspace, processes, say)
    provider = open_provider(workspace)
    judged = judge(provider, say)
    audits: dict[str, Audited] = {}
    for name in NAMES:
        own, held = (workspace.rows_in(str(_file(folder, name, which))) for which in ("private", "held"))
        audits[name] = prepared(workspace, name, own, AuditSettings(held, size.canaries, size.others), say=say)
        send(audits[name], folder / "sent", anyway=True)  # a demonstration: nothing leaves this machine
    arrived = one_round(workspace, [folder / "sent" / f"{n}.message" for n in NAMES], folder / "results", say)
    say("compare what each had, what it got, and what sharing rows would have given")
    found = {
        "losses": _losses(provider, folder, audits, arrived.results),
        "judged": judged,
        "seconds": time.monotonic() - began,
    }
    write_text(folder / "found.json", json.dumps(found, indent=1))
    return page.write_collaboration(folder / "report.html", found, audits, arrived.report)


def _file(folder: Path, name: str, which: str) -> Path:
    return folder / "data" / f"{name}-{which}.jsonl"


def _agreed(folder: Path, rows: Rows, size: Size, say: Say) -> Workspace:
    """Rows and models on disk, and a contract over them."""
    if (folder / "contract" / "contract.json").exists():
        return Workspace(folder / "contract")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    _write(folder / "data" / "public.jsonl", rows.public)
    for name in NAMES:
        _write(_file(folder, name, "private"), rows.private[name])
        _write(_file(folder, name, "held"), rows.held[name])
    say(f"pretrain two small models on {len(rows.read):,} rows of Python's texts and requests; minutes, and only once")
    small, large = (pretrained(rows.read, shape, size.pretraining, _news(say, size, n)) for n, shape in
                    (("small", SMALL), ("large", LARGE)))  # fmt: skip
    values = {
        "model": str(small), "data": {"train": str(folder.resolve() / "data" / "public.jsonl"), "template": "plain"},
        "tuner": {"lora": {"rank": 2, "alpha": 32, "targets": ["q_proj", "v_proj"]}}, "max_steps": size.steps,
        "batch_size": 32, "learning_rate": 0.01, "warmup_fraction": 0.0,
        "collaborate": {"grad-transformer": {"large": str(large), "by": "style", "concentration": 0.05,
                                             "sets": size.sets, "rows": size.rows}},
    }  # fmt: skip
    return Workspace.create(recipes.load(json.dumps(values), "demo"), folder, folder / "contract")


def _write(file: Path, rows: Sequence[Mapping[str, str]]) -> None:
    write_text(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def _news(say: Say, size: Size, name: str) -> Callable[[dict[str, float]], None]:
    def tell(entry: dict[str, float]) -> None:
        if entry["step"] % max(1, size.pretraining.steps // 6) == 0:
            say(f"pretrain {name}: step {entry['step']:.0f} of {size.pretraining.steps}, loss {entry['loss']:.2f}")

    return tell


def _losses(
    provider: ProviderWorkspace, folder: Path, audits: Mapping[str, Audited], results: Mapping[str, Path]
) -> dict[str, dict[str, float]]:
    """Losses by organisation and model, in nats a token, on the organisation's held rows.

    The models are its own small one, the one that it got, and controls, of which some need rows to be shared.
    """
    workspace, c = provider.workspace, provider.contract
    own = {n: workspace.rows_in(str(_file(folder, n, "private"))) for n in NAMES}
    pairs, start = pairs_in(provider), start_of(workspace.lab.view("large"), c.tuner)

    def shared(rows: Sequence[Any]) -> Update:
        return provider.protocol.centralised(c, workspace.lab, rows)

    for_all = {
        page.BARE: None, page.MEAN: start.update(mean_shadow(pairs, pairs.x[:1])[0]),
        page.PUBLIC: start.update(on_public(provider, lambda _: None)), page.ALL: shared([r for n in NAMES for r in own[n]]),
    }  # fmt: skip
    out = {}
    for name in NAMES:
        held = workspace.rows_in(str(_file(folder, name, "held")))
        large = {**for_all, page.TRANSLATED: load(results[name]), page.SHARED: shared(own[name])}
        models = {page.OWN: ("small", audits[name].update), **{m: ("large", u) for m, u in large.items()}}
        out[name] = {m: workspace.loss(*models[m], held) for m in page.SHORT}
    return out
