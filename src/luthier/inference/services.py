"""Labs with the services of this room: scoring and generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.inference.generation import Generation
from luthier.inference.scoring import USUAL, Scoring
from luthier.model.loading import ends_in
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.outcome import RenderedRows
from luthier.tasks.base import Task


def lab_with(
    renderer: Renderer, models: Mapping[str, Callable[[], ModelView]], *, task: Task = USUAL,
    tokens_per_forward: int = 2048, seed: int = 0, sets: Mapping[str, RenderedRows] | None = None, tick: Tick = no_tick,
) -> Lab:  # fmt: skip
    """A lab that renders, scores and generates. Runs add nested runs themselves.

    models              by role; each is loaded at its first use
    tokens_per_forward  limit of one forward pass while scoring
    """
    scorer = Scoring(tokens_per_forward, task, tick, task.draw(renderer.tokenizer, seed))
    generator = Generation(renderer, tick)
    return Lab(dict(sets or {}), seed, models, renderer, scorer, generator, tick=tick)


def lab_around(model: PreTrainedModel, tokenizer: Any, seed: int = 0) -> Lab:
    """A lab around a plain transformers model, for a method in your own loop."""
    ends = ends_in(getattr(model, "generation_config", None), model.config)
    renderer = Renderer(tokenizer, ends=ends.ids, stop_strings=ends.texts)
    return lab_with(renderer, {"base": partial(ModelView.probed, model, tokenizer)}, seed=seed)
