"""A few training rows, token by token: the loss before and after, and how strongly the objective weighs each token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.data.batch import Batch, collate, predicted
from luthier.data.rendering import Renderer
from luthier.model.view import ModelView, evaluating
from luthier.objectives.base import Clock, Forward, Window, count, mean_of
from luthier.step.lab import Lab
from luthier.step.order import micro_batches
from luthier.step.probe import Probe
from luthier.support.files import write_text
from luthier.tasks.base import Task

SHOWN = 3  # rows
WINDOW = 16  # rows that a trial step chooses from, at most
Tokens = list[list[dict[str, Any]]]  # for each row: text, on (supervised), and, if known, before, after, weight, kept


def tokens_of(renderer: Renderer, rows: Sequence[Any], task: Task, names: Sequence[str]) -> Tokens:
    """The texts of the tokens, as the task spells them, and whether each is supervised.

    names  of the classes, in order
    """
    return [
        [
            {"text": text, "on": on}
            for text, on in zip(task.spelt(renderer.tokenizer, r, names), predicted(r), strict=True)
        ]
        for r in rows[:SHOWN]
    ]


@torch.no_grad()
def note_losses(tokens: Tokens, view: ModelView, rows: Sequence[Any], when: str) -> None:
    """Store each supervised token's loss in nats under `when`."""
    with evaluating(view.module):
        for mine, row in zip(tokens, rows, strict=False):
            values = iter(Forward(collate([row]).to(view.device), view).nll().tolist())
            for t in mine:
                if t["on"]:
                    t[when] = round(next(values), 3)


def note_weights(
    tokens: Tokens,
    probe: Probe,
    rows: Sequence[Any],
    batch_size: int,
    total_steps: int,
    lab: Lab | None = None,
    tokens_per_forward: int = 2048,
) -> None:
    """Store what a first step over the first rows would do: which tokens stay, and the weight of each.

    The weight is the norm of the loss's gradient at the token's final state, divided by that of plain cross-entropy averaged
    over the window: 1 for sft, 0 for a token that teaches nothing. It is unknown if no hidden state has a gradient.
    """
    chosen = list(rows[: max(SHOWN, min(batch_size, WINDOW))])
    places = micro_batches([len(r["ids"]) for r in chosen], tokens_per_forward)[0]
    micro = [collate([chosen[i] for i in part]).to(probe.view.device) for part in places]
    of_row = {r["key"]: mine for mine, r in zip(tokens, chosen, strict=False)}
    ahead = 0 if "targets" in chosen[0] else 1  # the state before a token predicts it; with targets, its own state does
    for t in (t for mine in tokens for t in mine if t["on"]):
        t["kept"] = False
    every = count(micro)["tokens"]
    with probe.quiet(), torch.enable_grad():
        window, denominators = probe.objective.plan(Window(micro, Clock(0, total_steps), lab or Lab()), probe)
        for batch in window.micro:
            pulls = _pulls(probe, batch, denominators)
            for n, at in enumerate(batch.supervised.tolist()):
                mine = of_row.get(batch.keys[int(batch.seq[at])])
                if mine is not None:
                    t = mine[int(batch.pos[at]) + ahead]
                    t["kept"] = True
                    if pulls is not None:
                        t["weight"] = round(float(pulls[n]) * every, 3)


def _pulls(probe: Probe, batch: Batch, denominators: Any) -> Tensor | None:
    """[N] at the supervised tokens; None if no gradient reaches them."""
    if not len(batch.supervised):
        return torch.zeros(0)
    fwd = probe.forward(batch)
    state = fwd.hidden()
    if not state.requires_grad:
        return None
    terms = probe.objective.loss(fwd).values()
    total = sum((t.weight * mean_of(t, denominators) for t in terms), state.sum() * 0)
    ours = torch.autograd.grad(total, state, retain_graph=True)[0][batch.supervised].float().norm(dim=1)
    plain = torch.autograd.grad(fwd.nll().sum(), state)[0][batch.supervised].float().norm(dim=1)
    return torch.where(plain > 0, ours / plain.clamp_min(1e-12), 0.0)


def save(tokens: Tokens, folder: Path) -> None:
    """Write tokens.json."""
    write_text(folder / "tokens.json", json.dumps(tokens, ensure_ascii=False))


def load(folder: Path) -> Tokens:
    """Read the saved tokens; an empty list if there are none."""
    file = folder / "tokens.json"
    found: Tokens = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return found
