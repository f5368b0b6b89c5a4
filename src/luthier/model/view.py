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
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from luthier.data.batch import IGNORE, TYPE_IDS, Batch, collate, pad, unpad
from luthier.kernels.plain import is_plain
from luthier.model import attention as _registered  # noqa: F401 - registers the flat attention function
from luthier.model.adapters import Forward, around
from luthier.model.anatomy import Anatomy
from luthier.model.fingerprint import Fingerprint, fingerprint
from luthier.model.meter import Meter
from luthier.model.peft_modules import listening_layer, parameter_of
from luthier.model.refusals import NOT_AGAIN
from luthier.model.tail import FAILURES, Result, Tail, brief, class_logits, doors, own_logits
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
    singly        run the sequences of a padded batch one after another, because this model lets them see their padding
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
        self.singly = False
        self.ways: Any = None  # how it writes, once luthier.inference has tried
        self.first_position = first_position(module)
        self._tail: Tail | None = None
        self.width: int | None = None  # of the trunk's result, once that is known
        self._native_attention: str = module.config._attn_implementation

    @classmethod
    def probed(cls, module: PreTrainedModel, tokenizer: Any = None, **more: Any) -> ModelView:
        """A view in the layout that suits the model, which a trial finds; arguments as for the class."""
        view = cls(module, tokenizer, **more)
        probe(view)
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
        return self.module.get_submodule(self.anatomy.trunk)

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
        flat = (lambda v: v) if self.singly else partial(self._flatten, batch=inputs.batch)
        trace.hidden = {k: self._to_original(flat(v), inputs) for k, v in trace.hidden.items()}
        trace.hidden[-1] = self._to_original(self._flatten(final, inputs.batch), inputs)
        return trace

    def _keep(
        self, trace: Trace, layer: int, is_last: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        if not self.singly and layer in trace.hidden:
            raise LuthierError(
                f"{type(self.module).__name__}: it runs block {layer} several times, so states between blocks have no number"
            )
        assert trace.inputs is not None
        if self.singly:  # sequences come one after another
            earlier = trace.hidden.get(layer)
            state = state[0] if earlier is None else torch.cat([earlier, state[0]])
        trace.hidden[layer] = state
        if is_last:
            trace.block_kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}

    def _call_trunk(self, inputs: Inputs) -> Tensor:
        """[1, T, D] or [S, L, D]."""
        batch = inputs.batch
        with attention_implementation(self.module, self._attention_name()):
            if self.layout == "flat":
                places = (batch.pos + self.first_position).unsqueeze(0)
                return self._run(inputs, {"sequence_lengths": batch.lengths, "position_ids": places})
            if not self.singly:
                mask: dict[str, Any] = {"attention_mask": pad(torch.ones_like(batch.ids), batch)}
                if not batch.contiguous:  # else the model's own positions are right, whatever they start from
                    mask["position_ids"] = pad(batch.pos + self.first_position, batch)
                return self._run(inputs, mask)
            parts = zip(batch.lengths, *(x.split(list(batch.lengths)) for x in (batch.ids, batch.pos)), strict=True)
            embeds = [None] * batch.num_sequences if inputs.embeds is None else inputs.embeds.split(list(batch.lengths))
            found = []
            types: list[dict[str, Tensor]] = [{} for _ in batch.lengths]
            if TYPE_IDS in batch.token:
                types = [{TYPE_IDS: x} for x in batch.token[TYPE_IDS].split(list(batch.lengths))]
            for (n, ids, pos), part, token in zip(parts, embeds, types, strict=True):
                given: dict[str, Any] = {} if batch.contiguous else {"position_ids": (pos + self.first_position)[None]}
                one = Batch(ids, torch.full_like(ids, IGNORE), torch.zeros_like(ids), pos, (n,), token)
                found.append(self._run(Inputs(one, part, None), given)[0])
            return pad(torch.cat(found), batch)

    def _run(self, inputs: Inputs, kwargs: dict[str, Any]) -> Tensor:
        """The trunk's result for inputs in the layout's shape."""
        batch = inputs.batch
        if inputs.embeds is None:
            tokens = {"input_ids": self._shape(batch.ids, batch)}
        else:
            tokens = {"inputs_embeds": self._shape(inputs.embeds, batch)}
        if inputs.embeds is None:
            kwargs |= more_inputs(self.module, self.trunk, tokens["input_ids"])
        elif self.anatomy.reads_twice:
            raise LuthierError(f"{type(self.module).__name__}: an encoder-decoder takes no vectors in place of tokens")
        if TYPE_IDS in batch.token and takes(self.trunk, TYPE_IDS):
            kwargs[TYPE_IDS] = self._shape(batch.token[TYPE_IDS], batch)
        kwargs["use_cache"] = False
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

        if (name := type(self.module).__name__) in NOT_AGAIN:
            raise LuthierError(f"gradient_checkpointing: {name} cannot compute a block twice; remove it")
        if self.module.supports_gradient_checkpointing:
            self.module.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
            return
        for index in range(len(self.anatomy.blocks)):
            around(self.block(index), partial(_checkpointed, self.block(index), contexts))

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
        if self.singly:
            raise LuthierError(f"{type(self.module).__name__}: an extra block cannot follow sequences that run singly")
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

    def tail(self) -> Tail:
        """What the model's own code does around its vocabulary matrix. It is found out at the first call."""
        if self._tail is None:
            assert self.anatomy.head is not None, "this model has no language-model head"
            with evaluating(self.module):
                self._tail = Tail(
                    self.module, self.anatomy.trunk, self.anatomy.head, self.width or self.anatomy.hidden_size
                )
        return self._tail

    def head_transform(self) -> Callable[[Tensor], Tensor] | None:
        """What the model does to its logits outside the head matrix: a scale, a soft cap."""
        return self.tail().after

    def head_logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V] float32."""
        z = nn.functional.linear(self.head_input(hidden), self.head_weight, self.head_bias).float()
        transform = self.head_transform()
        return z if transform is None else transform(z)

    def head_input(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, D]: the modules between the trunk and the vocabulary matrix (a masked-LM transform)."""
        return self.tail().before(hidden)

    @property
    def classes(self) -> list[str]:
        """Names of a classification head's outputs, in their order."""
        names: dict[Any, str] = self.module.config.id2label or {}
        return [names[i] for i in range(len(names))]

    def token_logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, C] float32 through the model's own head, which classifies each token by its own state."""
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return own_logits(self.module, self.trunk, Result((hidden.unsqueeze(0),)), ids)[0].float()

    def class_logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [S, C] through the model's own classification head, one sequence at a time."""
        lengths, ids = list(batch.lengths), batch.ids
        if "score" in self.module._modules and not hasattr(self.trunk, "pooler"):  # a decoder's reads one token
            at = _last_words(batch, self.module.config.get_text_config().pad_token_id)
            lengths, ids, hidden = [1] * len(at), ids[at], hidden[at]
        pairs = zip(hidden.split(lengths), ids.split(lengths), strict=True)
        return torch.stack([class_logits(self.module, self.trunk, h, ids) for h, ids in pairs]).float()


