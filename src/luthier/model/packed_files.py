"""Checkpoints that GPTQ and AWQ packed into 32-bit numbers, read as plain weights: (code - zero) times the scale of its group.

The methods: Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978. The layouts are those of AutoGPTQ and
AutoAWQ, as gptqmodel 7.6 reads them: logits agree with those of its layers to the bfloat16 of its kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

PACKED_BY = ("gptq", "awq")
GPTQ_BITS = (2, 4, 8)  # with 3, a code lies across two numbers
ONE_IN_EACH = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of eight neighbouring outputs lie in a number


def problem(method: str, said: Mapping[str, Any]) -> str | None:
    """Why files that are packed in this way cannot be read; None if they can.

    said  the quantisation's own settings in the checkpoint
    """
    bits, layout = bits_of(said), str(said.get("checkpoint_format") or "gptq").lower()
    if method == "gptq":
        if bits not in GPTQ_BITS:
            return f"by GPTQ in {bits} bits, and luthier reads {', '.join(map(str, GPTQ_BITS))}"
        return (
            None
            if layout in ("gptq", "gptq_v2")
            else f"by GPTQ in the layout {layout}, and luthier reads gptq and gptq_v2"
        )
    layout = str(said.get("version") or said.get("format") or "gemm").lower()
    if bits != 4:
        return f"by AWQ in {bits} bits, and luthier reads 4"
    return None if layout == "gemm" else f"by AWQ in the layout {layout}, and luthier reads gemm"


def bits_of(said: Mapping[str, Any]) -> Any:
    """The bits of a code; older tools call them w_bit."""
    return said.get("bits", said.get("w_bit"))


def plain_tensors(files: tuple[Path, ...], method: str, said: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with a weight [out, in] float32 in place of each packed one.

    files  in safetensors
    Raises ValueError where the tensors of a layer do not fit each other.
    """
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    for name in [n for n in tensors if n.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        parts = [tensors.pop(f"{layer}.{part}", None) for part in ("qweight", "qzeros", "scales", "g_idx")]
        codes, zeros, scales, groups = parts
        if codes is None or zeros is None or scales is None:
            raise ValueError(f"{layer} has no qzeros or no scales")
        if method == "awq":
            tensors[f"{layer}.weight"] = awq_weight(codes, zeros, scales)
        else:
            second = said.get("checkpoint_format") == "gptq_v2"
            tensors[f"{layer}.weight"] = gptq_weight(codes, zeros, scales, groups, int(bits_of(said)), second)
    return tensors


def unpacked(numbers: Tensor, bits: int) -> Tensor:
    """[..., N] int32 -> [..., N, 32 / bits]: the codes in each number, the lowest bits first."""
    codes: Tensor = (numbers.unsqueeze(-1) >> torch.arange(0, 32, bits)) & (2**bits - 1)
    return codes


def gptq_weight(
    codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None, bits: int, second: bool = False
) -> Tensor:
    """[out, in] float32.

    codes   [in * bits / 32, out] int32: a number holds codes of neighbouring inputs
    zeros   [G, out * bits / 32] int32: a number holds codes of neighbouring outputs; in the first format, each is less by 1
    scales  [G, out]
    groups  [in]: the group of each input; None: equal runs
    """
    rows = unpacked(codes, bits).transpose(1, 2).reshape(-1, codes.shape[1])  # [in / 8, out, 8] -> [in, out]
    offsets = unpacked(zeros if second else zeros + ONE_IN_EACH[bits], bits).flatten(1)  # [G, out]
    return _weight(rows, offsets, scales, groups)


def awq_weight(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """[out, in] float32, of 4-bit codes.

    codes   [in, out / 8] int32: a number holds codes of neighbouring outputs, in an order of its own
    zeros   [G, out / 8] int32, in the same order
    scales  [G, out]
    """
    rows, offsets = (unpacked(t, 4)[..., AWQ_PLACES].flatten(1) for t in (codes, zeros))
    return _weight(rows, offsets, scales, None)


def _weight(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
    """codes [in, out], zeros and scales [G, out], groups [in] -> [out, in]"""
    inputs, count = len(codes), len(scales)
    if zeros.shape != scales.shape or codes.shape[1] != scales.shape[1] or inputs % count:
        raise ValueError(
            f"codes {tuple(codes.shape)}, zeros {tuple(zeros.shape)} and scales {tuple(scales.shape)} do not fit"
        )
    group = torch.arange(inputs) // (inputs // count) if groups is None else groups.long()
    return ((codes - zeros[group]) * scales.float()[group]).T.contiguous()
