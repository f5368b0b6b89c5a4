"""The hash that identifies a base model: its tensors, and the tokenizer with its template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn


class Fingerprint(BaseModel, frozen=True):
    """The identity of a base. Two bases are the same if both hashes are equal."""

    name: str
    weights: str
    tokenizer: str

    def same_base(self, other: Fingerprint) -> bool:
        """Equal in weights and tokenizer; the name is only a name."""
        return (self.weights, self.tokenizer) == (other.weights, other.tokenizer)


def tensor_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def configured(config: Any) -> str:
    """A text that changes with every setting of a model's configuration, but not with the place or the program that saved it."""
    left_out = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "id2label", "label2id")
    return json.dumps({k: v for k, v in config.to_dict().items() if k not in left_out}, sort_keys=True, default=str)


def fingerprint(model: nn.Module, tokenizer: Any, name: str, without: Collection[str] = ()) -> Fingerprint:
    """Hash a model and its tokenizer; about a second for each 500 MB.

    without  parameters that do not belong to the base: a new head, drawn at random at every load
    """
    parameters = {n: p for n, p in model.named_parameters() if ".luthier_" not in n and n not in without}
    words = "" if tokenizer is None else json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return Fingerprint(name=name, weights=tensor_hash(parameters), tokenizer=hashlib.sha256(words.encode()).hexdigest())
