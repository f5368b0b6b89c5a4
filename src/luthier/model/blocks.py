"""What the attention and the MLP of a block compute, or that it is not known.

An answer is tried out before it is given: the block's own code runs over small random matrices, and what it computes
must be what the answer says. No weight of the model is read, so a model without weights can be asked as well.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

Get = Callable[[str], nn.Module]

TRIAL, RECORD = "luthier-trial", "luthier_record"
WIDTH, TOKENS = 4, 3  # of a trial's hidden states
NEURONS = 6
# What code raises that is asked for something it does not do: another signature, other shapes, parts that are missing.
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)
_NORM = {role: re.compile(rf"({role[0]}|{role})_?(layer_?)?norm") for role in ("query", "key")}


@dataclass(frozen=True)
class Unknown:
    """The block does something that is not understood."""

    why: str


@dataclass(frozen=True)
class GatedMlp:
    """An MLP that computes down(activation(gate(x)) * up(x)); the activation treats every number by itself.

    module, gate, up, down  names of modules; each of the three may have a bias
    """

    module: str
    gate: str
    up: str
    down: str
    activation: nn.Module


@dataclass(frozen=True)
class Attention:
    """An attention over q(x) and k(x), cut into heads and normed where there are norms, then turned by rotary positions.

    module .. o     names of modules
    q_norm, k_norm  their names, or None
    norm_by_head    True: a norm sees one head at a time; False: all heads as one vector
    window          keys a query sees, its own included; None: all of them
    causal          a query sees no later key
    """

    module: str
    q: str
    k: str
    v: str
    o: str
    q_norm: str | None
    k_norm: str | None
    norm_by_head: bool
    head_dim: int
    window: int | None
    causal: bool


def queries_and_keys(get: Get, parts: Attention, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """([H, T, d], [H_kv, T, d]): what the attention compares, before rotary positions turn it; hidden [1, T, D].

    get  a module by its name
    """
    made = []
    for projection, norm in ((parts.q, parts.q_norm), (parts.k, parts.k_norm)):
        x = get(projection)(hidden)[0]  # [T, H * d]
        if norm is not None and not parts.norm_by_head:
            x = get(norm)(x)
        x = x.unflatten(-1, (-1, parts.head_dim))  # [T, H, d]
        if norm is not None and parts.norm_by_head:
            x = get(norm)(x)
        made.append(x.transpose(0, 1))
    return made[0], made[1]


# --- asking ---


def gated_mlp(block: str, modules: Mapping[str, nn.Module], roles: Mapping[str, list[str]]) -> GatedMlp | Unknown:
    """The MLP of the block with this name.

    modules  the model's modules by name
    roles    role -> names of the block's linear layers in that role
    """
    names = _one_each(modules, roles, ("gate", "up", "down"))
    if isinstance(names, Unknown):
        return names
    parent = names["gate"].rpartition(".")[0]
    if parent.rpartition(".")[0] != block:
        return Unknown(f"{parent} is one part of a larger MLP")
    mlp, layers = modules[parent], {modules[n] for n in names.values()}
    others = [m for m in mlp.children() if m not in layers]
    if len(others) != 1 or any(True for _ in (*others[0].parameters(), *others[0].buffers())):
        return Unknown(f"{parent} ({type(mlp).__name__}) has another activation than one module without weights")
    found = GatedMlp(parent, **names, activation=others[0])
    if not _computes(mlp, modules, found):
        return Unknown(
            f"{parent} ({type(mlp).__name__}) computes something else than down(activation(gate(x)) * up(x))"
        )
    return found


def attention(modules: Mapping[str, nn.Module], roles: Mapping[str, list[str]], head_dim: int) -> Attention | Unknown:
    """The block's attention; arguments as in `gated_mlp`."""
    names = _one_each(modules, roles, ("q", "k", "v", "o"))
    if isinstance(names, Unknown):
        return names
    parent = names["q"].rpartition(".")[0]
    module = modules[parent]
    norms = [_norm_of(module, parent, role) for role in ("query", "key")]
    seen = _recorded(module, modules, names, norms, getattr(module, "head_dim", head_dim))
    for by_head in (True, False):
        if seen is not None and (found := seen.as_parts(parent, names, norms, by_head)) is not None:
            return found
    return Unknown(
        f"{parent} ({type(module).__name__}) compares other vectors than q(x) and k(x), normed and turned by positions"
    )


def _one_each(
    modules: Mapping[str, nn.Module], roles: Mapping[str, list[str]], wanted: tuple[str, ...]
) -> dict[str, str] | Unknown:
    """The one layer in each role, all of them children of one module."""
    found = {role: roles.get(role, []) for role in wanted}
    several = [role for role, names in found.items() if len(names) > 1]
    missing = [role for role, names in found.items() if not names]
    if missing:
        return Unknown(f"it has no separate {', '.join(missing)}")
    if several:
        return Unknown(f"it has more than one {several[0]}: {', '.join(found[several[0]][:2])}")
    names = {role: of[0] for role, of in found.items()}
    if len({n.rpartition(".")[0] for n in names.values()}) > 1:
        return Unknown(f"{', '.join(names.values())} stand in different modules")
    other = next((n for n in names.values() if not isinstance(modules[n], nn.Linear)), None)
    return names if other is None else Unknown(f"{other} is a {type(modules[other]).__name__}, not a linear layer")


# --- trying ---


