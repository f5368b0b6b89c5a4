"""Scaled rotary embeddings in a GGUF file: what is written for a configuration, and the configuration that a file says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from luthier.support.errors import LuthierError

FREQUENCIES = "rope_freqs.weight"
# What Llama 3.1 and its successors use beside the factor. A file holds the divisors only, not these settings.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Rope(NamedTuple):
    """entries: metadata below <architecture>.rope.scaling; divisors: [D / 2] of each frequency, or None."""

    entries: dict[str, Any]
    divisors: np.ndarray | None


def rope_of(parameters: Mapping[str, Any], head_dim: int, context: int) -> Rope:
    """What a GGUF file holds for a configuration's `rope_parameters`.

    context  positions of the model, for settings that leave the original number out
    Raises LuthierError for a scaling that llama.cpp does not compute for models of Llama's type.
    """
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return Rope({}, None)
    if kind == "linear":
        return Rope({"type": "linear", "factor": float(parameters["factor"])}, None)
    if kind == "yarn" and not parameters.get("mscale") and not parameters.get("mscale_all_dim"):
        return Rope(_yarn(parameters, context), None)
    if kind == "llama3":
        return Rope({}, divisors(parameters, head_dim))
    raise LuthierError(f"export --to gguf: rope_type {kind} has no place in a GGUF file of this model; use --to hf")


def _yarn(parameters: Mapping[str, Any], context: int) -> dict[str, Any]:
    factor = float(parameters["factor"])
    out: dict[str, Any] = {
        "type": "yarn", "factor": factor,
        "original_context_length": int(parameters.get("original_max_position_embeddings") or context),
    }  # fmt: skip
    if parameters.get("attention_factor") is not None:
        # llama.cpp multiplies the usual 0.1 ln(factor) + 1 by this; transformers takes this in its place.
        out["yarn_attn_factor"] = float(parameters["attention_factor"]) / (0.1 * math.log(factor) + 1)
    for name in ("beta_fast", "beta_slow"):
        if parameters.get(name) is not None:
            out[f"yarn_{name}"] = float(parameters[name])
    return out


def divisors(parameters: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """[head_dim / 2]: what each frequency is divided by under Llama 3's scaling, float32."""
    factor, low, high = (float(parameters[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(parameters["original_max_position_embeddings"])
    wavelength = 2 * np.pi * float(parameters["rope_theta"]) ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    out = np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, between))
    return out.astype(np.float32)


def scaling_in(
    file: str, theta: float, head_dim: int, like: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The `rope_parameters` that a file's metadata and divisors say, beside the base; empty without scaling.

    like  the settings that divisors are compared with, if they are not those of Llama 3.1
    Raises LuthierError for a scaling that transformers cannot be told.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    stem = f"{architecture}.rope.scaling."
    entries = {name.removeprefix(stem): f.contents() for name, f in reader.fields.items() if name.startswith(stem)}
    weights = next((np.array(t.data, dtype=np.float32) for t in reader.tensors if t.name == FREQUENCIES), None)
    kind = entries.get("type", "none")
    if weights is not None and kind == "none":
        settings = {"factor": float(weights.max()), **LLAMA3}
        found = {"rope_type": "llama3", **{k: like.get(k, v) for k, v in settings.items()}}
        if not np.allclose(divisors({**found, "rope_theta": theta}, head_dim), weights, rtol=1e-5):
            raise LuthierError(
                f"{file}: scales its rotary embeddings as no known setting does; use the original folder"
            )
        return found
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn") or weights is not None:
        raise LuthierError(f"{file}: rope scaling {kind} of a GGUF file is not supported; use the original folder")
    out: dict[str, Any] = {"rope_type": kind, "factor": float(entries["factor"])}
    if kind == "yarn":
        out["original_max_position_embeddings"] = int(entries["original_context_length"])
        if "yarn_attn_factor" in entries:
            out["attention_factor"] = float(entries["yarn_attn_factor"]) * (0.1 * math.log(out["factor"]) + 1)
        out |= {n: float(entries[f"yarn_{n}"]) for n in ("beta_fast", "beta_slow") if f"yarn_{n}" in entries}
    return out
