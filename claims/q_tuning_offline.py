"""The same noise, rows chosen once before training."""

from types import SimpleNamespace

import numpy as np
from noisy import PROMPT, STEPS, held_out, mean_nll, pieces, smollm, with_swapped_answers
from toys import shuffled, trained

from luthier.curation import QTuningOffline
from luthier.data.reading import no_tick
from luthier.data.store import Row
from luthier.objectives.sft import Sft
from luthier.support.rng import Streams
from luthier.tuners.lora import Lora


def measure(arm, seed, say):
    view, rows = smollm(), with_swapped_answers(pieces(256, "train", seed), seed)
    if arm == "random":
        keep = np.sort(shuffled(seed, len(rows))[:64])
    else:  # rows are token ids already: nothing is left to render
        base = SimpleNamespace(
            view=lambda: view,
            renderer=SimpleNamespace(render=lambda values, key: values),
            tokens_per_forward=2048,
            tick=no_tick,
        )
        sources = [Row(r["key"], r) for r in rows]
        keep = QTuningOffline(keep_fraction=0.25).select(sources, Streams(seed), base).keep
    kept = [rows[i] for i in keep]
    trained(view, kept, Lora(rank=16, alpha=32, seed=seed), Sft(), STEPS, 5e-4, batch=4, seed=seed)
    return {"loss": mean_nll(view, held_out()), "wrong": float(np.mean([r["token"]["wrong"][PROMPT] for r in kept]))}