def _computes(mlp: nn.Module, modules: Mapping[str, nn.Module], parts: GatedMlp) -> bool:
    """True where the module's own code, over small matrices, computes what `parts` says."""
    generator = torch.Generator().manual_seed(0)
    sizes = {parts.gate: (NEURONS, WIDTH), parts.up: (NEURONS, WIDTH), parts.down: (WIDTH, NEURONS)}
    gate, up, down = (_small(modules[n], shape, generator) for n, shape in sizes.items())
    children = {n.rpartition(".")[2]: m for n, m in zip(sizes, (gate, up, down), strict=True)}
    x = torch.randn(1, TOKENS, WIDTH, generator=generator)
    with torch.no_grad():
        try:
            out = _run(_shell(mlp, children), x)
            inner = gate(x)
            alone = [parts.activation(inner[..., i : i + 1]) for i in range(NEURONS)]
        except REFUSALS:
            return False
        return isinstance(out, Tensor) and _same(out, down(torch.cat(alone, -1) * up(x)))


@dataclass(frozen=True)
class _Recorded:
    """What a trial handed to its attention function, and the small modules it was made of."""

    query: Tensor  # [1, H, T, d]
    key: Tensor
    window: int | None
    causal: bool
    small: dict[str, nn.Module]
    hidden: Tensor
    head_dim: int

    def as_parts(
        self, parent: str, names: Mapping[str, str], norms: list[str | None], by_head: bool
    ) -> Attention | None:
        """The answer with norms of this kind, where it gives the recorded queries and keys."""
        parts = Attention(
            parent, **names, q_norm=norms[0], k_norm=norms[1], norm_by_head=by_head, head_dim=self.head_dim,
            window=self.window, causal=self.causal,
        )  # fmt: skip
        with torch.no_grad():
            try:
                q, k = queries_and_keys(self.small.__getitem__, parts, self.hidden)
            except REFUSALS:
                return None
        return parts if _same(q, self.query[0]) and _same(k, self.key[0]) else None


def _recorded(
    module: nn.Module,
    modules: Mapping[str, nn.Module],
    names: Mapping[str, str],
    norms: list[str | None],
    head_dim: int,
) -> _Recorded | None:
    """Run the attention's own code over small hidden states, at positions that turn nothing; None where it refuses."""
    generator = torch.Generator().manual_seed(0)
    small: dict[str, nn.Module] = {}
    for role, name in names.items():
        out, inside = modules[name].out_features, modules[name].in_features
        shape = (WIDTH, inside) if role == "o" else (out, WIDTH)
        small[name] = _small(modules[name], shape, generator)  # type: ignore[arg-type]
    small.update({n: _drawn(modules[n], generator) for n in norms if n is not None})
    hidden = torch.randn(1, TOKENS, WIDTH, generator=generator)
    still = torch.ones(1, TOKENS, head_dim), torch.zeros(1, TOKENS, head_dim)  # cosines and sines of no turn
    seen: list[dict[str, Any]] = []
    shell = _shell(module, {n.rpartition(".")[2]: m for n, m in small.items()})
    with torch.no_grad():
        try:
            shell.config = copy.deepcopy(shell.config)
            shell.config._attn_implementation = TRIAL  # type: ignore[union-attr]
            _run(shell, hidden_states=hidden, position_embeddings=still, attention_mask=None, **{RECORD: seen})
        except REFUSALS:
            return None
    return _Recorded(**seen[0], small=small, hidden=hidden, head_dim=head_dim) if len(seen) == 1 else None


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    sliding_window: int | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention function that notes what it is given and attends to nothing."""
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    kwargs[RECORD].append({"query": query, "key": key, "window": sliding_window, "causal": causal})
    return query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[3]), None  # [1, T, H, d]


AttentionInterface.register(TRIAL, _record)


def _run(shell: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The code of its class, without hooks and without what was put on the module itself."""
    return type(shell).forward(shell, *args, **kwargs)


def _shell(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A module of the same class and settings with other children; hooks and other forwards are left behind."""
    shell = type(module).__new__(type(module))
    nn.Module.__init__(shell)
    kept = {k: v for k, v in vars(module).items() if k not in vars(shell) and k != "forward"}
    shell.__dict__.update(kept)
    shell._modules.update({**module._modules, **children})
    shell.training = False
    return shell


def _small(layer: nn.Module, shape: tuple[int, int], generator: torch.Generator) -> nn.Linear:
    """A random layer [out, in], with a bias where this one has one."""
    small: nn.Linear = nn.utils.skip_init(
        nn.Linear, shape[1], shape[0], bias=getattr(layer, "bias", None) is not None, device="cpu"
    )
    with torch.no_grad():
        for p in small.parameters():
            p.normal_(generator=generator)
    return small


def _drawn(norm: nn.Module, generator: torch.Generator) -> nn.Module:
    """The norm with weights drawn anew: all ones would hide what they do."""
    shell = _shell(norm, {})
    for name, p in norm._parameters.items():
        value = None if p is None else nn.Parameter(torch.empty(p.shape).uniform_(0.5, 1.5, generator=generator))
        shell.register_parameter(name, value)
    return shell


def _norm_of(module: nn.Module, parent: str, role: str) -> str | None:
    """The name of the attention's norm over queries or keys."""
    names = [n for n, _ in module.named_children() if _NORM[role].fullmatch(n)]
    return f"{parent}.{names[0]}" if len(names) == 1 else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-4)
