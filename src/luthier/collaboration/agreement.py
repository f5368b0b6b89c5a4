"""What parties agree on before anybody tunes, whatever the protocol."""

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
    """Methods of a kind from their name, or {name: {fields}}."""

    def read(value: Any) -> Any:
        return method(kind, value, "contract")

    return BeforeValidator(read)


AnyTuner = Annotated[Tuner, named("tuner"), PlainSerializer(written)]


class Rendering(BaseModel, frozen=True, extra="forbid"):
    """How rows become tokens: as the recipe's keys of data say."""

    system: str | None = None
    template: Literal["auto", "chat", "plain"] = "auto"
    max_length: int | None = Field(None, ge=2)


class Agreement(BaseModel, frozen=True, extra="forbid"):
    """Equal for all parties; its digest names the collaboration and is in every message."""

    settings: TrainSettings
    rendering: Rendering = Rendering()
    privacy: Privacy | None = None
    """What every client promises while it tunes."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they are in the contract's file."""
        return self.model_dump(mode="json")
