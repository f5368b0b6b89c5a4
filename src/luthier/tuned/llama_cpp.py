"""Compare a GGUF file with the tuned model in llama.cpp itself, where the package llama-cpp-python is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.support.errors import LuthierError

LENGTH = 16  # tokens of an answer that are compared


def installed() -> bool:
    """Whether files can be compared in llama.cpp on this machine."""
    return importlib.util.find_spec("llama_cpp") is not None


def compare(
    file: Path, tokenizer: Any, texts: Sequence[str], prompts: Sequence[Sequence[int]], logits: Callable[[Tensor], Tensor],
    tolerance: float,
) -> dict[str, int]:  # fmt: skip
    """Compare token ids and greedy answers. Returns how many texts and answers were compared.

    texts      tokenised in both, with the tokens that the tokenizer puts around a text, and without
    prompts    ids that answers are generated from
    logits     ids [1, T] -> the tuned model's logits [1, T, V]
    tolerance  how much below its largest logit, as a share of it, the tuned model may see llama.cpp's choice: float16 may
               change the order of two equally good tokens
    Raises LuthierError for the first text or answer that differs.
    """
    import llama_cpp

    llama = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=1, verbose=False)
    for text in texts:
        for around in (True, False):
            mine = tokenizer(text, add_special_tokens=around)["input_ids"]
            its = llama.tokenize(text.encode(), add_bos=around, special=True)
            if mine != its:
                raise LuthierError(
                    f"{file.name}: llama.cpp tokenises {text[:60]!r} as {its[:12]}, the tuned model as {mine[:12]}"
                )
    for ids in prompts:
        llama.reset()
        answer = _answer(llama, list(ids))
        _refuse_other(file, tokenizer, list(ids), answer, logits, tolerance)
    return {"texts": len(texts), "answers": len(prompts)}


def _answer(llama: Any, ids: list[int]) -> list[int]:
    """llama.cpp's greedy answer, with the token that ends it."""
    out: list[int] = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        out.append(token)
        if len(out) == LENGTH or token == llama.token_eos():
            return out
    return out


def _refuse_other(
    file: Path, tokenizer: Any, ids: list[int], answer: list[int], logits: Callable[[Tensor], Tensor], tolerance: float
) -> None:
    scores = logits(torch.tensor([[*ids, *answer]]))[0, len(ids) - 1 : -1]  # [answer, V]
    best = scores.max(-1).values
    below = (best - scores.gather(-1, torch.tensor(answer)[:, None])[:, 0]) / scores.abs().max(-1).values
    if (below > tolerance).any():
        at = int((below > tolerance).nonzero()[0])
        mine = tokenizer.decode(int(scores[at].argmax()))
        raise LuthierError(
            f"{file.name}: llama.cpp answers {tokenizer.decode(answer)!r}, the tuned model has {mine!r} as token {at + 1}"
        )
