"""Use the model during training without changing it: weights, gradients, generators and modes are restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from luthier.data.batch import Batch
from luthier.kernels.head import TokenScores
from luthier.kernels.plain import plain_operations
from luthier.model.view import ModelView
from luthier.step.forward import Forward
from luthier.step.window import Term, Window, count, mean_of
from luthier.support.rng import generator_states, set_generators


class Minimised(Protocol):
    """What a step minimises; every objective is one."""

    def plan(self, window: Window, probe: Probe) -> tuple[Window, Mapping[str, float]]: ...

    def loss(self, fwd: Forward) -> Mapping[str, Term]: ...

    def fresh(self) -> Self: ...


class Probed(NamedTuple):
    """The result of a probe: mean loss and gradients by parameter name; for a trial step also its changes, and both after it."""

    loss: float
    grads: dict[str, Tensor]
    changes: dict[str, Tensor]
    loss_after: float = float("nan")
    grads_after: Mapping[str, Tensor] = {}


class Planned(NamedTuple):
    """A window after the objective's `plan`: this rank's batches, and the denominators over all ranks."""

    objective: Minimised
    batches: Sequence[Batch]
    denominators: Mapping[str, float]


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards modes, requires_grad flags, gradients and global generators are as before."""
    modes = {n: m.training for n, m in module.named_modules()}
    saved = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    generators = generator_states()
    for p, _, _ in saved:
        p.grad = None
    module.eval()
    try:
        yield
    finally:
        set_generators(generators)
        for p, flag, grad in saved:
            p.requires_grad_(flag)
            p.grad = grad
        for n, m in module.named_modules():
            m.training = modes.get(n, m.training)


class Probe:
    """Handed to `Objective.plan` and `Trainable.before_window`.

    total  sums a tensor over ranks; batches are then this rank's, losses and gradients are those of all ranks
    """

    def __init__(
        self, view: ModelView, objective: Minimised, extra: nn.Module | None = None,
        total: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:  # fmt: skip
        self.view, self.objective, self.extra, self.total = view, objective, extra, total

    def forward(self, batch: Batch) -> Forward:
        """A forward for hidden states or logits; use it under `quiet`."""
        return Forward(batch, self.view, self.extra)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """A block in evaluation mode. Modes, flags, gradients and generators are restored after it, weights are not."""
        with _restored(self.view.module):
            yield

    @torch.no_grad()
    def scores(self, batches: Sequence[Batch]) -> list[TokenScores]:
        """Loss and entropy of every supervised token of each batch, dropout off."""
        with self.quiet():
            return [self.forward(b).scores() for b in batches]

    @torch.no_grad()
    def planned(self, asked: Window | Sequence[Batch]) -> Planned:
        """The window as the objective trains on it. A copy of the objective is used, so its state does not change.

        Batches instead of a window are used as one window.
        """
        objective = self.objective.fresh()
        if isinstance(asked, Window):
            window, local = objective.plan(asked, self)
            batches = [b for b in window.micro if b.num_tokens]
        else:
            batches, local = list(asked), count(list(asked))
        names = sorted(local)
        sums = self.total(torch.tensor([local[n] for n in names], device=self.view.device).double()).tolist()
        return Planned(objective, batches, dict(zip(names, sums, strict=True)))

    def mean_loss(self, asked: Window | Sequence[Batch]) -> Tensor:
        """This rank's share of the objective's loss over the window, differentiable."""
        return self._mean(self.planned(asked))

    def _mean(self, planned: Planned) -> Tensor:
        total = torch.zeros((), device=self.view.device)
        for b in planned.batches:
            for term in planned.objective.loss(self.forward(b)).values():
                total = total + term.weight * mean_of(term, planned.denominators)
        return total

    def gradients(
        self, asked: Window | Sequence[Batch], names: Sequence[str], loss: Callable[[Forward], Tensor] | None = None
    ) -> Probed:
        """Loss and gradients at these parameters; `loss` (a scalar of a forward) over batches replaces the objective's."""
        if loss is None:
            return self._gradients(self.planned(asked), names)
        assert not isinstance(asked, Window)
        return self._gradients(Planned(self.objective, list(asked), {}), names, loss)

    def _gradients(
        self, planned: Planned, names: Sequence[str], loss: Callable[[Forward], Tensor] | None = None
    ) -> Probed:
        with self.quiet():
            for p in self.view.module.parameters():
                p.requires_grad_(False)
            wanted = [self.view.weight(n).requires_grad_(True) for n in names]
            with torch.enable_grad():
                if loss is None:
                    value = self._mean(planned)
                else:
                    zero = torch.zeros((), device=self.view.device)
                    value = sum((loss(self.forward(b)) for b in planned.batches), zero)
                some = value.requires_grad  # a rank may have no rows
                here = torch.autograd.grad(value, wanted) if some else [torch.zeros_like(p) for p in wanted]
            grads = [self.total(g) for g in here]
        return Probed(float(self.total(value.detach())), dict(zip(names, grads, strict=True)), {})

    def trial_step(
        self,
        asked: Window | Sequence[Batch],
        names: Sequence[str],
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> Probed:
        """Take one optimiser step on these parameters, compute the gradients after it, then restore everything.

        make  builds a new optimiser; the state of the run's own optimiser does not change
        """
        planned = self.planned(asked)
        first = self._gradients(planned, names)
        before = {n: self.view.weight(n).detach().clone() for n in names}
        try:
            masters = [nn.Parameter(before[n].float().clone()) for n in names]
            for p, n in zip(masters, names, strict=True):
                p.grad = first.grads[n].float()
            make(masters).step()
            with torch.no_grad():
                for n, p in zip(names, masters, strict=True):
                    self.view.weight(n).copy_(p)
            second = self._gradients(planned, names)
            changes = {n: p.detach() - before[n].float() for n, p in zip(names, masters, strict=True)}
        finally:
            with torch.no_grad():
                for n, value in before.items():
                    self.view.weight(n).copy_(value)
        return Probed(first.loss, first.grads, changes, second.loss, second.grads)

    def jvp(self, f: Callable[[], Tensor], along: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(f, its derivative along a direction in these parameters), in one forward-mode pass.

        f  a function of the model's current weights
        """
        names = list(along)
        module = self.view.module

        def at(*values: Tensor) -> Tensor:
            return _call_with(module, dict(zip(names, values, strict=True)), f)

        primals = tuple(module.get_parameter(n).detach() for n in names)
        with torch.no_grad(), plain_operations(), self.view.meter.derivative(module, names):
            value, change = torch.func.jvp(  # type: ignore[misc]
                at, primals, tuple(along[n].to(p) for n, p in zip(names, primals, strict=True))
            )
        return value, change


def _call_with(module: nn.Module, values: Mapping[str, Tensor], f: Callable[[], Tensor]) -> Tensor:
    """f() with some parameters replaced by plain tensors."""
    with _reparametrize_module(module, dict(values)):
        return f()
