"""Small models and texts that several experiments share: made on the spot, nothing to download."""

from __future__ import annotations

import gzip
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import torch
import transformers as tf

from luthier.data.batch import collate
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.cache import cache_folder, key_of, made
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.full import Full

DATA = Path(os.environ.get("LUTHIER_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
WIDTH = 96  # bytes of a piece of text


def rows_of(name: str, split: str) -> list[dict]:
    """Rows of one of the sets in shared/data."""
    with gzip.open(DATA / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def llama(vocabulary: int, width: int, layers: int, heads: int, inner: int, seed: int = 0) -> ModelView:
    """A Llama with random weights, float32."""
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
        num_key_value_heads=heads, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return ModelView.probed(tf.LlamaForCausalLM(config))


def python_text() -> bytes:
    """Source of the standard library, in the order of file names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(f.read_bytes() for f in sorted(folder.glob("*.py"))[:150])


def school_text() -> bytes:
    """Questions and solutions of grade-school mathematics."""
    return "\n\n".join(f"{r['question']}\n{r['solution']}" for r in rows_of("gsm8k", "train")).encode()


def pieces(text: bytes, count: int, purpose: str, seed: int = 0) -> list[dict]:
    """`count` rows of WIDTH bytes from random places, every byte but the first supervised."""
    starts = Streams(seed).at(purpose).integers(0, len(text) - WIDTH, size=count)
    out = []
    for i, start in enumerate(starts.tolist()):
        ids = list(text[start : start + WIDTH])
        out.append(
            {
                "ids": ids,
                "labels": [-100, *ids[1:]],
                "key": f"{purpose}:{i}",
                "token": {"prompt": [1] + [0] * (WIDTH - 1)},
            }
        )
    return out


def trained(
    view: ModelView, rows: list[dict], tuner, objective, steps: int, rate: float, batch: int = 16, seed: int = 0, **more
):
    """Tune in place; returns the loop."""
    settings = TrainSettings(
        max_steps=steps, batch_size=batch, learning_rate=rate, warmup_fraction=min(0.5, 6 / steps), tokens_per_forward=8192,
        seed=seed, **more,
    )  # fmt: skip
    trainable = tuner.attach(view, None, steps)
    loop = Loop(view, rows, trainable, objective, settings)
    for _ in range(steps):
        loop.step()
    return loop


@torch.no_grad()
def mean_nll(view: ModelView, rows: list[dict]) -> float:
    """Nats a token."""
    from luthier.objectives.base import Forward

    view.module.eval()
    total, n = 0.0, 0
    for i in range(0, len(rows), 64):
        nll = Forward(collate(rows[i : i + 64]).to(view.device), view).nll()
        total, n = total + float(nll.sum()), n + len(nll)
    return total / n


def python_reader() -> ModelView:
    """The sheets' toy: 4 blocks, width 128, bytes, trained for 1100 steps on Python source; kept in the cache."""
    folder = cache_folder() / "claims" / key_of("python-reader", 3)
    if not folder.exists():
        view = llama(256, 128, 4, 4, 344)
        rows = pieces(python_text(), 1100 * 16, "pretrain")
        trained(view, rows, Full(), Sft(), 1100, 3e-3)
        with made(folder) as temporary:
            view.module.save_pretrained(temporary)
    return ModelView.probed(tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32))


def bench(tuner, seed: int, rate: float, steps: int = 150) -> dict[str, float]:
    """150 steps on grade-school text: the loss on it, on Python source, and both before."""
    view = python_reader()
    school, code = school_text(), python_text()
    target, source = pieces(school, 256, "held-school"), pieces(code, 256, "held-python")
    out = {"target_before": mean_nll(view, target), "source_before": mean_nll(view, source)}
    trained(view, pieces(school, steps * 16, "school", seed), tuner, Sft(), steps, rate, seed=seed)
    out |= {"target": mean_nll(view, target), "source": mean_nll(view, source)}
    return out | {"rise": out["source"] - out["source_before"], "gain": out["target_before"] - out["target"]}


def shuffled(seed: int, n: int) -> np.ndarray:
    return Streams(seed).at("shuffle").permutation(n)
