"""Soft prompts at the input: vectors before each sequence, and offsets on its prompt tokens by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from luthier.data.batch import IGNORE, Batch
from luthier.model.adapters import Forward
from luthier.model.additions import around
from luthier.model.undo import Change, together
from luthier.model.view import InputHook, Inputs

PROMPT = "prompt"  # name of the per-token column that marks the prompt side


def prepend(inputs: Inputs, vectors: Tensor) -> Inputs:
    """Insert [M, D] before every sequence. Labels there are IGNORE, other columns 0; positions of the rest move by M.

    `source` keeps where each original token went, so that what comes out of the trunk lines up with the batch.
    """
    batch, embeds = inputs.batch, inputs.embeds
    assert embeds is not None
    m, device = len(vectors), batch.ids.device
    count, new_total = batch.num_sequences, batch.num_tokens + m * batch.num_sequences
    where = torch.arange(batch.num_tokens, device=device) + m * (batch.seq + 1)  # [T] -> T'
    front = torch.ones(new_total, dtype=torch.bool, device=device)
    front[where] = False

    def fill(old: Tensor, value: int) -> Tensor:
        return old.new_full((new_total, *old.shape[1:]), value).index_copy(0, where, old)

    seq = fill(batch.seq, 0)
    seq[front] = torch.arange(count, device=device).repeat_interleave(m)
    pos = fill(batch.pos + m, 0)
    pos[front] = torch.arange(m, device=device).repeat(count)
    out = embeds.new_zeros(new_total, embeds.shape[1])
    out = out.index_copy(0, where, embeds)
    out = out.index_copy(0, front.nonzero().squeeze(1), vectors.to(embeds.dtype).repeat(count, 1))
    longer = Batch(
        ids=fill(batch.ids, 0), labels=fill(batch.labels, IGNORE), seq=seq, pos=pos,
        lengths=tuple(n + m for n in batch.lengths), token={k: fill(v, 0) for k, v in batch.token.items()},
        row=batch.row, keys=batch.keys,
    )  # fmt: skip
    source = where if inputs.source is None else where[inputs.source]
    return Inputs(longer, out, source)


def num_inserted(inputs: Inputs) -> int:
    """Vectors that stand before every sequence already."""
    if inputs.source is None:
        return 0
    return (inputs.batch.num_tokens - len(inputs.source)) // inputs.batch.num_sequences


def soft_prompt(
    vectors: Callable[[], Tensor], offsets: Callable[[], Tensor] | None = None, scope: str = PROMPT
) -> InputHook:
    """A hook for `ModelView.input_hooks`.

    vectors  [M, D], asked for at every call
    offsets  [S, D], added out of place to the token at position < S of the prompt side (scope "prompt") or of the
             whole sequence ("all"); positions count the text's own tokens, whatever vectors stand before them
    Raises ValueError where scope "prompt" meets a batch without the per-token column "prompt".
    """

    def hook(inputs: Inputs, view: Any) -> Inputs:
        batch = inputs.batch
        embeds = view.embedding(batch.ids) if inputs.embeds is None else inputs.embeds
        if offsets is not None:
            table = offsets()  # [S, D]
            place = batch.pos - num_inserted(inputs)  # of the text's own tokens; another prompt's vectors are below 0
            inside = (place >= 0) & (place < len(table))
            if scope == PROMPT:
                if PROMPT not in batch.token:
                    raise ValueError(
                        "offsets on the prompt need to know it: the batch has no per-token column 'prompt'"
                    )
                inside = inside & batch.token[PROMPT].bool()
            rows = table[place.clamp(0, len(table) - 1)].to(embeds.dtype)  # [T, D]
            embeds = embeds + rows * inside[:, None]
        return prepend(replace_embeds(inputs, embeds), vectors())

    return hook


def replace_embeds(inputs: Inputs, embeds: Tensor) -> Inputs:
    """The same tokens with other embeddings."""
    return inputs._replace(embeds=embeds, batch=replace(inputs.batch))


def patch_model(view: Any) -> Change:
    """Make the plain model call apply the view's input hooks too, for loops and trainers that know nothing of luthier.

    `model(input_ids, attention_mask, labels[, prompt_mask])` and `model.generate(input_ids, attention_mask)` then see
    the vectors and offsets; logits of the inserted positions are cut off. The prompt side is `prompt_mask`, else what
    stands before the first label; generation takes all of its input as prompt. Raises ValueError where neither is given.
    """

    def call(plain: Forward) -> Forward:
        def forward(
            input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
            prompt_mask: Tensor | None = None, **kwargs: Any,
        ) -> Any:  # fmt: skip
            if input_ids is None or kwargs.get("past_key_values") is not None:
                return plain(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            if prompt_mask is None:
                if labels is None:
                    raise ValueError("a soft prompt with offsets needs prompt_mask, or labels to find the prompt by")
                prompt_mask = (labels != IGNORE).cumsum(1) == 0
            embeds, longer = widened(view, input_ids, attention_mask, prompt_mask)
            count = embeds.shape[1] - input_ids.shape[1]
            if labels is not None:
                labels = torch.cat([labels.new_full((len(labels), count), IGNORE), labels], dim=1)
            positions = (longer.cumsum(1) - 1).clamp_min(0)
            out = plain(inputs_embeds=embeds, attention_mask=longer, position_ids=positions, labels=labels, **kwargs)
            out.logits = out.logits[:, count:]
            return out

        return forward

    def write(plain: Forward) -> Forward:
        def generate(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            embeds, longer = widened(view, input_ids, attention_mask, torch.ones_like(input_ids))
            out = plain(inputs_embeds=embeds, attention_mask=longer, **kwargs)
            # The prompt's ids are before the new ones, as they are without luthier's vectors.
            if isinstance(out, Tensor):
                return torch.cat([input_ids, out], dim=1)
            out.sequences = torch.cat([input_ids, out.sequences], dim=1)
            return out

        return generate

    return together([around(view.module, call), around(view.module, write, "generate")])


def widened(view: Any, ids: Tensor, mask: Tensor | None, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """[S, L] -> (embeddings [S, M + L, D] with what the view's input hooks make of them, mask [S, M + L])."""
    mask = torch.ones_like(ids) if mask is None else mask
    real = mask.bool()
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    flat = Batch(
        ids[real], torch.full_like(ids[real], IGNORE), rows[real], (mask.cumsum(1) - 1)[real],
        tuple(real.sum(1).tolist()), {PROMPT: prompt[real]},
    )  # fmt: skip
    out = Inputs(flat, None, None)
    for hook in view.input_hooks:
        out = hook(out, view)
    assert out.embeds is not None and out.source is not None
    count, width = num_inserted(out), out.embeds.shape[1]
    body = out.embeds.new_zeros(*ids.shape, width)
    body[real] = out.embeds[out.source]
    front = torch.ones(out.batch.num_tokens, dtype=torch.bool, device=ids.device)
    front[out.source] = False
    vectors = out.embeds[front].view(len(ids), count, width)
    return torch.cat([vectors, body], dim=1), torch.cat([mask.new_ones(len(ids), count), mask], dim=1)
