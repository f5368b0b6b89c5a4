"""Audit A: which tokens can an observer read from a low-rank gradient or update?

The rows of dL/dW lie in the span of a layer's inputs, those of dL/dB in the span of A times them. In block 0 of a model
with rotary positions an input depends only on its token, so every token of the vocabulary can be tested.
Source: ReCIT (arXiv:2504.20570) and DAGER (arXiv:2405.15586), as derived in the sheet. The formulas of ReCIT's own filter
are not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from luthier.collaboration.audit.membership import area
from luthier.data.batch import collate
from luthier.model.anatomy import Linear
from luthier.model.view import ModelView

ROLES = ("q", "k", "v", "qkv")  # of block 0's linears: those whose inputs are single tokens
RANK_TOLERANCE = 1e-5  # of the largest singular value, for float32 payloads
EXACT = 1e-3  # distance under which a token is in the span
FALSE_POSITIVES = (1e-4, 1e-3)  # rates at which recall is reported
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the rank, tried in soft mode
CALIBRATION = 20  # least number of payloads of public text for soft mode


class Found(NamedTuple):
    """What can be read from one tensor of a payload.

    tensor    its name: "a." and "b." for the factors of a low-rank update
    rank      of the payload, and how many dimensions there are
    mode      "exact", "soft", or "saturated": every token lies in the span, so nothing can be said
    recall    share of the true tokens found, by false-positive rate; none if saturated
    auc       probability that a true token is nearer to the span than another token
    inside    share of the true tokens within EXACT of the span
    """

    tensor: str
    rank: int
    width: int
    mode: str
    recall: dict[float, float]
    auc: float
    inside: float


class _Reached(Exception):
    """Raised once all requested layers have got their inputs: the rest of the forward pass is not needed."""


def inputs_of(view: ModelView, linears: Sequence[Linear]) -> dict[str, Tensor]:
    """[V, in] float64 by layer name: the input of these layers of block 0 for each token of the vocabulary.

    Raises ValueError if the input also depends on the position, or for a layer of another block, or one whose inputs mix
    tokens.
    """
    for linear in linears:
        if linear.block != 0 or linear.role not in ROLES:
            raise ValueError(f"{linear.module} is not a projection of block 0, so its inputs are mixtures of tokens")
    seen: dict[str, list[Tensor]] = {x.name: [] for x in linears}

    def keep(linear: Linear, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        pairs = args[0].detach().double().reshape(-1, 2, linear.shape[1])  # a token at two positions
        if not torch.allclose(pairs[:, 0], pairs[:, 1], atol=1e-5):
            raise ValueError(
                f"{linear.module}: inputs depend on the position, so single tokens cannot be tested in this model"
            )
        seen[linear.name].append(pairs[:, 0])
        if len({len(s) for s in seen.values()}) == 1:
            raise _Reached

    handles = [view.module.get_submodule(x.module).register_forward_pre_hook(partial(keep, x)) for x in linears]
    size = view.embedding.num_embeddings
    rows = [{"ids": [t, t], "labels": [-100, t], "key": str(t)} for t in range(size)]
    try:
        with torch.no_grad():
            for start in range(0, size, 512):
                with suppress(_Reached):
                    view.trace(collate(rows[start : start + 512]).to(view.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(s) for name, s in seen.items()}


def span(payload: Tensor, tolerance: float = RANK_TOLERANCE) -> Tensor:
    """[k, d] float64: an orthonormal basis of the rows of [n, d], by decreasing size; k singular values exceed tolerance."""
    _, s, rows = torch.linalg.svd(payload.double(), full_matrices=False)
    kept: Tensor = rows[: int((s > tolerance * s[0]).sum()) if len(s) and s[0] > 0 else 0]
    return kept


def distances(candidates: Tensor, basis: Tensor) -> Tensor:
    """[V]: distances of unit vectors from a subspace; candidates [V, d], basis [k, d]. Zero vectors count as far."""
    unit = torch.nn.functional.normalize(candidates.double(), dim=1)
    far = (unit - unit @ basis.T @ basis).norm(dim=1)
    return torch.where(candidates.norm(dim=1) > 0, far, torch.ones_like(far))


def distinct(rows: Sequence[Any]) -> list[int]:
    """The tokens of rows, each once."""
    return sorted({int(t) for r in rows for t in r["ids"]})


class TokenAudit:
    """Looks for input tokens in a model's low-rank updates or gradients.

    Call `calibrate` with payloads of public rows before you use soft mode.

    initial  [R, in] of each matrix by parameter name: A0, the shared start
    """

    def __init__(self, view: ModelView, initial: Mapping[str, Tensor]) -> None:
        linears = [x for x in view.anatomy.linears if x.name in initial and x.block == 0 and x.role in ROLES]
        if not linears:
            raise ValueError("no query, key or value matrix of block 0 was tuned, so tokens cannot be looked for")
        self.inputs = inputs_of(view, linears)
        self.initial = {n: initial[n].double() for n in self.inputs}
        self.public: list[tuple[Mapping[str, Tensor], frozenset[int]]] = []

    def calibrate(self, payloads: Sequence[Mapping[str, Tensor]], tokens: Sequence[Sequence[int]]) -> None:
        """Use payloads of public rows, made by the same recipe, and their tokens: frequent tokens are near any span."""
        self.public = [(p, frozenset(t)) for p, t in zip(payloads, tokens, strict=True)]

    def __call__(self, payload: Mapping[str, Tensor], tokens: Sequence[int]) -> list[Found]:
        """What each tensor of block 0 reveals of these distinct tokens. Raises ValueError for a payload of another shape."""
        true, out = frozenset(tokens), []
        if not true:
            raise ValueError("the true tokens are needed to say how many are found")
        for name in self.inputs:
            for key in (f"a.{name}", f"b.{name}"):
                if key not in payload:
                    raise ValueError(f"the payload has no {key}; it belongs to another adapter")
                out.append(self._of(key, payload[key], true))
        return out

    def _of(self, key: str, tensor: Tensor, true: frozenset[int]) -> Found:
        rows, candidates = tensor.double(), self._candidates(key)
        if rows.shape[1] != candidates.shape[1]:
            raise ValueError(f"{key} is {tuple(tensor.shape)}, its rows should have {candidates.shape[1]} numbers")
        basis = span(rows)
        width, limit = candidates.shape[1], min(rows.shape)
        if len(basis) >= width or len(basis) == 0:
            return Found(key, len(basis), width, "saturated", {}, float("nan"), 0.0)
        far = distances(candidates, basis)
        inside = float((far[sorted(true)] < EXACT).double().mean())
        if len(basis) < limit or inside > 0 or len(self.public) < CALIBRATION:
            return Found(key, len(basis), width, "exact", *_scored(far, true), inside)
        return Found(key, len(basis), width, "soft", *self._soft(key, rows, true), inside)

    def _soft(self, key: str, rows: Tensor, true: frozenset[int]) -> tuple[dict[float, float], float]:
        """Distances relative to those of public payloads. The number of directions is chosen on the public ones."""
        known = [(p[key].double(), t) for p, t in self.public]
        best = max(SHARES, key=lambda share: np.mean([_scored(z, t)[1] for z, t in self._left_out(key, known, share)]))
        spread = torch.stack([self._far(key, r, best) for r, _ in known])
        return _scored(_standard(self._far(key, rows, best), spread), true)

    def _left_out(
        self, key: str, known: list[tuple[Tensor, frozenset[int]]], share: float
    ) -> list[tuple[Tensor, frozenset[int]]]:
        far = torch.stack([self._far(key, r, share) for r, _ in known])  # [P, V]
        keep = ~torch.eye(len(far), dtype=torch.bool)
        return [(_standard(far[i], far[keep[i]]), t) for i, (_, t) in enumerate(known)]

    def _far(self, key: str, rows: Tensor, share: float) -> Tensor:
        basis = span(rows, 0.0)
        return distances(self._candidates(key), basis[: max(1, round(share * len(basis)))])

    def _candidates(self, key: str) -> Tensor:
        """[V, in] for an A, [V, R] for a B."""
        inputs = self.inputs[key[2:]]
        return inputs if key.startswith("a.") else inputs @ self.initial[key[2:]].T


def _standard(far: Tensor, others: Tensor) -> Tensor:
    return (far - others.mean(0)) / others.std(0).clamp_min(1e-12)


def _scored(far: Tensor, true: frozenset[int]) -> tuple[dict[float, float], float]:
    """(recall by false-positive rate, AUC) of "near means present"."""
    present = torch.zeros(len(far), dtype=torch.bool)
    present[sorted(true)] = True
    if bool(present.all()):
        return {}, float("nan")
    others = far[~present].sort().values
    recall = {}
    for rate in FALSE_POSITIVES:
        allowed = int(rate * len(others))
        recall[rate] = float((far[present] < others[allowed]).double().mean())
    return recall, area(-far[present].numpy(), -far[~present].numpy())
