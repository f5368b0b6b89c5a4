"""A message between parties; a process that is killed writes it as well."""

import torch

from luthier.collaboration.messages import Message
from luthier.model.fingerprint import Fingerprint

BASE = Fingerprint(name="tiny", weights="w" * 64, tokenizer="t" * 64)
LIMIT = 10_000


def message(**more):
    tensors = {"x": torch.arange(6.0).view(2, 3), "n": torch.tensor([3])}
    return Message.of("update", "run", "clinic", BASE, tensors, **{"round": 1, "notes": {"rows": 120}, **more})
