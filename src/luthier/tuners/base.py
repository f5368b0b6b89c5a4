"""The base classes of tuners: which weights are trained, and in which form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from luthier.kernels.linear import stochastic_round
from luthier.method import Facts, Method, Problem
from luthier.method.base import Need
from luthier.model.adapters import Own
from luthier.model.additions import refuse_packed, register
from luthier.model.anatomy import Anatomy
from luthier.model.undo import Change, Undo, Without, swapped
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.step.window import Clock, Window
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.update import Dense, Part, Replace, Update
from luthier.update.binding import below

if TYPE_CHECKING:
    from luthier.step.probe import Probe


class ParamGroup(NamedTuple):
    """Tensors with a learning-rate factor; weight_decay None means the run's."""

    params: list[nn.Parameter]
    lr_factor: float = 1.0
    weight_decay: float | None = None
    learning_rate: float | None = None  # replaces the run's learning rate


class Stats(NamedTuple):
    """Numbers about the window before the optimiser step: mean loss, global gradient norm."""

    loss: float
    grad_norm: float


def default_optimizer(groups: list[ParamGroup], lr: float, **kwargs: Any) -> Optimizer:
    """AdamW over parameter groups; the fused version if torch has it."""
    return torch.optim.AdamW(as_dicts(groups, lr), lr=lr, fused=True, **kwargs)


def as_dicts(groups: list[ParamGroup], lr: float) -> list[dict[str, Any]]:
    """The groups in torch's form, with learning rates multiplied out."""
    out = []
    for g in groups:
        entry: dict[str, Any] = {"params": g.params, "lr": (g.learning_rate or lr) * g.lr_factor}
        if g.weight_decay is not None:
            entry["weight_decay"] = g.weight_decay
        out.append(entry)
    return out


def by_decay(params: Iterable[nn.Parameter]) -> list[ParamGroup]:
    """Matrices with the run's weight decay; biases and norms without."""
    params = list(params)
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    return [g for g in (ParamGroup(matrices), ParamGroup(vectors, weight_decay=0.0)) if g.params]


OF_GRADIENTS = ("max_grad_norm", "adam_betas", "adam_eps", "on_nan")  # settings that only steps with gradients read


class Tuner(Method):
    """Chooses what is trained. Your own training loop needs only `attach`."""

    @property
    def changes_model(self) -> bool:
        """Whether it changes the model. Its claims say what it changes."""
        return bool(self.traits.claims)

    def check(self, facts: Facts) -> list[Problem]:
        """Problems that can be seen without weights, from the model's layers and their shapes."""
        found, anatomy = super().check(facts), facts.anatomy
        if Need.CLOSURE in self.traits.needs and facts.settings is not None:
            found += self._unread(facts.settings)
        if anatomy is None:
            return found
        try:
            self.check_model(anatomy)
        except RecipeError as error:
            found.append(Problem(error.where.rpartition(".")[2], error.what, error.remedy))
        except LuthierError as error:
            found.append(Problem("model", str(error)))
        return found

    def _unread(self, settings: TrainSettings) -> list[Problem]:
        """Settings of gradients, which a step that only evaluates losses does not read."""
        fields = TrainSettings.model_fields
        return [
            Problem(name, f"is not read by {self.key()}, whose steps take no gradient", "remove it")
            for name in OF_GRADIENTS
            if getattr(settings, name) != fields[name].default
        ]

    def check_model(self, anatomy: Anatomy) -> None:
        """Raises LuthierError if the tuner cannot train what it should in this model."""
        targets = getattr(self, "targets", None)
        if targets is not None:
            anatomy.match(targets)

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> Trainable:
        """Prepare the model for training and return the trainable.

        total_steps  all optimiser steps of the run; methods with their own schedule refuse None
        """
        raise NotImplementedError  # the seam: every tuner has its own

    def refuse(self, facts: Facts) -> None:
        """Raises RecipeError for the first problem that `check` finds, for `attach` without a recipe."""
        for problem in self.check(facts):
            raise RecipeError(f"tuner.{self.key()}.{problem.key}".rstrip("."), problem.what, problem.remedy)

    def in_stage(self, number: int) -> Tuner:
        """The tuner for its `number`-th stage in a pipeline, from 0. Methods that draw weights anew for each stage change it."""
        return self

    def selections(self, total_steps: int) -> int:
        """How often a run of so many steps chooses the trained weights, if the ledger counts that work."""
        return 0


