"""How all methods use a model: one trunk call over a `Batch`, the head on chosen rows, and hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.data.batch import Batch, pad, unpad
from luthier.kernels.plain import is_plain
from luthier.model import attention as _registered  # noqa: F401 - registers the flat attention function
from luthier.model.anatomy import Anatomy
from luthier.model.fingerprint import Fingerprint, fingerprint
from luthier.model.meter import Meter
from luthier.model.peft_modules import listening_layer, parameter_of
from luthier.model.undo import Change, Without, leaving_out
from luthier.support.errors import LuthierError

ATTACHED = "luthier_attached"


class Attached(list[Any]):
    """What is on a model now. A copied model has its weights and nothing of this.

    left_out  the part of these that the model currently computes without
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[Any] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return Attached()

    def __reduce__(self) -> tuple[Any, ...]:
        return Attached, ()


class Inputs(NamedTuple):
    """What enters the trunk: a batch, its embeddings [T', D] (None: the ids'), and where the original tokens went."""

    batch: Batch
    embeds: Tensor | None
    source: Tensor | None  # [T] index in T' of every original token; None where nothing was inserted


# What stands between trunk and vocabulary in masked-LM heads: one module (BERT, ELECTRA, ModernBERT), or a matrix, an
# activation and a norm (RoBERTa, DistilBERT).
TRANSFORMS = ("cls.predictions.transform", "generator_predictions", "head")
DENSE_AND_NORM = (("lm_head.dense", "lm_head.layer_norm"), ("vocab_transform", "vocab_layer_norm"))
InputHook = Callable[[Inputs, "ModelView"], Inputs]
Phase = Callable[[str], AbstractContextManager[Any]]  # entered around forwards of this phase


@dataclass
class Trace:
    """What one trunk call left behind for an objective that needs more than the last state."""

    hidden: dict[int, Tensor] = field(default_factory=dict)  # layer -> [T, D]
    block_kwargs: dict[str, Any] = field(default_factory=dict)  # keyword arguments the last block was called with
    inputs: Inputs | None = None


