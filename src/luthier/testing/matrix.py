"""What luthier promises for every architecture, tried on a tiny model of it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.data.batch import IGNORE, Batch, collate
from luthier.inference.session import Session, ways
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.forward import Forward
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.architectures import HEADS, NEXT_TOKEN, TEXT_CLASS, WORDS, tiny_model
from luthier.training.loop import Loop
from luthier.tuners.base import Trainable, Tuner, with_head
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel
from luthier.update.files import load, save_update

LENGTHS = (9, 5, 12, 7)
TUNERS: Mapping[str, Tuner] = {
    "lora": Lora(rank=2), "full": Full(), "spiel": Spiel(density=0.001, reselect_every=2, window=1),
}  # fmt: skip


# Decoders whose own loss compares each position with the label at the same place: the caller shifts labels.
UNSHIFTED = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart", "mvp", "pegasus", "plbart",
    "trocr", "whisper", "xlm",
})  # fmt: skip


NO_TEXT_LOSS = frozenset({"git"})  # its loss takes the first positions for an image's


class Failed(AssertionError):
    """A promise that does not hold."""


class Subject:
    """A tiny model of one architecture with rows for it."""

    def __init__(self, model_type: str, head: str) -> None:
        """Raises LuthierError where luthier refuses the architecture."""
        self.model_type, self.head = model_type, head
        self.model = tiny_model(model_type, head)
        self.view = ModelView.probed(copy.deepcopy(self.model))
        generator = torch.Generator().manual_seed(1)
        self.rows: list[dict[str, Any]] = []
        for i, n in enumerate(LENGTHS):
            ids = [*torch.randint(3, WORDS, (n - 1,), generator=generator).tolist(), 2]  # ends in the end token
            row: dict[str, Any] = {"ids": ids, "labels": [IGNORE] * n, "key": str(i), "token": {"prompt": [1] * n}}
            if head == TEXT_CLASS:
                row["row"] = {"label": torch.tensor(i % 3)}
            else:
                row |= {"labels": [IGNORE] * (n - 4) + ids[n - 4 :], "token": {"prompt": [1] * (n - 4) + [0] * 4}}
            self.rows.append(row)

    @property
    def batch(self) -> Batch:
        return collate(self.rows)

    @property
    def layouts(self) -> tuple[str, ...]:
        """Layouts that the view can have."""
        return ("flat", "padded") if self.view.layout == "flat" else ("padded",)

    def fresh(self, layout: str | None = None) -> ModelView:
        """Another view of the same weights."""
        view = ModelView(copy.deepcopy(self.model))
        view.layout, view.width = layout or self.view.layout, self.view.width
        view.singly, view.ways = self.view.singly, self.view.ways
        return view

    def own(self, model: Any) -> list[Tensor]:
        """The model's own logits of each row alone, [L, V] or [C]."""
        with torch.no_grad():
            return [model(input_ids=torch.tensor([r["ids"]])).logits[0].float() for r in self.rows]

    def ours(self, view: ModelView) -> list[Tensor]:
        """luthier's logits of all rows in one batch."""
        batch = self.batch
        fwd = Forward(batch, view)
        with torch.no_grad():
            if self.head == TEXT_CLASS:
                return list(fwd.logits())
            return list(fwd.logits(torch.arange(batch.num_tokens)).split(list(batch.lengths)))

    def loop(self, view: ModelView, tuner: Tuner) -> Loop:
        settings = TrainSettings(max_steps=3, batch_size=4, learning_rate=1e-2, warmup_fraction=0.0)
        trainable: Trainable = tuner.attach(view, total_steps=3)
        trainable = with_head(trainable, view.anatomy.task_head)
        return Loop(view, self.rows, trainable, Sft(), settings, data_hash="matrix")


def same(found: Tensor | list[Tensor], wanted: Tensor | list[Tensor], what: str, tolerance: float = 1e-5) -> None:
    """Raises Failed where they differ by more than this share of the largest value."""
    pairs = zip(found, wanted, strict=True) if isinstance(found, list) else [(found, wanted)]
    for a, b in pairs:
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        off = float((a - b).abs().max() / b.abs().max().clamp_min(1.0))
        if not off <= tolerance:
            raise Failed(f"{what}: off by {off:.2g}")


def logits_and_loss(s: Subject) -> None:
    """In a batch, in each layout, they are the model's own for each row alone."""
    wanted = s.own(s.model)
    for layout in s.layouts:
        view = s.fresh(layout)
        same(s.ours(view), wanted, f"{layout} logits", 2e-5)
        if s.head == NEXT_TOKEN:
            nll = Forward(s.batch, view).nll().detach()
            own = [torch.nn.functional.cross_entropy(z[-5:-1], torch.tensor(r["ids"][-4:]), reduction="none")
                   for z, r in zip(wanted, s.rows, strict=True)]  # fmt: skip
            same(nll, torch.cat(own), f"{layout} loss", 2e-5)


