"""Where things are in a model: blocks, projections, norms, embeddings, head. Methods never search modules themselves."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.model import blocks
from luthier.model.adapters import sizes_of
from luthier.support.errors import LuthierError

# (regular expression on the name within a block, role). The first match wins.
_ROLES = (
    (r"(^|\.)(q_proj|query|q_lin|wq)$", "q"),
    (r"(^|\.)(k_proj|key|k_lin|wk)$", "k"),
    (r"(^|\.)(v_proj|value|v_lin|wv)$", "v"),
    (r"(^|\.)(c_attn|query_key_value|qkv_proj|Wqkv)$", "qkv"),
    (r"(attn|attention).*\.(o_proj|out_proj|c_proj|dense|out_lin|Wo)$", "o"),
    (r"(^|\.)(gate_proj|w1)$", "gate"),
    (r"(^|\.)(gate_up_proj|Wi)$", "gate_up"),
    (r"(^|\.)(up_proj|fc1|c_fc|dense_h_to_4h|w3)$|intermediate\.dense$|lin1$", "up"),
    (r"(^|\.)(down_proj|fc2|c_proj|dense_4h_to_h|w2)$|output\.dense$|lin2$|mlp\.Wo$", "down"),
)


@dataclass(frozen=True)
class Linear:
    """One matrix. `shape` is (out, in) even if the module stores it transposed."""

    module: str
    role: str  # q k v qkv o gate gate_up up down head other
    block: int  # -1 outside the blocks
    shape: tuple[int, int]
    transposed: bool

    @property
    def name(self) -> str:
        """The parameter's name."""
        return f"{self.module}.weight"


NEW_POOLER = "luthier_new_pooler"  # in a model's __dict__: parameters of a pooler that was drawn at random


