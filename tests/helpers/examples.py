"""A small instance of every exported method, for whatever is asked of all of them."""

from typing import Any

import torch

from helpers.asked import (
    CALLS,
    CANARIES,
    CHOICES,
    EDITED,
    EDITS,
    FACTS,
    KNOWN,
    PASSAGES,
    PROGRAMS,
    TASKS,
    cloze_decoder,
    cloze_encoder,
)
from helpers.cloze import cloze, with_soft
from luthier.evaluation import Retrieval
from luthier.method import registry as manifest
from luthier.method.kinds import KINDS
from luthier.tasks.classification import Classification
from luthier.testing.contract import Example
from luthier.tuners.fedkseed import FedKSeed

# A small instance of every method: fields away from their defaults where the tiny model needs it.
FIELDS: dict[str, dict[str, Any]] = {
    "adapter": {"rank": 4, "init_std": 0.05},
    "bleu": {"rows": 20, "max_new_tokens": 32},
    "caft": {"allow_untrained_heads": True, "weight": 0.5},
    "calibration": {},
    "causal-lm": {},
    "evaluate-classification": {},
    "task-classification": {},
    "dept": {"budget_length": 12, "length": 4, "max_length": 16},
    "distill": {"warmup_share": 0.0},
    "editing": {"rephrase": "otherwise"},
    "exact-match": {"match": "json", "max_new_tokens": 40},
    "fedkseed": {"num_seeds": 8},
    "forgetting": {"max_tokens": 32},
    "frozen": {},
    "function-calls": {"arguments_key": None, "max_new_tokens": 40},
    "full": {},
    "grad-transformer": {"sets": 4, "pool": "after"},
    "greedy": {},
    "green-trainer": {"flops_share": 0.7},
    "hft": {"fraction": 0.4},
    "knowledge": {"kinds": ("memorize", "rephrase")},
    "lemo": {"block_size": 2},
    "lift": {"density": 0.1, "reselect_every": 2},
    "list": {"rounds": 1, "unlabelled_steps": 2, "labelled_epochs": 1, "rank": 2},
    "layerwise": {"decay": 0.9, "reinit_blocks": 1},
    "linear": {"weights": (0.3, 0.7)},
    "lm-eval": {"tasks": ("our_choice",), "metrics": ("acc",), "folder": TASKS},
    "lora": {"rank": 4},
    "loss": {},
    "masked-accuracy": {},
    "masked-lm": {"mask_fraction": 0.3},
    "masked-thought": {"max_rate": 0.4, "random_share": 0.5},
    "norms": {"most": 2},
    "one-shot": {"rounds": 2},
    "otr": {"draws": 16},
    "pass-at-k": {"samples": 2, "k": (1, 2), "max_new_tokens": 12},
    "peft": {"type": "LORA", "options": {"use_dora": True, "r": 4}},
    "q-tuning-offline": {"keep_fraction": 0.5},
    "q-tuning": {"keep_rows": 0.5},
    "random": {"keep_fraction": 0.5},
    "retrieval": {
        "corpus": PASSAGES, "prompt": "{context} {question}", "top_k": 1, "chunk_words": 8, "overlap_words": 2,
        "context_words": 16, "max_new_tokens": 32,
    },
    "ridge": {"strength": 0.1},
    "rouge": {"stem": True, "max_new_tokens": 32},
    "sample": {"temperature": 0.7, "top_p": 0.9},
    "scdp": {"keep_fraction": 0.5},
    "seed-rounds": {"rounds": 2, "pro": True},
    "sft": {},
    "spiel": {"density": 0.05, "reselect_every": 4, "window": 2},
    "tagging": {},
    "token-classification": {},
    "transformer": {"width": 16, "layers": 1, "epochs": 12, "batch_size": 6, "learning_rate": 1e-2},
    "stages": {"stages": [{"name": "first", "max_steps": 2}, {"name": "second", "start": "first", "max_steps": 2}]},
}  # fmt: skip


def soft_rows():
    """What distill trains on, as rows and as a padded batch."""
    rows = with_soft(cloze(4, 0))
    columns = {k: torch.stack([torch.as_tensor(r["row"][k]) for r in rows]) for k in rows[0]["row"]}
    return rows, {"input_ids": torch.tensor([r["ids"] for r in rows]), **columns}


ALL = [(kind, name, cls) for kind in KINDS for name, cls in manifest.classes(kind).items()]
IDS = manifest.titles([(kind, name) for kind, name, _ in ALL])
# Of these labelled rows some of the others are a help in every step; where none is, distill skips.
MORE: dict[str, dict[str, Any]] = {
    "distill": dict(zip(("rows", "inputs"), soft_rows(), strict=True)) | {"pools": {"labelled": cloze(6, 8)}},
    "editing": {"rows": EDITS, "learns": EDITED},
    "exact-match": {"rows": CALLS},
    "forgetting": {"learns": CANARIES},
    "frozen": {"trains": False},
    "function-calls": {"rows": CALLS},
    "knowledge": {"rows": KNOWN},
    "lm-eval": {"rows": (), "learns": CHOICES},
    "list": {"pools": {"labelled": cloze(6, 8), "unlabelled": [*cloze(8, 9), *cloze(2, 8)]}},
    "pass-at-k": {"rows": PROGRAMS},
    "seed-rounds": {"tuner": FedKSeed(num_seeds=8)},
    "retrieval": {"rows": FACTS, "learns": [*FACTS, *Retrieval(**FIELDS["retrieval"]).training_rows(FACTS)]},
}
EXAMPLES = [
    Example(cls(**FIELDS.get(title, {})), **MORE.get(name, {})) for title, (_, name, cls) in zip(IDS, ALL, strict=True)
]
BY_NAME = dict(zip(IDS, EXAMPLES, strict=True))
# A class by a word in a gap, by an encoder and by a decoder that both know words.
GAP = Classification(prompt="{text} It was {label}.", words={"good": "great", "bad": "terrible"})
EXAMPLES += [Example(GAP, model=cloze_encoder), Example(GAP, model=cloze_decoder)]
