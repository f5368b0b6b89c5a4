"""A model that generates: prompts are read once, then each step writes one token for each row, with a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from luthier.model.inputs import widened
from luthier.model.tail import FAILURES, doors
from luthier.model.view import ModelView, accepted, attention_implementation, evaluating

ROOM = 64  # a full cache grows by at least this many tokens
PLAIN_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers that grow in place: a step writes one token and copies nothing.

    keys, values  [S, H, n, D], views of buffers with room for more
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [_buffer(key_states, 0), _buffer(value_states, 0)]
            self._length = 0
        added = key_states.shape[-2]
        end = self._length + added
        if end > self._buffers[0].shape[-2]:
            self._buffers = [_grown(b, self._length, max(end + ROOM, 2 * self._length)) for b in self._buffers]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., self._length : end, :] = new
        return self._show(end)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        keys, values = (b[..., :length, :] for b in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; a negative number, as in transformers."""
        if self.is_initialized and tokens_to_remove:
            self._show(self._length + tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in this order."""
        if self.is_initialized:
            self._buffers = [b[indices] for b in self._buffers]
            self._show(self._length)


def _buffer(like: Tensor, length: int) -> Tensor:
    return like.new_empty((*like.shape[:-2], length, like.shape[-1]))


def _grown(buffer: Tensor, used: int, length: int) -> Tensor:
    out = _buffer(buffer, length)
    out[..., :used, :] = buffer[..., :used, :]
    return out


def keeps_keys(view: ModelView) -> bool:
    """True if every layer of the model is attention, whose past is only keys and values, and its code takes these."""
    if "past_key_values" not in inspect.signature(doors(view.trunk)[-1].forward).parameters:
        return False
    config = view.module.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or PLAIN_LAYERS
    return set(kinds) <= PLAIN_LAYERS and not getattr(view.module, "_is_stateful", False)


class Ways(NamedTuple):
    """What a model's code does right when it writes."""

    cache: bool  # keys and values of earlier tokens are kept
    padding: bool  # prompts of different lengths stand in one batch, padded on the left


TRIED = ([7, 5, 6, 9, 8], [6, 8])  # prompts
ADDED = 3  # tokens after them


@torch.no_grad()
def ways(view: ModelView) -> Ways:
    """How this model writes the same in a batch as alone: tried once, against reading each whole text alone.

    Some models count positions without regard to padding (BART), let tokens see it, or keep no keys (XLNet).
    """
    if view.ways is None:
        limit = 1e-3 if view.dtype == torch.float32 else 0.1  # relative to the largest logit
        wanted = [_tried(view, [p], Ways(False, False))[0] for p in TRIED]
        for cache, padding in ((True, True), (False, True), (True, False)):
            if cache and not keeps_keys(view):
                continue
            try:
                groups = [TRIED] if padding else [[p] for p in TRIED]
                found = [row for group in groups for row in _tried(view, group, Ways(cache, padding))]
            except FAILURES:  # its code takes no cache, or no mask
                continue
            if all(_near(a, b, limit) for a, b in zip(found, wanted, strict=True)):
                view.ways = Ways(cache, padding)
                break
        else:
            view.ways = Ways(False, False)
    known: Ways = view.ways
    return known


def _tried(view: ModelView, prompts: Sequence[Sequence[int]], how: Ways) -> list[Tensor]:
    """[ADDED + 1, V] of each prompt: the logits after it, and after each token of a fixed text."""
    steps, phases = [], view.phases
    view.phases = []  # nothing is generated for anybody
    try:
        session = Session(view, prompts, 0, how)
        session.__enter__()
    finally:
        view.phases = phases
    with session._open:
        steps.append(session.logits)
        for token in range(5, 5 + ADDED):
            session.advance(torch.full((len(prompts),), token, device=view.device))
            steps.append(session.logits)
    return list(torch.stack(steps, dim=1))


def _near(found: Tensor, wanted: Tensor, limit: float) -> bool:
    return bool((found - wanted).abs().max() <= limit * wanted.abs().max().clamp_min(1e-9))


class Session:
    """Rows that a model writes in parallel. Use it as a context, under `torch.no_grad`.

    prompts  S lists of token ids, none empty
    fill     token id that pads shorter prompts on the left; attention never sees it
    logits   [S, V] float32, of each row's next token
    how      None: as `ways` finds
    A model with other layers than attention reads the whole text again at every step: slower, but correct.
    Raises ValueError for prompts of different lengths where the model cannot be given padding.
    """

    def __init__(self, view: ModelView, prompts: Sequence[Sequence[int]], fill: int, how: Ways | None = None) -> None:
        self.view, how = view, ways(view) if how is None else how
        if not how.padding and len({len(p) for p in prompts}) > 1:
            raise ValueError("this model writes only prompts of one length in a batch")
        self.ids, self.mask = (t.to(view.device) for t in left_padded(prompts, fill))
        self.cache = Cache(layer_class_to_replicate=GrowingLayer) if how.cache else None
        self._inserted = 0  # vectors of a soft prompt that stand before each text
        self._open = ExitStack()
        self.logits: Tensor

    def __enter__(self) -> Session:
        self._open.enter_context(evaluating(self.view.module))
        self._open.enter_context(self.view.phase("generate"))
        self._open.enter_context(attention_implementation(self.view.module, self.view.padded_attention))
        self._read()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def _read(self) -> None:
        """Run the trunk over the whole texts, after the view's input hooks."""
        if self.view.input_hooks:
            embeds, mask = widened(self.view, self.ids, self.mask, torch.ones_like(self.ids))
            self._inserted = embeds.shape[1] - self.ids.shape[1]
            self._run(mask, inputs_embeds=embeds)
        else:
            self._run(self.mask, input_ids=self.ids)

    def _run(self, mask: Tensor, **tokens: Tensor) -> None:
        """Run the trunk over new tokens, and keep the logits of the last one."""
        count = next(iter(tokens.values())).shape[1]
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -count:] + self.view.first_position  # [S, n]
        given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": self.cache is not None}
        if self.cache is not None:
            given["past_key_values"] = self.cache
        trunk = self.view.trunk
        # Some models compute positions themselves, from the mask.
        out = trunk(**tokens, **accepted(trunk, given, {"position_ids", "use_cache"})).last_hidden_state
        self.logits = self.view.head_logits(out[:, -1])  # [S, n, D] -> [S, V]

    def advance(self, tokens: Tensor) -> None:
        """Add one token to each row, [S] int64."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        if self.cache is None:
            self._read()
            return
        front = self.mask.new_ones(len(tokens), self._inserted)
        self._run(torch.cat([front, self.mask], dim=1), input_ids=tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """Continue with only these rows, [S'] int64."""
        self.ids, self.mask, self.logits = self.ids[rows], self.mask[rows], self.logits[rows]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)


def left_padded(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both [S, L]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[fill] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
