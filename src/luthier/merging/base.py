"""The base class of mergers: several updates of one base become one."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.method import Method
from luthier.step.lab import Lab
from luthier.update import Update


class Merger(Method):
    """Makes one update of several."""

    def check_count(self, count: int) -> None:
        """Raises LuthierError where it cannot merge so many updates. It is asked before any of them is read."""

    def merge(self, members: Sequence[Update], lab: Lab | None = None) -> Update:
        """One update of the members' base. Raises LuthierError if they cannot be merged.

        lab  for methods that score their results
        """
        raise NotImplementedError  # the seam: every merger has its own
