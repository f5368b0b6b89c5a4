"""What the model's own code does after its trunk: multipliers, soft caps, pooling, classification heads.

It is not written again here. The model's own forward pass runs, with a result of the trunk put in the trunk's place. So a new
architecture needs no line in luthier, and its logits are its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.support.errors import LuthierError

# What the code of models raises for inputs that it cannot take.
FAILURES = (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError)


def brief(error: Exception) -> str:
    """The first line of an error of a model's code."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Result(tuple[Tensor, ...]):
    """A trunk's result as the code of models reads it: by number, or by name. What it does not hold is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    @property
    def pooler_output(self) -> Tensor | None:
        return self[1] if len(self) > 1 else None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Reached(Exception):
    """The head is called: the rest of the forward pass is not needed."""


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call this instead of the module's forward and hooks inside the scope."""
    before, hooks = module.__dict__.get("forward"), (module._forward_hooks, module._forward_pre_hooks)
    module.forward, module._forward_hooks, module._forward_pre_hooks = forward, OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_hooks, module._forward_pre_hooks = hooks
        if before is None:
            del module.forward
        else:
            module.forward = before


def doors(trunk: nn.Module) -> list[nn.Module]:
    """The trunk, and what it only wraps: some models call that directly (OPT, BART's decoder)."""
    out = [trunk]
    while True:
        inner = [m for m in out[-1].children() if not isinstance(m, nn.Embedding)]
        if len(inner) != 1 or not isinstance(inner[0], PreTrainedModel):
            return out
        out.append(inner[0])


def own_logits(module: PreTrainedModel, trunk: nn.Module, result: Result, ids: Tensor) -> Tensor:
    """The logits of the model's own forward pass over this result of the trunk; ids [S, L]."""
    calls = []

    def given(*args: Any, **kwargs: Any) -> Result:
        calls.append(1)
        return result

    with ExitStack() as stack:
        for door in doors(trunk):
            stack.enter_context(standing_in(door, given))
        try:  # the class's own method: an instance may carry luthier's wrapper around the whole call
            out = type(module).forward(module, input_ids=ids, attention_mask=torch.ones_like(ids))
        except FAILURES as error:
            raise LuthierError(
                f"{type(module).__name__}: its own code cannot follow its trunk's last state alone ({brief(error)})"
            ) from error
    if not calls:
        raise LuthierError(f"{type(module).__name__} does not call {type(trunk).__name__} as its trunk")
    logits: Tensor = out.logits
    return logits


class Tail:
    """What happens to hidden states before the vocabulary matrix, and to logits after it.

    plain_before, plain_after  nothing happens there
    """

    def __init__(self, module: PreTrainedModel, trunk: str, head: str, width: int) -> None:
        """
        trunk, head  their names in the model
        width        of the trunk's result
        Raises LuthierError where the model's code cannot be followed.
        """
        self.module, self.names, self.width = module, (trunk, head), width
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        real = weight.dtype if weight.is_floating_point() else torch.float32
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            hidden = torch.randn(3, width, generator=generator).to(weight.device, real)
            self.plain_before = torch.equal(self._before(hidden), hidden)
            z = torch.randn(3, len(weight), generator=generator).to(weight.device)
            self.plain_after = torch.equal(self._after(z), z)

    @property
    def trunk(self) -> nn.Module:
        return self.module.get_submodule(self.names[0])

    @property
    def head(self) -> nn.Module:
        return self.module.get_submodule(self.names[1])

    def before(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, D']: the modules between trunk and vocabulary matrix."""
        return hidden if self.plain_before else self._before(hidden)

    @property
    def after(self) -> Callable[[Tensor], Tensor] | None:
        """[N, V] -> [N, V] on the product of the vocabulary matrix; None if it is the logits."""
        return None if self.plain_after else self._after

    def _before(self, hidden: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def reached(x: Tensor) -> Tensor:
            caught.append(x)
            raise _Reached

        with standing_in(self.head, reached), suppress(_Reached):
            self._own(hidden)
        if not caught:
            raise LuthierError(f"{type(self.module).__name__} does not call its output embeddings as a module")
        return caught[0].reshape(len(hidden), -1)

    def _after(self, z: Tensor) -> Tensor:
        filler = z.new_zeros(1, dtype=self.head.weight.dtype).expand(len(z), self.width)  # type: ignore[arg-type]
        with standing_in(self.head, lambda x: z.unsqueeze(0)):
            return self._own(filler)[0]

    def _own(self, hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return own_logits(self.module, self.trunk, Result((hidden.unsqueeze(0),)), ids)


def class_logits(module: PreTrainedModel, trunk: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """[L, D], [L] -> [C]: the model's own classification head over one sequence."""
    one = hidden.unsqueeze(0)
    pooled = pooled_by(trunk, one)
    return own_logits(module, trunk, Result((one,) if pooled is None else (one, pooled)), ids.unsqueeze(0))[0]


def pooled_by(trunk: nn.Module, hidden: Tensor) -> Tensor | None:
    """[S, L, D] -> [S, D] by the trunk's own pooler, if it has one."""
    pooler = getattr(trunk, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return None
    if isinstance(pooler, nn.Linear):  # ALBERT, BigBird: a matrix and an activation
        name = "pooler_activation" if hasattr(trunk, "pooler_activation") else "activation"
        activation: Callable[[Tensor], Tensor] = getattr(trunk, name)
        return activation(pooler(hidden[:, 0]))
    pooled: Tensor = pooler(hidden)
    return pooled