def _last_words(batch: Batch, fill: int | None) -> Tensor:
    """[S] places of the tokens that transformers' decoders classify by: the last that is not the padding token, or the first."""
    if fill is None:
        return batch.ends
    places = torch.arange(batch.num_tokens, device=batch.ids.device)
    words = places.where(batch.ids != fill, -1)
    last = words.new_full((batch.num_sequences,), -1).scatter_reduce(0, batch.seq, words, "amax")
    return torch.where(last < 0, batch.starts, last)


def _checkpointed(block: nn.Module, contexts: Callable[[], tuple[Any, Any]], plain: Forward) -> Forward:
    """The block's forward, computed again in the backward pass, for models whose own code cannot do that."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward


def more_inputs(module: nn.Module, trunk: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """What a model's own call gives to its trunk beside the text.

    The decoder of an encoder-decoder reads the same text, one place later (BART's trunk makes that itself). Longformer's
    classification head looks everywhere from the first token.
    """
    if type(module).__name__ == "LongformerForSequenceClassification":
        first = torch.zeros_like(ids)
        first[:, 0] = 1
        return {"global_attention_mask": first}
    if getattr(module.config, "is_encoder_decoder", False):
        for name in ("_shift_right", "prepare_decoder_input_ids_from_labels"):
            if (shift := getattr(module, name, None) or getattr(trunk, name, None)) is not None:
                return {"decoder_input_ids": shift(ids)}
    return {}


def first_position(module: nn.Module) -> int:
    """The number of the first token's position: RoBERTa's table of positions has a row for padding, and begins after it."""
    for name, table in module.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "embed_positions") and isinstance(table, nn.Embedding):
            return 0 if table.padding_idx is None or type(table) is not nn.Embedding else table.padding_idx + 1
    return 0


def takes(trunk: nn.Module, name: str) -> bool:
    """Whether the trunk's own code names this argument; one that swallows all arguments does not."""
    return name in inspect.signature(trunk.forward).parameters


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


class Own(NamedTuple):
    """What a model's own call gives for one sequence alone."""

    hidden: Tensor  # [L, D], from the trunk
    logits: Tensor | None  # [L, V], [L, C] or [C]


def probe_layout(view: ModelView, tolerance: float = 2e-5) -> tuple[str, float]:
    """("flat" or "padded", largest relative difference of flat); see `probe`."""
    return probe(view, tolerance)


@torch.no_grad()
def probe(view: ModelView, tolerance: float = 2e-5) -> tuple[str, float]:
    """Find the view's layout: run two short sequences together and alone. Returns it, and the difference of "flat".

    The tolerance is for float32 and grows with the rounding of lower precisions. A model whose sequences see each
    other when laid end to end (convolutions, state spaces, own positions) gets the padded layout. One that lets a sequence see
    its padding runs them singly.
    Raises LuthierError where luthier's hidden states or logits are not those of the model's own call.
    """
    generator, lengths = torch.Generator().manual_seed(0), (6, 7)
    ids = torch.randint(5, view.embedding.weight.shape[0], (13,), generator=generator).to(view.device)
    ends = getattr(view.module.config, "eos_token_id", None)
    if view.anatomy.reads_twice and isinstance(ends, int):  # its classification head looks for the end token
        ids[5], ids[12] = ends, ends
    both = collate([{"ids": part.tolist(), "labels": [IGNORE] * len(part)} for part in ids.split(lengths)])
    both = both.to(view.device)
    limit = tolerance * max(1.0, torch.finfo(view.dtype).eps / torch.finfo(torch.float32).eps / 4)
    with evaluating(view.module):  # the model as any caller would run it is the reference
        alone = [own_run(view, part) for part in ids.split(lengths)]
        _check_tail(view, alone, both)
        single = torch.cat([own.hidden for own in alone]).float()
        flat, _ = _off(view, "flat", both, single)
        why, off = "", flat
        for layout, singly in () if flat <= limit else (("padded", False), ("padded", True)):
            view.layout, view.singly = layout, singly
            off, why = _off(view, layout, both, single)
            if off <= limit:
                break
    if not off <= limit:  # also if it is NaN
        raise LuthierError(
            f"{type(view.module).__name__}: {why or f'its states differ from its own call by {off:.2g}'}"
        )
    view.layout = "flat" if flat <= limit else "padded"
    return view.layout, flat


def own_run(view: ModelView, ids: Tensor) -> Own:
    """The model's own call on one sequence [L]. Raises LuthierError where it cannot be run on text alone."""
    seen: list[Any] = []
    handles = [d.register_forward_hook(lambda module, args, out: seen.append(out)) for d in doors(view.trunk)]
    name = type(view.module).__name__
    try:
        out = view.module(input_ids=ids.unsqueeze(0))
    except FAILURES as error:
        raise LuthierError(f"{name}: its own code does not run on a short text ({brief(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise LuthierError(f"{name}: its own code does not call {type(view.trunk).__name__} as its trunk")
    hidden = seen[-1].last_hidden_state if hasattr(seen[-1], "last_hidden_state") else seen[-1][0]
    logits = getattr(out, "logits", None)
    return Own(hidden[0], None if logits is None else logits[0].float())


def _off(view: ModelView, layout: str, both: Batch, single: Tensor) -> tuple[float, str]:
    """(largest relative difference from the sequences alone, why the layout cannot be run)."""
    before, view.layout = view.layout, layout
    try:
        together = view.trace(both).hidden[-1].float()
    except FAILURES as error:  # the model does not pass our arguments on
        return float("inf"), f"luthier's call of its trunk fails ({brief(error)})"
    finally:
        view.layout = before
    return float((together - single).abs().max() / single.abs().max().clamp_min(1e-9)), ""


# Largest accepted difference between luthier's logits and the model's own, relative to the largest of these.
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


def _check_tail(view: ModelView, alone: Sequence[Own], both: Batch) -> None:
    """Raises LuthierError where luthier's logits are not the model's own."""
    view.width = alone[0].hidden.shape[-1]
    if alone[0].hidden.shape[0] != both.lengths[0]:
        raise LuthierError(f"{type(view.module).__name__}: its trunk gives fewer states than there are tokens")
    if view.anatomy.head is None and not view.anatomy.task_head:
        return
    # Together, so that a head which looks at other tokens too is found out.
    tagged = view.token_logits(torch.cat([own.hidden for own in alone])) if view.anatomy.tags_tokens else None
    for i, own in enumerate(alone):
        if tagged is not None:
            ours = tagged.split(list(both.lengths))[i]
        elif view.anatomy.head is None:
            ours = view.class_logits(own.hidden, both.select(torch.tensor([i])))[0]
        else:
            ours = view.head_logits(own.hidden)
        assert own.logits is not None
        known = ours.shape == own.logits.shape
        off = float((ours - own.logits).abs().max() / own.logits.abs().max().clamp_min(1e-9)) if known else float("inf")
        if not off <= HEAD_TOLERANCE[view.dtype]:  # also if it is NaN
            name = type(view.module).__name__
            raise LuthierError(f"{name}: it has a head that luthier does not know (logits differ by {off:.2g})")
