"""The same noise, rows chosen once before training."""

import numpy as np
from noisy import PROMPT, STEPS, chosen_once, held_out, mean_nll, pieces, smollm, with_swapped_answers
from toys import shuffled, trained

from luthier.objectives.sft import Sft
from luthier.tuners.lora import Lora


def measure(arm, seed, say):
    view, rows = smollm(), with_swapped_answers(pieces(256, "train", seed), seed)
    drawn = np.sort(shuffled(seed, len(rows))[:64])
    keep = drawn if arm == "random" else chosen_once(rows, view, 0.25, seed)
    kept = [rows[i] for i in keep]
    trained(view, kept, Lora(rank=16, alpha=32, seed=seed), Sft(), STEPS, 5e-4, batch=4, seed=seed)
    return {"loss": mean_nll(view, held_out()), "wrong": float(np.mean([r["token"]["wrong"][PROMPT] for r in kept]))}
