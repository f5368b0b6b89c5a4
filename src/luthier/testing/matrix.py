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
from luthier.model.anatomy import max_positions
from luthier.model.refusals import NOT_AGAIN, REFUSED
from luthier.model.tail import FAILURES, brief
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.forward import Forward
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.tasks.base import refuse_later_tokens
from luthier.testing.architectures import HEADS, NEXT_TOKEN, TABLE, TEXT_CLASS, TOKEN_CLASS, WORDS, tiny_model
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


# Its code sets the padding row of the embeddings, which are also its head, to 0 whenever it is opened.
LOST_BY_TRANSFORMERS = frozenset({("youtu", "full")})


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
            if head == TOKEN_CLASS:
                row["targets"] = [IGNORE, *((i + j) % 3 for j in range(n - 1))]
            elif head == TEXT_CLASS:
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
        """The model's own logits of each row alone, [L, V], [L, C] or [C]."""
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
    labels = row.get("targets", row["labels"])
    if s.head == NEXT_TOKEN and s.model_type in UNSHIFTED:
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
        if (s.model_type, name) not in LOST_BY_TRANSFORMERS:
            same(s.own(again), s.own(merged), "reopened", 1e-5)
    loop.trainable.detach()
    same(s.ours(view), s.ours(s.fresh()), "detached", 0.0)


def in_peft(s: Subject, folder: str) -> Any:
    """The base with the adapter, as peft opens it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(s.model), folder).eval()


# Their tiny random models choose other experts for a row in a batch than alone, in their own code too.
TIED_EXPERTS = ("axk2",)


def answers(s: Subject) -> None:
    """What each row is written by is the same in a batch, alone, and where the model reads the whole text each time."""
    if s.head != NEXT_TOKEN:
        return
    prompts = [r["ids"] for r in s.rows]
    with torch.no_grad():
        own = [continued(s.model, p) for p in prompts]
        given = [tokens for tokens, _ in own]
        together = written(s.view, prompts, given)
        for i, (p, (tokens, wanted)) in enumerate(zip(prompts, own, strict=True)):
            same(written(s.view, [p], [tokens])[0], wanted, "answers alone", 1e-4)
            if (together[i] - wanted).abs().max() > 0.1 and s.model.config.model_type in TIED_EXPERTS:
                wanted = own_batch(s.model, prompts, given)[i]
            same(together[i], wanted, "answers in a batch", 1e-4)


def own_batch(model: Any, prompts: list[list[int]], given: list[list[int]]) -> list[Tensor]:
    """[count, V] of each row, as the model's own code gives them in a batch that is padded on the left."""
    steps = []
    for n in range(len(given[0])):
        texts = [p + g[:n] for p, g in zip(prompts, given, strict=True)]
        longest = max(map(len, texts))
        mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
        ids = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        steps.append(model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1].float())
    return list(torch.stack(steps, dim=1))


def continued(model: Any, prompt: list[int], count: int = 6) -> tuple[list[int], Tensor]:
    """(the model's own most likely tokens, [count, V] the logits they were chosen by)."""
    ids, steps = list(prompt), []
    for _ in range(count):
        steps.append(model(input_ids=torch.tensor([ids])).logits[0, -1].float())
        ids.append(int(steps[-1].argmax()))
    return ids[len(prompt) :], torch.stack(steps)


def written(view: ModelView, prompts: list[list[int]], given: list[list[int]]) -> list[Tensor]:
    """[count, V] of each row: logits after the prompt, and after each of its given tokens but the last."""
    if not ways(view).padding and len(prompts) > 1:
        return [written(view, [p], [tokens])[0] for p, tokens in zip(prompts, given, strict=True)]
    out = []
    with Session(view, prompts, 0) as session:
        out.append(session.logits)
        for tokens in torch.tensor(given).T[:-1]:
            session.advance(tokens)
            out.append(session.logits)
    return list(torch.stack(out, dim=1))


def checkpointing(s: Subject) -> None:
    """Blocks that are computed again give the same gradients."""
    if type(s.model).__name__ in NOT_AGAIN:
        return  # refused in a sentence; tests/model/test_architectures.py sees it
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


def room(s: Subject) -> None:
    """A text of as many tokens as `max_positions` allows runs, in both layouts."""
    count = max_positions(s.model.config)
    if count > 2 * TABLE:  # it sets no limit
        return
    ids = (torch.arange(count) % (WORDS - 3) + 3).tolist()
    ids[-1] = 2
    with torch.no_grad():
        wanted = s.model(input_ids=torch.tensor([ids])).logits[0]
        for layout in s.layouts:
            s.fresh(layout).trace(collate([{"ids": ids, "labels": [IGNORE] * count}]))
    assert wanted.isfinite().all()


PROMISES: Mapping[str, Callable[[Subject], None]] = {
    "logits": logits_and_loss, "loss": own_loss, "lora": lambda s: steps(s, "lora"), "full": lambda s: steps(s, "full"),
    "spiel": lambda s: steps(s, "spiel"), "answers": answers, "checkpointing": checkpointing, "room": room,
}  # fmt: skip


def subject_of(model_type: str, head: str) -> Subject | str:
    """The subject, or the sentence in which luthier refuses it."""
    try:
        if (name := HEADS[head][1][model_type]) in REFUSED:
            return f"{name}: {REFUSED[name]}"
        subject = Subject(model_type, head)
        if head == NEXT_TOKEN:
            refuse_later_tokens(subject.view)
    except LuthierError as error:
        return str(error)
    return subject


def broken(subject: Subject, promises: Mapping[str, Callable[[Subject], None]] = PROMISES) -> dict[str, str]:
    """What does not hold, by promise."""
    out = {}
    for name, check in promises.items():
        try:
            check(subject)
        except (Failed, LuthierError, *FAILURES) as error:
            out[name] = f"{type(error).__name__}: {brief(error)[:160]}"
    return out
