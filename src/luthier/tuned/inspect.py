"""Look into finished runs with one method of inspection: what did tuning do to the model?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.inspection.base import Case, Finding, Inspector
from luthier.inspection.norms import Norms
from luthier.support.errors import LuthierError
from luthier.tuned.members import members_of, refuse_unsuited


def inspect(folders: Sequence[Path], method: Inspector | None = None, allow_code: bool = False) -> Finding:
    """Look into finished runs, merges, results of a collaboration, or adapters, all of one base. A base that a run held in 4 bits
    is loaded with its original weights.

    method      by default Norms
    allow_code  import the classes that the folders' recipes name
    Raises LuthierError for no folder, for one that is none of these, and for folders of different bases or tasks.
    """
    method = method or Norms()
    if not folders:
        raise LuthierError("inspect: there is nothing to look into; name a finished run or an adapter")
    members = members_of(folders, allow_code)
    refuse_unsuited(method, members.use, quantized=False)
    lab = members.lab(quantize=False)
    view = lab.view()
    updates = members.updates(view.base)
    for update in updates.values():
        update.refuse_misfit(view)
    return method.inspect(Case(view, updates), lab)