class ModelView:
    """A model with its tokenizer, anatomy and layout.

    layout        "flat": one row of T tokens, attention inside each sequence only; "padded": a rectangle
    phases        entered around forwards, with their purpose: "train", "score" or "generate"
    input_hooks   applied in order to the inputs of every trunk call (soft prompts, offsets)
    base          the fingerprint, where these are not the base's own weights: a quantised copy
    """

    def __init__(
        self, module: PreTrainedModel, tokenizer: Any = None, layout: str = "flat", name: str = "",
        base: Fingerprint | None = None,
    ) -> None:  # fmt: skip
        self.module, self.tokenizer, self.layout = module, tokenizer, layout
        self.name = name or str(getattr(module.config, "_name_or_path", "") or type(module).__name__)
        self.anatomy = Anatomy(module)
        self.input_hooks: list[InputHook] = []
        self.phases: list[Phase] = []
        self.meter = Meter()
        self._base = base
        self._native_attention: str = module.config._attn_implementation

    @classmethod
    def probed(cls, module: PreTrainedModel, tokenizer: Any = None, **more: Any) -> ModelView:
        """A view in the layout that suits the model, which a trial finds; arguments as for the class."""
        view = cls(module, tokenizer, **more)
        view.layout, _ = probe_layout(view)
        return view

    @property
    def base(self) -> Fingerprint:
        """Fingerprint of the base weights. It is computed once, so ask for it before weights are trained."""
        if self._base is None:
            self._base = fingerprint(self.module, self.tokenizer, self.name, self.anatomy.task_head)
        return self._base

    def widen(self) -> None:
        """Turn weights into float32. The fingerprint stays that of the stored weights."""
        self._base = self.base
        self.module.float()

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> nn.Embedding:
        return self.module.get_submodule(self.anatomy.embedding)  # type: ignore[return-value]

    @property
    def trunk(self) -> nn.Module:
        return self.module.base_model

    def weight(self, name: str) -> nn.Parameter:
        """A base parameter by its canonical name, whatever peft put around its layer."""
        return parameter_of(self.module, name)

    def layer(self, name: str, beside: bool = False) -> nn.Module:
        """The base's own module of this name, for adapters or training.

        beside  to put a low-rank term beside its weight
        Raises LuthierError if peft put something around it that would ignore the change.
        """
        return listening_layer(self.module, name, beside)

    @property
    def attached(self) -> Attached:
        """What is on the model now, in order: trainables, bound updates. All views of a model share it."""
        found: Attached = self.module.__dict__.setdefault(ATTACHED, Attached())
        return found

    @property
    def standing(self) -> tuple[tuple[int, ...], ...]:
        """Equal as long as the model computes with the same things: what is attached, without what is left out."""
        return tuple(id(x) for x in self.attached), tuple(id(x) for x in self.attached.left_out)

    def refuse_out_of_turn(self, leaving: Any) -> None:
        """Raises LuthierError if a later change wrote over the same weights, because it would restore what it found."""
        if leaving not in self.attached:
            return
        for later in self.attached[self.attached.index(leaving) + 1 :]:
            if later not in self.attached.left_out and (both := sorted(leaving.writes & later.writes)):
                raise LuthierError(
                    f"{type(later).__name__} came later and changed {both[0]} too; take it off before {type(leaving).__name__}"
                )

    @contextmanager
    def leaving_out(self, who: Any, withouts: Sequence[Without]) -> Iterator[None]:
        """Leave out these changes, which are the work of `who`. A nested call does nothing more.

        Raises LuthierError if something that is still on the model wrote over the same weights later.
        """
        left_out = self.attached.left_out
        if who in left_out:
            yield
            return
        self.refuse_out_of_turn(who)
        with leaving_out(withouts):
            left_out.append(who)
            try:
                yield
            finally:
                left_out.remove(who)

    def block(self, index: int) -> nn.Module:
        """The transformer block with this number."""
        return self.module.get_submodule(self.anatomy.blocks[index])

    @contextmanager
    def without_update(self) -> Iterator[ModelView]:
        """The base model for the calls inside, to the bit, whatever trains on the model or is bound to it.

        Dropout is off and there is no gradient, because a later backward pass would use the tuned weights. For a gradient
        of the base enable it inside, and take it inside. Optimisers and backward passes of the tuned model stay outside.
        Raises LuthierError where a trainable does not say how the model computes without it.
        """
        with torch.no_grad(), _modes_kept(self.module), ExitStack() as stack:
            for x in reversed(self.attached):
                if x not in self.attached.left_out:
                    stack.enter_context(self.leaving_out(x, [x.base_view]))
            self.module.eval()
            yield self

    # --- the trunk ---

    def hook_inputs(self, hook: InputHook) -> Change:
        """Apply this hook to the inputs of every trunk call, after the existing hooks."""
        self.input_hooks.append(hook)

        @contextmanager
        def without() -> Iterator[None]:
            if hook not in self.input_hooks:  # left out already
                yield
                return
            at = self.input_hooks.index(hook)
            self.input_hooks.pop(at)
            try:
                yield
            finally:
                self.input_hooks.insert(at, hook)

        return Change(lambda: self.input_hooks.remove(hook), without)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A scope for forward passes of phase "train", "score" or "generate": tuners and compute methods prepare the model."""
        with ExitStack() as stack:
            for enter in self.phases:
                stack.enter_context(enter(name))
            yield

    @property
    def padded_attention(self) -> str:
        """The attention function of padded batches."""
        return "eager" if is_plain() else self._native_attention

    def trace(self, batch: Batch, layers: tuple[int, ...] = (-1,), embeds: Tensor | None = None) -> Trace:
        """Run the trunk once over the batch and keep the hidden states asked for, each [T, D].

        layers  -1 is the final state, after the last norm; 0..L-1 is the input of that block
        embeds  [T, D] in place of the ids' embeddings
        """
        inputs = Inputs(batch, embeds, None)
        for hook in self.input_hooks:
            inputs = hook(inputs, self)
        trace, handles = Trace(inputs=inputs), []
        last = len(self.anatomy.blocks) - 1
        for layer in {
            *(x % (last + 2) for x in layers if x not in (-1, last + 1)),
            *([last] if len(layers) > 1 else []),
        }:
            keep = partial(self._keep, trace, layer, layer == last)
            handles.append(self.block(layer).register_forward_pre_hook(keep, with_kwargs=True))
        try:
            final = self._call_trunk(inputs)
        finally:
            for handle in handles:
                handle.remove()
        trace.hidden = {k: self._to_original(self._flatten(v, inputs.batch), inputs) for k, v in trace.hidden.items()}
        trace.hidden[-1] = self._to_original(self._flatten(final, inputs.batch), inputs)
        return trace

    def _keep(
        self, trace: Trace, layer: int, is_last: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        trace.hidden[layer] = args[0] if args else kwargs["hidden_states"]
        if is_last:
            trace.block_kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def _call_trunk(self, inputs: Inputs) -> Tensor:
        batch = inputs.batch
        if inputs.embeds is None:
            tokens = {"input_ids": self._shape(batch.ids, batch)}
        else:
            tokens = {"inputs_embeds": self._shape(inputs.embeds, batch)}
        kwargs: dict[str, Any] = {"use_cache": False}
        if self.layout == "flat":
            kwargs |= {"sequence_lengths": batch.lengths, "position_ids": batch.pos.unsqueeze(0)}
        else:
            kwargs["attention_mask"] = pad(torch.ones_like(batch.ids), batch)
            if not batch.contiguous:  # else the model's own positions are right, whatever they start from
                kwargs["position_ids"] = pad(batch.pos, batch)
        with attention_implementation(self.module, self._attention_name()):
            final: Tensor = self.trunk(**tokens, **accepted(self.trunk, kwargs, {"use_cache"})).last_hidden_state
        return final

    def _attention_name(self) -> str:
        if self.layout == "flat":
            return "luthier"
        return self.padded_attention

    def checkpoint_blocks(self) -> None:
        """Keep only each block's input for the backward pass, and compute the rest again then."""

        def contexts() -> tuple[Any, Any]:  # of the forward, which is inside one already, and of the recomputation
            return nullcontext(), attention_implementation(self.module, self._attention_name())

        self.module.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})

    def _shape(self, values: Tensor, batch: Batch) -> Tensor:
        """[T, ...] -> [1, T, ...] or [S, L, ...]."""
        return values.unsqueeze(0) if self.layout == "flat" else pad(values, batch)

    def _flatten(self, values: Tensor, batch: Batch) -> Tensor:
        """[1, T, D] or [S, L, D] -> [T, D]."""
        return values.squeeze(0) if self.layout == "flat" else unpad(values, batch)

    def _to_original(self, values: Tensor, inputs: Inputs) -> Tensor:
        return values if inputs.source is None else values[inputs.source]

    def run_block(self, block: nn.Module, hidden: Tensor, trace: Trace) -> Tensor:
        """Call a block-like module on [T, D] with the masks and positions the last block of `trace` had."""
        assert trace.inputs is not None
        if trace.inputs.source is not None:
            raise ValueError("an extra block cannot follow inserted soft-prompt tokens")
        with attention_implementation(self.module, self._attention_name()):
            out = block(self._shape(hidden, trace.inputs.batch), **trace.block_kwargs)
        return self._flatten(out[0] if isinstance(out, tuple) else out, trace.inputs.batch)

    # --- the head ---

    @property
    def head_weight(self) -> Tensor:
        """[V, D] weight of the language-model head."""
        assert self.anatomy.head is not None, "this model has no language-model head"
        weight: Tensor = self.module.get_submodule(self.anatomy.head).weight  # type: ignore[assignment]
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        """[V] bias of the language-model head, if it has one."""
        assert self.anatomy.head is not None
        return getattr(self.module.get_submodule(self.anatomy.head), "bias", None)

    def head_transform(self) -> Callable[[Tensor], Tensor] | None:
        """What the model does to its logits outside the head matrix: a scale, a soft cap."""
        config = self.module.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
        if cap is None and scale == 1.0:
            return None
        return lambda z: z * scale if cap is None else torch.tanh(z * scale / cap) * cap

    def head_input(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, D]: the modules between the trunk and the vocabulary matrix (a masked-LM transform)."""
        transformed: Tensor
        for name in TRANSFORMS:
            part = self._part(name)
            if part is not None and name != self.anatomy.head:
                transformed = part(hidden)
                return transformed
        for name, norm in DENSE_AND_NORM:
            dense, after = self._part(name), self._part(norm)
            if dense is not None and after is not None:
                transformed = after(getattr(self.module, "activation", nn.functional.gelu)(dense(hidden)))
                return transformed
        return hidden

    def _part(self, name: str) -> nn.Module | None:
        try:
            return self.module.get_submodule(name)
        except AttributeError:
            return None

    @property
    def classes(self) -> list[str]:
        """Names of a classification head's outputs, in their order."""
        names: dict[Any, str] = self.module.config.id2label or {}
        return [names[i] for i in range(len(names))]

    def class_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [S, C] through the model's own classification head."""
        parts = dict(self.module.named_children())
        logits: Tensor
        if "score" in parts:  # decoders: a matrix over the last token
            logits = parts["score"](hidden[batch.ends])
        else:
            first = hidden[batch.starts].unsqueeze(1)  # encoders read their first token
            pooler = getattr(self.trunk, "pooler", None)
            logits = parts["classifier"](first if pooler is None else self._dropout(pooler(first)))
        return logits.float()

    def _dropout(self, pooled: Tensor) -> Tensor:
        drop = getattr(self.module, "dropout", None)
        return pooled if drop is None else drop(pooled)


