"""Generate answers in batches, from the same prompt ids as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.data.reading import Tick, no_tick
from luthier.data.rendering import Renderer
from luthier.inference.session import Session, ways
from luthier.model.view import ModelView
from luthier.step.lab import Completion
from luthier.support.rng import Streams

ROWS, TOKENS = 128, 16_384  # of a batch at most; tokens include prompts and answers
SHRINK = 0.75  # finished rows are removed from a batch if at most this share is left

Choose = Callable[[Tensor, Sequence[int]], Tensor]  # (logits [S, V], positions of the S prompts) -> token ids [S]


def largest(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Greedy."""
    return logits.argmax(-1)


@torch.no_grad()
def generate(
    view: ModelView, prompts: Sequence[Sequence[int]], renderer: Renderer, max_new_tokens: int, *,
    choose: Choose = largest, tick: Tick = no_tick,
) -> list[Completion]:  # fmt: skip
    """Completions of tokenised prompts, in their order. Batches hold prompts of similar length.

    choose  picks each row's next token
    """
    fill, stops = renderer.tokenizer.pad_token_id or 0, frozenset(renderer.stop_ids)
    done: dict[int, Completion] = {}
    lengths = [len(p) for p in prompts]
    for part in batches(lengths, max_new_tokens, padding=not prompts or ways(view).padding):
        where = f"prompts {len(done) + 1} to {len(done) + len(part)}"

        def ended(count: int, before: int = len(done), where: str = where) -> None:
            tick("answering", before + count, where)

        ended(0)
        written = _written(view, [prompts[i] for i in part], part, fill, stops, max_new_tokens, choose, ended)
        ended(len(part))
        done |= {i: _cut(tokens, stops, renderer, prompts[i]) for i, tokens in written.items()}
    return [done[i] for i in range(len(prompts))]


def batches(lengths: Sequence[int], more: int, padding: bool = True) -> Iterator[list[int]]:
    """Positions, longest first, in batches of at most ROWS rows and about TOKENS tokens, answers of `more` included.

    padding  prompts of different lengths may stand in one batch
    """
    part: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = len(part) == ROWS or (len(part) + 1) * (lengths[part[0]] + more) > TOKENS if part else False
        if part and (full or not (padding or lengths[i] == lengths[part[0]])):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _written(
    view: ModelView, prompts: Sequence[Sequence[int]], names: Sequence[int], fill: int, stops: frozenset[int],
    max_new_tokens: int, choose: Choose, ended: Callable[[int], None],
) -> dict[int, list[int]]:  # fmt: skip
    """Tokens by the prompt's index, with the stop token if there is one.

    ended  called with the number of finished answers after each one
    """
    out: dict[int, list[int]] = {name: [] for name in names}
    live, going = list(names), [True] * len(names)  # rows of the session, and which of them are not finished
    with Session(view, prompts, fill) as session:
        for step in range(max_new_tokens):
            tokens = choose(session.logits, live)  # [S]
            for row, token in enumerate(tokens.tolist()):
                if going[row]:
                    out[live[row]].append(token)
                    going[row] = token not in stops
            if not any(going) or step + 1 == max_new_tokens:
                break
            if not all(going):
                ended(len(names) - sum(going))
            if sum(going) <= SHRINK * len(live):
                rows = torch.tensor([i for i, on in enumerate(going) if on], device=tokens.device)
                session.keep(rows)
                tokens, live, going = tokens[rows], [live[i] for i in rows.tolist()], [True] * len(rows)
            session.advance(tokens)
    return out


def drawn(generators: Sequence[torch.Generator], temperature: float) -> Choose:
    """Draws from the softmax of logits / temperature: the largest value after Gumbel noise is added.

    Each prompt has its own generator, so batches and order do not change its draws.
    """

    def choose(logits: Tensor, rows: Sequence[int]) -> Tensor:
        draws = [torch.rand(logits.shape[1], generator=generators[i], device=generators[i].device) for i in rows]
        uniform = torch.stack(draws).to(logits.device).clamp_(1e-20, 1 - 1e-7)  # [S, V]
        return (logits / temperature - (-uniform.log()).log()).argmax(-1)

    return choose


def sampled(
    view: ModelView, prompts: Sequence[Sequence[int]], renderer: Renderer, max_new_tokens: int, count: int, temperature: float,
    streams: Streams, keys: Sequence[str], tick: Tick = no_tick,
) -> list[list[str]]:  # fmt: skip
    """`count` drawn answers to each prompt; draws are keyed by `keys`, one for each prompt."""
    several = [p for p in prompts for _ in range(count)]
    generators = [streams.torch("sample", key, i) for key in keys for i in range(count)]
    choose = drawn(generators, temperature)
    out = [c.text for c in generate(view, several, renderer, max_new_tokens, choose=choose, tick=tick)]
    return [out[i : i + count] for i in range(0, len(out), count)]


def _cut(tokens: list[int], stops: frozenset[int], renderer: Renderer, asked: Sequence[int]) -> Completion:
    end = next((i for i, t in enumerate(tokens) if t in stops), None)
    text, thought = renderer.answer_text(tokens[:end], asked)
    whole = Completion(text, end is not None, len(tokens) if end is None else end, thought)
    return whole.up_to(renderer.stop_strings)


@dataclass(frozen=True)
class Generation:
    """Greedy answers in batches: a lab's `Generator`."""

    renderer: Renderer
    tick: Tick = no_tick

    def __call__(self, view: ModelView, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        return generate(view, prompts, self.renderer, max_new_tokens, tick=self.tick)