class Trainable:
    """The trained weights of a model, and the work around a step. Subclasses override what they need; defaults do nothing.

    In your own loop: use `optimizer(groups(), ...)` or any optimiser over `parameters()`. Call in each step
    `before_window`, backward, `after_backward`, `before_step`, the optimiser's step, `after_step`.
    """

    steps_by_closure = False  # True: the optimiser's step gets a closure that evaluates the loss without gradient
    reselects = False  # True: the tensors that need a gradient change from window to window
    reads_rows = False  # True: gradients of rows also decide which weights train; clipping them does not limit that
    attach_flops = attach_seconds = 0.0  # costs of attaching: a first choice of trained weights

    def __init__(self, view: ModelView) -> None:
        self.view = view
        self.base = view.base  # before any weight changes
        self._flags = {p: p.requires_grad for p in view.module.parameters()}
        view.phases.append(self.phase)
        self._undo: list[Undo] = []
        self._withouts: list[Without] = []  # of the changes to the model, in their order
        self.writes: set[str] = set()  # names of parameters whose values it changes
        self._owned = False
        view.attached.append(self)

    def freeze_base(self) -> None:
        """From now on, no parameter of the model needs a gradient."""
        for p in self._flags:
            p.requires_grad_(False)

    def own(self, inner: Trainable) -> None:
        """Take over another trainable as a part of this one."""
        attached = self.view.attached
        if attached.index(inner) < attached.index(self):
            self._flags |= inner._flags
        attached.remove(inner)
        inner._owned = True
        self.put(Change(inner.detach, inner.base_view), inner.writes)

    def put(self, change: Change, writes: Iterable[str] = ()) -> None:
        """Register a change to the model: `detach` undoes it, `base_view` leaves it out.

        writes  names of the parameters whose values it changes
        """
        self._undo.append(change.undo)
        self._withouts.append(change.without)
        self.writes.update(writes)

    def add_parameter(self, module: nn.Module, name: str, value: nn.Parameter) -> Own:
        """Put a trained parameter on a module of the model until `detach`; returns how to read it."""
        read, undo = register(module, name, value)
        self._undo.append(undo)
        return read

    def base_view(self) -> AbstractContextManager[None]:
        """A scope in which the model computes as it did before this was attached; see `ModelView.without_update`.

        Override it, or `put` every change. Raises LuthierError if neither was done.
        """
        if not self._withouts:
            raise LuthierError(
                f"{type(self).__name__} does not say how the model computes without it: call put() with each change to "
                "the model, or write base_view()"
            )
        return self.view.leaving_out(self, self._withouts)

    def groups(self) -> list[ParamGroup]:
        """The trained tensors, grouped by learning rate and weight decay."""
        raise NotImplementedError  # the seam: every tuner has its own

    def parameters(self) -> Iterator[nn.Parameter]:
        """All trained tensors."""
        for g in self.groups():
            yield from g.params

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        """The optimiser of these groups; `default` makes the run's."""
        return default(groups)

    def before_window(self, window: Window, probe: Probe) -> None:
        """Called before a step's first forward pass: may choose the trained weights again."""

    def after_backward(self) -> None:
        """Called after a step's last backward pass: moves gradients to where the optimiser reads them."""

    def before_step(self, stats: Stats) -> bool:
        """False skips the step."""
        return True

    def after_step(self, clock: Clock) -> None:
        """Called after the optimiser's step: writes trained values back into the model. clock.step counts this step."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Entered around every forward pass, with its purpose: "train", "score" or "generate"."""
        return nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs besides the optimiser's own state."""
        return {str(i): p.detach() for i, p in enumerate(self.parameters())}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` of the same tuner on the same base returned."""
        for i, p in enumerate(self.parameters()):
            p.copy_(state[str(i)])

    def continue_from(self, state: dict[str, Tensor]) -> None:
        """Continue from the state in which an earlier stage of the same tuner ended."""
        self.load_state_dict(state)

    def update(self) -> Update:
        """What was trained so far, as a value on the CPU. Training goes on without changing it."""
        raise NotImplementedError  # the seam: every tuner has its own

    def detach(self) -> None:
        """Remove everything from the model: the base is bit-identical to what it was.

        Raises LuthierError, before it changes anything, if a later change wrote over the same weights.
        """
        if not self._owned:
            self.view.refuse_out_of_turn(self)
        if self.phase in self.view.phases:
            self.view.phases.remove(self.phase)
        for step in reversed(self._undo):
            step()
        self._undo.clear()
        if not self._owned:
            self._give_back_flags()

    def _give_back_flags(self) -> None:
        """Restore which tensors need a gradient, except for tensors that a later change still uses."""
        attached = self.view.attached
        if self not in attached:
            return
        at = attached.index(self)
        attached.remove(self)
        later = [t for t in attached[at:] if isinstance(t, Trainable)]
        if later:
            later[0]._flags |= self._flags
            return
        for p, flag in self._flags.items():
            p.requires_grad_(flag)
            p.grad = None


class DenseTrainable(Trainable):
    """Whole tensors trained in place: float32 masters beside low-precision weights, written back with stochastic rounding
    from the seed. The overwritten values are kept, so that detaching restores them bit for bit.
    """

    def __init__(self, view: ModelView, names: list[str], seed: int = 0, freeze: bool = True) -> None:
        refuse_packed("tuner", view.module, names)
        for holder in {n.rpartition(".")[0] for n in names}:
            view.layer(holder)
        super().__init__(view)
        if freeze:
            self.freeze_base()
        self.names, self._streams, self._steps = names, Streams(seed), 0
        self._stored = {n: view.weight(n).detach().clone() for n in names}
        self._moved: set[str] = set()
        self._masters: dict[str, nn.Parameter] = {}
        self.put(writes_to(view, self._stored), names)
        for n in names:
            p = view.weight(n)
            p.requires_grad_(True)
            self._masters[n] = p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())

    def master(self, name: str) -> nn.Parameter:
        """The tensor of this parameter that the optimiser changes: float32, and the weight itself if it is float32."""
        return self._masters[name]

    def groups(self) -> list[ParamGroup]:
        return by_decay(self._masters.values())

    def after_backward(self) -> None:
        self._moved = {n for n in self._masters if self.view.weight(n).grad is not None}
        for n, master in self._masters.items():
            p = self.view.weight(n)
            if p is not master:
                master.grad = None if p.grad is None else p.grad.float()
                p.grad = None

    @torch.no_grad()
    def after_step(self, clock: Clock | None = None) -> None:
        self._steps += 1
        self._write(self._moved)

    def _write(self, names: Iterable[str]) -> None:
        """Write masters into the model, but only those that changed: a frozen tensor must not be rounded again."""
        for n in names:
            p, master = self.view.weight(n), self._masters[n]
            if p is not master:
                p.copy_(
                    stochastic_round(master, p.dtype, self._streams.torch("round", self._steps, n, device=p.device))
                )

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, and the rounded weights if these are not the masters themselves."""
        weights = {n: self.view.weight(n) for n in self._masters}
        out = {f"master.{n}": m.detach() for n, m in self._masters.items()}
        out |= {f"weight.{n}": p.detach() for n, p in weights.items() if p is not self._masters[n]}
        return out | {"steps": torch.tensor(self._steps)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps = int(state["steps"])
        for n, m in self._masters.items():
            m.copy_(state[f"master.{n}"])
            if f"weight.{n}" in state:
                self.view.weight(n).copy_(state[f"weight.{n}"])

    def update(self) -> Update:
        return Update(self.base, self.parts())

    @torch.no_grad()
    def parts(self, whole: Collection[str] = ()) -> tuple[Part, ...]:
        """Differences to the base. Parameters in `whole` did not start from the base, and a task head is random at every load, so
        these are replaced as whole tensors.
        """
        replaced = {*whole, *self.view.anatomy.task_head} & self._masters.keys()
        changes = {n: (m - self._stored[n].float()).cpu() for n, m in self._masters.items() if n not in replaced}
        values = copies({n: m for n, m in self._masters.items() if n in replaced})
        found: list[Part] = [Dense(changes)] if changes or not values else []
        return (*found, Replace(values)) if values else tuple(found)


class WithHead(Trainable):
    """A tuner's trainable together with a task head. The head has no pre-trained weights, so every tuner must train it.

    The head is part of the Update as a replaced tensor.
    """

    def __init__(self, inner: Trainable, names: list[str]) -> None:
        super().__init__(inner.view)
        self.inner = inner
        self.steps_by_closure = inner.steps_by_closure
        self.reselects, self.reads_rows = inner.reselects, inner.reads_rows
        self.attach_flops, self.attach_seconds = inner.attach_flops, inner.attach_seconds
        self.head = DenseTrainable(inner.view, names, freeze=False)
        self.own(inner)
        self.own(self.head)

    def groups(self) -> list[ParamGroup]:
        return [*self.inner.groups(), *self.head.groups()]

    def optimizer(self, groups: list[ParamGroup], default: Callable[[list[ParamGroup]], Optimizer]) -> Optimizer:
        return self.inner.optimizer(groups, default)

    def before_window(self, window: Window, probe: Probe) -> None:
        self.inner.before_window(window, probe)

    def after_backward(self) -> None:
        self.inner.after_backward()
        self.head.after_backward()

    def before_step(self, stats: Stats) -> bool:
        return self.inner.before_step(stats)

    def after_step(self, clock: Clock) -> None:
        self.inner.after_step(clock)
        self.head.after_step(clock)

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()  # the inner trainable's phase is entered separately

    def state_dict(self) -> dict[str, Tensor]:
        inner = {f"inner.{k}": t for k, t in self.inner.state_dict().items()}
        return inner | {f"head.{k}": t for k, t in self.head.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.inner.load_state_dict(below("inner.", state))
        self.head.load_state_dict(below("head.", state))

    def continue_from(self, state: dict[str, Tensor]) -> None:
        self.inner.continue_from(below("inner.", state))
        self.head.load_state_dict(below("head.", state))

    def update(self) -> Update:
        return Update(self.base, (*self.inner.update().parts, *self.head.parts()))


def writes_to(view: ModelView, stored: Mapping[str, Tensor]) -> Change:
    """The change that training makes to these parameters, given the values they had before; undone, they have these again."""

    @torch.no_grad()
    def undo() -> None:
        for name, value in stored.items():
            view.weight(name).copy_(value)

    return Change(undo, lambda: swapped([(view.weight(name), value) for name, value in stored.items()]))


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, for an update: training goes on without changing them."""
    return {n: t.detach().cpu().clone() for n, t in tensors.items()}


def with_head(trainable: Trainable, head: list[str]) -> Trainable:
    """The trainable, with the task head added if the tuner does not train it already."""
    trained = {id(p) for p in trainable.parameters()}
    view = trainable.view
    missing = [n for n in head if id(view.weight(n)) not in trained and not view.weight(n).requires_grad]
    return WithHead(trainable, missing) if missing else trainable


def as_view(model: ModelView | PreTrainedModel) -> ModelView:
    """A view of a plain transformers model, with the layout its probe finds."""
    return model if isinstance(model, ModelView) else ModelView.probed(model)
