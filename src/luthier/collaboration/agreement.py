"""What all parties agree on before anyone tunes, in every protocol."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

from luthier.collaboration.privacy import Privacy
from luthier.method.building import method
from luthier.method.registry import written
from luthier.step.settings import TrainSettings
from luthier.tuners.base import Tuner


def named(kind: str) -> BeforeValidator:
    """A validator that turns a name, or {name: {fields}}, into a method of this kind."""

    def read(value: Any) -> Any:
        return method(kind, value, "contract")

    return BeforeValidator(read)


AnyTuner = Annotated[Tuner, named("tuner"), PlainSerializer(written)]


class Rendering(BaseModel, frozen=True, extra="forbid"):
    """How rows become tokens. The fields are the recipe's keys below `data`."""

    system: str | None = None
    template: Literal["auto", "chat", "plain"] = "auto"
    max_length: int | None = Field(None, ge=2)


class Agreement(BaseModel, frozen=True, extra="forbid"):
    """The agreement of all parties. Its digest identifies the collaboration and is in every message."""

    tuner: AnyTuner
    settings: TrainSettings
    rendering: Rendering = Rendering()
    privacy: Privacy | None = None
    """The privacy limit that every client keeps while it tunes."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in the contract's file."""
        return self.model_dump(mode="json")
