"""A change to what a model computes. It can be undone for good, or left out for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

Undo = Callable[[], None]
Without = Callable[[], AbstractContextManager[None]]


class Change(NamedTuple):
    """A change that is on a model now.

    undo     removes it
    without  a scope in which the model computes as if it were off; scopes may be nested
    """

    undo: Undo
    without: Without


def in_turn(steps: Iterable[Undo]) -> Undo:
    """One undo for steps that are done one by one, undone last first. If one fails, those before it are undone."""
    with ExitStack() as stack:
        for undo in steps:
            stack.callback(undo)
        return stack.pop_all().close


def together(changes: Iterable[Change]) -> Change:
    """One change for several that are made one by one. If one fails, those before it are undone."""
    made: list[Change] = []

    def steps() -> Iterator[Undo]:
        for change in changes:
            made.append(change)
            yield change.undo

    return Change(in_turn(steps()), lambda: leaving_out([c.without for c in made]))


@contextmanager
def leaving_out(withouts: Sequence[Without]) -> Iterator[None]:
    """Leave out all of these, the last one first."""
    with ExitStack() as stack:
        for without in reversed(withouts):
            stack.enter_context(without())
        yield


@contextmanager
def swapped(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Other values in these parameters, for the calls inside.

    The parameters point to the values: nothing is copied, and autograd counts no write, so an earlier graph
    still finds what it saved.
    """
    own = [(p, p.data) for p, _ in values]
    try:
        for p, value in values:
            p.data = value
        yield
    finally:
        for p, data in reversed(own):
            p.data = data
