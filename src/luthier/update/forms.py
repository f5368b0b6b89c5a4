"""All forms of part, by their name in files and messages. A new form is one class, and one line here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luthier.update.base import Part
from luthier.update.compositions import Modules, PeftPart, Prompt, Replace
from luthier.update.structure import Structure
from luthier.update.vectors import Dense, LowRank, Seeds, Sparse

FORMS: dict[str, type[Part]] = {
    form.kind: form for form in (Dense, Sparse, LowRank, Seeds, Replace, Prompt, Modules, PeftPart, Structure)
}


def restore(kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> Part:
    """A part from its file or message. Raises KeyError for an unknown form."""
    return FORMS[kind].restore(tensors, header)