def accepted(trunk: nn.Module, given: Mapping[str, Any], optional: Collection[str]) -> dict[str, Any]:
    """The arguments of a call, without those of `optional` that this trunk does not take."""
    names = inspect.signature(trunk.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in names.values())
    return {k: v for k, v in given.items() if takes_all or k in names or k not in optional}


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention function for the calls inside."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config())}
    before = {key: c._attn_implementation for key, c in configs.items()}
    for c in configs.values():
        c._attn_implementation = name
    try:
        yield
    finally:
        for key, c in configs.items():
            c._attn_implementation = before[key]


@contextmanager
def as_found(view: ModelView) -> Iterator[None]:
    """A scope for a loop that trains. Afterwards every part has its old mode, and what the loop added to the model, to count
    and to shorten its work, is removed.
    """
    phases = list(view.phases)
    try:
        with _modes_kept(view.module):
            yield
    finally:
        view.meter.unwatch()
        view.phases[:] = phases


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A scope in eval mode, without dropout. Afterwards every part has its old mode, because a part may have another mode than
    the whole model.
    """
    with _modes_kept(module):
        module.eval()
        yield


@contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def probe_layout(view: ModelView, tolerance: float = 2e-5) -> tuple[str, float]:
    """("flat" or "padded", largest relative difference): run two short sequences together and alone.

    The tolerance is for float32 and grows with the rounding of lower precisions. A model whose sequences see each
    other when laid end to end (convolutions, state spaces, own positions) gets the padded layout.
    """
    device, vocabulary = view.device, view.embedding.num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (13,), generator=generator).to(device)
    lengths = (6, 7)
    seq = torch.tensor([0] * 6 + [1] * 7, device=device)
    pos = torch.tensor([*range(6), *range(7)], device=device)
    both = Batch(ids=ids, labels=torch.full_like(ids, -100), seq=seq, pos=pos, lengths=lengths)
    before = view.layout
    try:
        with evaluating(view.module):  # the model as any caller would run it is the reference
            view.layout = "flat"
            flat = view.trace(both).hidden[-1].float()
            alone = [view.trunk(input_ids=part.unsqueeze(0)).last_hidden_state[0] for part in ids.split(lengths)]
            single = torch.cat(alone).float()
    except (ValueError, TypeError, RuntimeError):  # the model does not pass our arguments on: it must pad
        return "padded", float("inf")
    finally:
        view.layout = before
    difference = float((flat - single).abs().max() / single.abs().max().clamp_min(1e-9))
    limit = tolerance * max(1.0, torch.finfo(view.dtype).eps / torch.finfo(torch.float32).eps / 4)
    return ("flat" if difference <= limit else "padded"), difference