def own_loss(s: Subject) -> None:
    """The loss that the model computes itself is luthier's, with labels where it wants them."""
    view, row = s.fresh(), s.rows[0]
    labels = row["labels"]
    if s.model_type in UNSHIFTED:
        labels = [*labels[1:], IGNORE]
    with torch.no_grad():
        if s.head == TEXT_CLASS:
            theirs = s.model(input_ids=torch.tensor([row["ids"]]), labels=row["row"]["label"][None]).loss
            ours = torch.nn.functional.cross_entropy(Forward(collate([row]), view).logits(), row["row"]["label"][None])
        else:
            if s.model_type in NO_TEXT_LOSS:
                return
            theirs = s.model(input_ids=torch.tensor([row["ids"]]), labels=torch.tensor([labels])).loss
            ours = Forward(collate([row]), view).nll().mean()
    same(ours, theirs, "loss")


def steps(s: Subject, name: str) -> None:
    """Three steps change the model; its update, saved and bound to a fresh base, gives the same; so does a merge, reopened."""
    view = s.fresh()
    loop = s.loop(view, TUNERS[name])
    found = [loop.step()["loss"] for _ in range(3)]
    if not all(map(torch.isfinite, map(torch.tensor, found))):
        raise Failed(f"losses {found}")
    view.module.eval()
    live, update = s.ours(view), loop.trainable.update()
    if all(torch.equal(a, b) for a, b in zip(live, s.own(s.model), strict=True)):
        raise Failed("nothing was trained")
    with tempfile.TemporaryDirectory() as folder:
        save_update(update, Path(folder), view)
        fresh = s.fresh()
        with load(folder).bind(fresh):
            same(s.ours(fresh), live, "bound again", 1e-4)
        if (Path(folder) / "adapter_config.json").exists():
            same(s.own(in_peft(s, folder)), live, "in peft", 1e-4)
    merged = copy.deepcopy(s.model)
    update.merge_into(merged)
    same(s.own(merged), live, "merged", 1e-4)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        again = HEADS[s.head][0].from_pretrained(folder, dtype=torch.float32).eval()
        same(s.own(again), s.own(merged), "reopened", 1e-5)
    loop.trainable.detach()
    same(s.ours(view), s.ours(s.fresh()), "detached", 0.0)


def in_peft(s: Subject, folder: str) -> Any:
    """The base with the adapter, as peft opens it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(s.model), folder).eval()


def answers(s: Subject) -> None:
    """Rows written in one batch are the same as alone, and as the model writes them by reading the whole text each time."""
    if s.head != NEXT_TOKEN:
        return
    prompts = [r["ids"] for r in s.rows]
    with torch.no_grad():
        together = written(s.view, prompts)
        alone = [written(s.fresh(), [p])[0] for p in prompts]
        for i, p in enumerate(prompts):
            ids, own = list(p), []
            for _ in range(len(together[i])):
                own.append(s.model(input_ids=torch.tensor([ids])).logits[0, -1].float())
                ids.append(int(own[-1].argmax()))
            same(alone[i], torch.stack(own), "answers alone", 1e-4)
            same(together[i], torch.stack(own), "answers in a batch", 1e-4)


def written(view: ModelView, prompts: list[list[int]], tokens: int = 6) -> list[Tensor]:
    """[tokens, V] of each row: the logits that each token was chosen by."""
    if not ways(view).padding and len(prompts) > 1:
        return [written(view, [p], tokens)[0] for p in prompts]
    out = []
    with Session(view, prompts, 0) as session:
        for i in range(tokens):
            out.append(session.logits)
            if i + 1 < tokens:
                session.advance(session.logits.argmax(-1))
    return list(torch.stack(out, dim=1))


def checkpointing(s: Subject) -> None:
    """Blocks that are computed again give the same gradients."""
    found = []
    for again in (False, True):
        view = s.fresh()
        view.module.train()
        if again:
            view.checkpoint_blocks()
        fwd = Forward(s.batch, view)
        loss = fwd.logits().square().sum() if s.head == TEXT_CLASS else fwd.nll().sum()
        loss.backward()
        found.append({n: p.grad for n, p in view.module.named_parameters() if p.grad is not None})
    if found[0].keys() != found[1].keys():
        raise Failed("other weights have a gradient")
    for n, g in found[0].items():
        same(found[1][n], g, f"gradient of {n}", 1e-4)


PROMISES: Mapping[str, Callable[[Subject], None]] = {
    "logits": logits_and_loss, "loss": own_loss, "lora": lambda s: steps(s, "lora"), "full": lambda s: steps(s, "full"),
    "spiel": lambda s: steps(s, "spiel"), "answers": answers, "checkpointing": checkpointing,
}  # fmt: skip


def subject_of(model_type: str, head: str) -> Subject | str:
    """The subject, or the sentence in which luthier refuses it."""
    try:
        return Subject(model_type, head)
    except LuthierError as error:
        return str(error)