class Anatomy:
    """The parts of one model, by module name."""

    def __init__(self, model: PreTrainedModel) -> None:
        modules = dict(model.named_modules())
        self._modules = modules
        self.reads_twice = bool(getattr(model.config, "is_encoder_decoder", False))
        self.block_list = _find_block_list(model)
        self.encoder_list = _beside_decoder(model, self.block_list) if self.reads_twice else None
        self.blocks = tuple(f"{self.block_list}.{i}" for i in range(len(modules[self.block_list])))
        self.trunk = _trunk_name(model)
        self.embedding = _name_of(model, _embedding(model))
        head = model.get_output_embeddings()
        self.head = None if head is None else _name_of(model, head)
        # Whether its task head classifies each token, not the whole text.
        self.tags_tokens = type(model).__name__.endswith("ForTokenClassification")
        self.tied = head is not None and head.weight is _embedding(model).weight
        self.final_norm = _final_norm(model, self.block_list)
        config = _text_config(model)
        if layers := getattr(config, "per_layer_config", None):  # layers of different sizes: the first one's
            config = layers[0]
        self.hidden_size: int = config.hidden_size
        self.num_heads: int = getattr(config, "num_attention_heads", None) or 1  # a state space has none
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = getattr(config, "head_dim", None) or self.hidden_size // self.num_heads
        self.linears = tuple(self._linears(modules))
        logical = {x.name: x.shape for x in self.linears if not x.transposed}  # of quantised ones too
        self.parameters = {n: logical.get(n, tuple(p.shape)) for n, p in model.named_parameters()}
        self.new_pooler: tuple[str, ...] = model.__dict__.get(NEW_POOLER, ())

    @property
    def pooler(self) -> list[str]:
        """Parameters of the trunk's pooler, if it has one."""
        return [n for n in self.parameters if n.startswith(f"{self.trunk}.pooler.")]

    def _linears(self, modules: dict[str, nn.Module]) -> Iterable[Linear]:
        found = {n: m for n, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))}
        uses = Counter(id(m.weight) for m in found.values())
        for name, module in found.items():
            # One weight of several layers cannot have the difference of one of them.
            if uses[id(module.weight)] > 1 or _other_product(name, module, modules):
                continue
            block, role = -1, "head" if name == self.head else "other"
            for stack in (self.block_list, self.encoder_list):
                if stack is not None and name.startswith(stack + "."):
                    number, _, inner = name[len(stack) + 1 :].partition(".")
                    block, role = int(number), role_of(inner)
            yield Linear(name, role, block, sizes_of(module), isinstance(module, Conv1D))

    @cached_property
    def task_head(self) -> list[str]:
        """Parameters outside the trunk of a model without a language-model head: a classifier, and a pooler drawn with it."""
        if self.head is not None:
            return []
        return [n for n in self.parameters if not n.startswith(self.trunk + ".") or n in self.new_pooler]

    @cached_property
    def block_linears(self) -> tuple[Linear, ...]:
        """Matrices inside blocks, by block then in module order."""
        return tuple(x for x in self.linears if x.block >= 0)

    @cached_property
    def stacked_experts(self) -> int:
        """Number of weights in tensors that hold one matrix for each expert; they are no linear layers."""
        return sum(math.prod(s) for n, s in self.parameters.items() if len(s) == 3 and "expert" in n)

    def attention(self, block: int) -> blocks.Attention | blocks.Unknown:
        """What the attention of this block computes, or why that is unknown."""
        return self._attentions[block]

    def gated_mlp(self, block: int) -> blocks.GatedMlp | blocks.Unknown:
        """What the MLP of this block computes, or why that is unknown."""
        return self._mlps[block]

    @cached_property
    def _attentions(self) -> tuple[blocks.Attention | blocks.Unknown, ...]:
        return tuple(blocks.attention(self._modules, roles, self.head_dim) for roles in self._roles)

    @cached_property
    def _mlps(self) -> tuple[blocks.GatedMlp | blocks.Unknown, ...]:
        return tuple(blocks.gated_mlp(b, self._modules, r) for b, r in zip(self.blocks, self._roles, strict=True))

    @cached_property
    def _roles(self) -> list[dict[str, list[str]]]:
        """By block: role -> modules."""
        out: list[dict[str, list[str]]] = [{} for _ in self.blocks]
        for x in self.block_linears:
            out[x.block].setdefault(x.role, []).append(x.module)
        return out

    @property
    def num_parameters(self) -> int:
        """The number of stored values; tied weights count once."""
        return sum(map(math.prod, self.parameters.values()))

    def match(self, targets: str | Iterable[str]) -> tuple[Linear, ...]:
        """The linear layers of `targets`: "all-linear" (all in the blocks), or patterns.

        A pattern is a glob over the whole module name, or the last parts of one ("q_proj", "mlp.down_proj"). A task
        head never matches, because every tuner trains it as a whole.
        Raises LuthierError for a pattern that matches nothing, with the endings there are.
        """
        if targets == "all-linear":
            if not self.block_linears:
                raise LuthierError(
                    'targets "all-linear": the blocks of this model have no linear layers; use tuner: full'
                )
            return self.block_linears
        chosen: dict[str, Linear] = {}
        for pattern in [targets] if isinstance(targets, str) else targets:
            hits = [x for x in self.linears if fnmatch.fnmatch(x.module, pattern) or x.module.endswith("." + pattern)]
            if not hits:
                endings = sorted({x.module.rpartition(".")[2] for x in self.linears})
                raise LuthierError(
                    f"target {pattern!r} matches 0 of {len(self.linears)} linear layers; they end in {', '.join(endings)}"
                )
            hits = [x for x in hits if x.name not in self.task_head]
            if not hits:
                raise LuthierError(f"target {pattern!r} is the task head, which every tuner trains whole; leave it out")
            chosen.update((x.module, x) for x in hits)
        return tuple(x for x in self.linears if x.module in chosen)

    def depth(self, parameter: str) -> int:
        """0 embeddings, i + 1 block i, n + 1 final norm and pooler, n + 2 task head; a tied head is an embedding."""
        n = len(self.blocks)
        if parameter.startswith(self.block_list + "."):
            return int(parameter[len(self.block_list) + 1 :].partition(".")[0]) + 1
        inside = not self.trunk or parameter.startswith(self.trunk + ".")
        if not inside or (self.head is not None and parameter.startswith(self.head + ".")):
            return n + 2
        after = self.final_norm is not None and parameter.startswith(self.final_norm + ".")
        return n + 1 if after or ".pooler." in f".{parameter}" else 0


