"""Greedy answers to 100 short prompts: luthier's generation against transformers' own, alternating, in one process.

python benchmarks/generation.py [--rounds 3] [--rows 100] [--tokens 48]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine_note import machine_note

from luthier.data.builtin.requests import demo_rows
from luthier.data.rendering import Renderer
from luthier.inference.generation import generate
from luthier.inference.session import left_padded
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate

HERE = Path(__file__).parent
BATCH = 25  # of transformers' own: what luthier used before it wrote answers itself


@torch.no_grad()
def theirs(view: Any, prompts: list[list[int]], renderer: Renderer, tokens: int) -> int:
    """Answers that end by themselves, written by transformers, longest prompts first."""
    fill, stops, ended = renderer.tokenizer.pad_token_id, list(renderer.stop_ids), 0
    order = sorted(prompts, key=len, reverse=True)
    view.head_weight.requires_grad_(True)  # else the sliced state sends the head through a slow product
    for start in range(0, len(order), BATCH):
        ids, mask = left_padded(order[start : start + BATCH], fill)
        out = view.module.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=fill,
            eos_token_id=stops,
        )  # fmt: skip
        ended += sum(bool(set(row) & set(stops)) for row in out[:, ids.shape[1] :].tolist())
    view.head_weight.requires_grad_(False)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    located = locate(BUILTIN)
    tokenizer = load_tokenizer(located)
    renderer = Renderer(tokenizer, "Turn the request into a JSON call.")
    view = load_model(located, "causal-lm", None, tokenizer=tokenizer)
    rows = [{"prompt": r["prompt"], "completion": r["answer"]} for r in demo_rows()[1]][: args.rows]
    prompts = [renderer.prompt_ids(r) for r in rows]
    seconds: dict[str, list[float]] = {"luthier": [], "transformers": []}
    ended: dict[str, int] = {}
    for _ in range(args.rounds):
        for arm in seconds:
            started = time.perf_counter()
            if arm == "luthier":
                ended[arm] = sum(c.stopped for c in generate(view, prompts, renderer, args.tokens))
            else:
                ended[arm] = theirs(view, prompts, renderer, args.tokens)
            seconds[arm].append(time.perf_counter() - started)
    rates = {arm: args.rows / statistics.median(s) for arm, s in seconds.items()}
    result = {
        "rows": args.rows, "tokens": args.tokens, "seconds": seconds, "answers_per_second": rates, "ended": ended,
        "ratio": rates["luthier"] / rates["transformers"], **machine_note(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    (HERE / "results" / "generation.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