# RoBERTa's kind: the table of positions begins with rows for padding, which no token uses.
PADDED_POSITIONS = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip


def max_positions(config: PreTrainedConfig) -> int:
    """The largest number of tokens that a model with this configuration reads; 2^30 if it sets no limit."""
    text = config.get_text_config()
    rows = getattr(text, "max_position_embeddings", None)
    if rows is None or rows < 1:  # XLNet writes -1
        return 1 << 30
    count: int = rows - (text.pad_token_id or 0) - 1 if text.model_type in PADDED_POSITIONS else rows
    return count


def role_of(inner: str) -> str:
    """What a matrix does, by its name within a block: q k v qkv o gate gate_up up down, or other."""
    return next((role for pattern, role in _ROLES if re.search(pattern, inner)), "other")


_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|qformer|perceiver|patch")
# A state space's own kernels read these weights without calling the layers.
_READ_BY_KERNELS = ("x_proj", "dt_proj", "out_proj")


def _other_product(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """True for a linear layer that computes something else than x W^T, or whose weight is used without calling it."""
    cls = type(module)
    if cls.forward not in (nn.Linear.forward, Conv1D.forward) and cls.__module__.startswith("transformers.models."):
        return not cls.__name__.startswith("Falcon")  # its layer adds the bias in another place
    parent, _, last = name.rpartition(".")
    return last in _READ_BY_KERNELS and "conv1d" in modules[parent]._modules


def _find_block_list(model: PreTrainedModel) -> str:
    """The list of the text's blocks: as long as the configuration says, or the largest that there is."""
    lists: dict[str, nn.ModuleList] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    text: dict[str, nn.ModuleList] = {n: m for n, m in lists.items() if not _OTHER_SENSES.search(n)}
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    fitting = [n for n, m in text.items() if len(m) == depth and not any(n.startswith(o + ".") for o in text)]
    if fitting:  # of an encoder-decoder: the decoder, whose states its head reads
        return min(fitting, key=lambda n: ("decoder" not in n.split("."), n.count(".")))
    if not text:
        raise LuthierError(f"{type(model).__name__}: it has no list of blocks; this architecture is not supported")
    return max(text, key=lambda n: sum(p.numel() for p in text[n].parameters()))


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The part of the configuration that describes the blocks."""
    twice = getattr(model.config, "is_encoder_decoder", False)
    return model.config.get_text_config(decoder=True) if twice else model.config.get_text_config()


def _beside_decoder(model: PreTrainedModel, block_list: str) -> str | None:
    """The encoder's list of blocks, as long as the decoder's."""
    names = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    other = ".".join("encoder" if part == "decoder" else part for part in block_list.split("."))
    return other if other in names and other != block_list else None


def _trunk_name(model: PreTrainedModel) -> str:
    """What the head stands on: what transformers says, or the one model inside that is no head."""
    if model.base_model is not model:
        return _name_of(model, model.base_model)
    inner = [n for n, m in model.named_children() if isinstance(m, PreTrainedModel)]
    return inner[0] if len(inner) == 1 else ""


def _embedding(model: PreTrainedModel) -> nn.Module:
    """The table of token embeddings."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for a model whose table it does not know; refused below
        table = None
    if not isinstance(getattr(table, "weight", None), Tensor):
        raise LuthierError(
            f"{type(model).__name__}: it has no table of token embeddings; this architecture is not supported"
        )
    assert isinstance(table, nn.Module)
    return table


def _name_of(model: nn.Module, part: nn.Module) -> str:
    name: str = next(n for n, m in model.named_modules() if m is part)
    return name


def _final_norm(model: nn.Module, block_list: str) -> str | None:
    """The norm beside the blocks, by its usual names; None if there is none."""
    prefix = block_list.rpartition(".")[0]
    for name, _ in model.get_submodule(prefix).named_children():
        if re.fullmatch(r"norm|ln_f|final_layer_norm|final_layernorm|final_norm|embedding_norm", name):
            return f"{prefix}.{name}" if prefix else name
    return None
