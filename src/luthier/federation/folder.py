"""The folder of a collaboration: contract, models, shadow runs and messages. The commands work in it.

contract.json      for all parties: protocol, agreement, where the models come from
provider.json      only in the provider's folder: the recipe with its public rows
shadows/           both models' updates, one file for each set
calibration.safetensors   updates of public rows with their tokens, for clients' audits; the provider may pass it on
arrived/           messages, in the order of arrival
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier import recipe as recipes
from luthier.collaboration.agreement import Agreement, Rendering
from luthier.collaboration.base import Collaboration
from luthier.collaboration.journal import Journal
from luthier.data.prepare import prepare
from luthier.data.reading import Tick, no_tick, read
from luthier.data.rendering import Renderer
from luthier.data.store import Rows
from luthier.inference.scoring import mean_loss
from luthier.inference.services import lab_with
from luthier.method.building import method
from luthier.method.registry import written
from luthier.model.anatomy import max_positions
from luthier.model.loading import Located, load_model, load_tokenizer, locate
from luthier.model.view import ModelView
from luthier.recipe import Recipe
from luthier.recipe.settings import set_in
from luthier.step.lab import Lab
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import replaced, write_text
from luthier.update import Update

LIMIT = 1 << 30  # largest message in bytes that is accepted
# The keys that a contract takes from a recipe, besides training. Evaluations and checkpoints belong to single runs.
TAKEN = {"luthier", "model", "revision", "data", "tuner", "collaborate"}
OF_A_RUN = {"eval_steps", "early_stopping_patience", "load_best", "save_steps", "save_limit", "logging_steps"}
TAKEN_OF_DATA = {"train", "columns", "system", "template", "max_length"}


class Workspace:
    """An opened folder, with the protocol and the contract in it.

    models  where the models are, by role: as the contract says, or as given here
    given   only the paths that were given here, which replace those in the contract
    """

    def __init__(self, path: Path, models: Mapping[str, str] | None = None) -> None:
        self.path = path
        stored = _json(path / "contract.json", "make one with `luthier collaborate contract`")
        self.protocol: Collaboration = method("collaborate", stored["protocol"], str(path / "contract.json"))
        self.contract: Agreement = self.protocol.contract.model_validate(stored["agreement"])
        if self.contract.digest != stored["digest"]:
            raise LuthierError(f"{path / 'contract.json'}: was changed after it was agreed on; ask for it again")
        self.given = dict(models or {})
        self.models: dict[str, str] = {**stored["models"], **self.given}
        if unknown := set(models or {}) - set(self.protocol.roles):
            raise LuthierError(f"--model {min(unknown)}: the contract's models are {', '.join(self.protocol.roles)}")

    @classmethod
    def create(cls, recipe: Recipe, base: Path, path: Path) -> Workspace:
        """Agree on what the recipe says, and write the contract. Raises RecipeError for a recipe that cannot work."""
        protocol = recipe.collaborate
        if protocol is None:
            raise RecipeError("collaborate", "is missing", "name a protocol: one-shot, seed-rounds or grad-transformer")
        if (path / "contract.json").exists():
            raise LuthierError(f"{path}: holds a contract already; work in a new folder")
        refuse_unread(recipe)
        models = {r: _absolute(base, m) for r, m in zip(protocol.roles, _models(recipe), strict=True)}
        d = recipe.data
        rendering = Rendering(system=d.system, template=d.template, max_length=d.max_length)
        views = [_view(m) for m in models.values()]
        _refuse_other_words(dict(zip(protocol.roles, views, strict=True)), protocol.key(), rendering)
        settings = _settings(recipe)
        contract = protocol.agree(views, recipe.tuner, settings, rendering=rendering)
        path.mkdir(parents=True, exist_ok=True)
        provider = {"recipe": recipe.as_dict(), "base": str(base.resolve())}
        write_text(path / "provider.json", json.dumps(provider, indent=1))
        shared = {
            "luthier": 1, "protocol": written(protocol), "agreement": contract.as_dict(), "digest": contract.digest,
            "models": models,
        }  # fmt: skip
        write_text(path / "contract.json", json.dumps(shared, indent=1))
        return cls(path)

    # --- models and rows ---

    @cached_property
    def lab(self) -> Lab:
        """The services around the models that the contract pins. Models go by their roles; each is loaded at its first use."""
        r, settings = self.contract.rendering, self.contract.settings
        plain = {"auto": None, "chat": False, "plain": True}[r.template]
        renderer = Renderer(_tokenizer(locate(self.models[self.protocol.roles[0]])), r.system, plain)
        models = {role: partial(_view, model) for role, model in self.models.items()}
        lab = lab_with(renderer, models, tokens_per_forward=2 * settings.tokens_per_forward, seed=settings.seed)
        lab.shadowing = self.shadows
        return lab

    @property
    def first(self) -> ModelView:
        """The model that clients tune."""
        return self.lab.view(self.protocol.roles[0])

    def loss(self, role: str, update: Update | None, rows: Sequence[Any]) -> float:
        """Nats a token of a model on rendered rows, with an update or without."""
        view = self.lab.view(role)
        with nullcontext() if update is None else update.bind(view):
            return mean_loss(self.lab.scorer.losses(view, rows))

    def rows(self, source: str, base: Path, tick: Tick = no_tick, columns: Mapping[str, str] | None = None) -> Rows:
        """Rows of a file. Raises RecipeError with the line of a row that cannot be used."""
        return read(source, columns or {}, base, tick=tick)[0]

    def rows_in(self, file: str) -> Sequence[dict[str, Any]]:
        """The rendered rows of a client's file. Raises RecipeError with the line of a row that cannot be used."""
        return self.rendered(self.rows(file, Path()))

    def rendered(self, rows: Rows | Sequence[Any], tick: Tick = no_tick) -> Sequence[dict[str, Any]]:
        """Render rows as the contract says."""
        room = self.contract.rendering.max_length or max_positions(self.first.module.config)
        return prepare(rows, self.lab.renderer, max_length=room, tick=tick).rows

    def public(self, tick: Tick = no_tick) -> tuple[Sequence[dict[str, Any]], list[str]]:
        """(the provider's rendered rows, the kind of each)."""
        recipe, base = self.recipe()
        source = recipe.data.sources[0]
        rows = self.rows(source.path, base, tick, source.columns)
        by = getattr(self.protocol, "by", None)
        if by is not None and by not in rows[0].values:
            raise LuthierError(f"collaborate.grad-transformer.by: no column {by!r} in {source.path}")
        return self.rendered(rows, tick), ["all" if by is None else str(r.values[by]) for r in rows]

    def recipe(self) -> tuple[Recipe, Path]:
        """The provider's recipe and its folder. Raises LuthierError in a client's copy of the folder."""
        stored = _json(self.path / "provider.json", "only the provider's folder has it")
        return recipes.load(json.dumps(stored["recipe"]), str(self.path / "provider.json")), Path(stored["base"])

    # --- shadows ---

    def shadow_file(self, number: int) -> Path:
        return self.path / "shadows" / f"{number:05d}.safetensors"

    def missing_shadows(self, sets: int) -> list[int]:
        """Numbers of the sets that are not made yet."""
        return [k for k in range(sets) if not self.shadow_file(k).exists()]

    def keep_shadow(self, number: int, made: dict[str, Tensor]) -> None:
        """Save a shadow set, completely or not at all. Tensors are made contiguous, as safetensors needs them."""
        file = self.shadow_file(number)
        file.parent.mkdir(exist_ok=True)
        with replaced(file) as temporary:
            save_file({n: t.contiguous() for n, t in made.items()}, temporary, {"contract": self.contract.digest})

    def shadows(self, sets: int, snapshots: int) -> list[dict[str, Tensor]]:
        """The updates of all shadow sets. Raises LuthierError if some are missing, or have too few snapshots."""
        if missing := self.missing_shadows(sets):
            raise LuthierError(
                f"{self.path}: {len(missing)} of {sets} shadow sets are not made; run `luthier collaborate shadow {self.path}`"
            )
        found = [load_file(self.shadow_file(k)) for k in range(sets)]
        for k, f in enumerate(found):
            if len(f["x"]) != snapshots or len(f["y"]) != snapshots:
                raise LuthierError(
                    f"{self.shadow_file(k)}: {len(f['x'])} and {len(f['y'])} snapshots, the contract says {snapshots}"
                )
        return found

    # --- for audits ---

    @property
    def calibration(self) -> Path:
        """The path of the calibration file."""
        return self.path / "calibration.safetensors"

    def keep_calibration(self, updates: Tensor, tokens: Sequence[Sequence[int]]) -> None:
        """The first model's updates [N, L, d] of N sets of public rows, and the distinct tokens of each."""
        held = {"x": updates.contiguous(), "tokens": torch.tensor([t for one in tokens for t in one]),
                "lengths": torch.tensor([len(one) for one in tokens])}  # fmt: skip
        with replaced(self.calibration) as temporary:
            save_file(held, temporary, {"contract": self.contract.digest})

    def calibrated(self) -> list[tuple[Tensor, list[int]]]:
        """(update, distinct tokens) of each set; none if there is no such file. Raises LuthierError for a file of another
        contract."""
        if not self.calibration.exists():
            return []
        with safe_open(self.calibration, "pt") as file:
            if (file.metadata() or {}).get("contract") != self.contract.digest:
                raise LuthierError(f"{self.calibration}: belongs to another contract; ask the provider for this one's")
            x, tokens, lengths = (file.get_tensor(n) for n in ("x", "tokens", "lengths"))
        parts = tokens.split(lengths.tolist())
        return [(u, t.tolist()) for u, t in zip(x, parts, strict=True)]

    def journal(self) -> Journal:
        """The journal of what clients sent."""
        return Journal(self.path / "arrived", LIMIT)


def _settings(recipe: Recipe) -> TrainSettings:
    """A recipe's training keys."""
    return TrainSettings(**{n: getattr(recipe, n) for n in TrainSettings.model_fields})


def _models(recipe: Recipe) -> list[str]:
    """The model of each role; the recipe's own model comes first."""
    assert recipe.collaborate is not None
    others = [getattr(recipe.collaborate, role) for role in recipe.collaborate.roles[1:]]
    for role, model in zip(recipe.collaborate.roles[1:], others, strict=True):
        if model is None:
            raise RecipeError(f"collaborate.{recipe.collaborate.key()}.{role}", "is missing", "name a model")
    # Someone who opens the contract does not have the recipe.
    pinned = recipe.revision is not None and "@" not in recipe.model
    return [f"{recipe.model}@{recipe.revision}" if pinned else recipe.model, *others]


def refuse_unread(recipe: Recipe) -> None:
    """Raises RecipeError for a key that was set but that no party would use."""
    more = (set_in(recipe) - TAKEN - TrainSettings.model_fields.keys()) | (set_in(recipe) & OF_A_RUN)
    more |= {f"data.{key}" for key in set_in(recipe.data) - TAKEN_OF_DATA}
    if not isinstance(recipe.data.train, str):
        raise RecipeError("data.train", "holds several sources, but a collaboration uses one set of rows", "name one")
    if more:
        raise RecipeError(min(more), "is not read by collaborations: all parties tune by sft on all rows", "remove it")


def _refuse_other_words(views: Mapping[str, ModelView], protocol: str, rendering: Rendering) -> None:
    """Raises RecipeError for a model that would read rows differently: rows are rendered once, by the first model's tokenizer."""
    first, *others = views.items()
    words = first[1].tokenizer
    for role, view in others:
        key = f"collaborate.{protocol}.{role}"
        if view.tokenizer.get_vocab() != words.get_vocab():
            raise RecipeError(
                key, "has other tokens than `model`, and rows are rendered once", "take two of one family"
            )
        if rendering.template != "plain" and view.tokenizer.chat_template != words.chat_template:
            raise RecipeError(
                key, "has another chat template than `model`", "take two of one family, or template: plain"
            )


def _absolute(base: Path, model: str) -> str:
    return str((base / model).resolve()) if (base / model).exists() else model


def _view(model: str) -> ModelView:
    located = locate(model)
    return load_model(located, tokenizer=_tokenizer(located))


def _tokenizer(located: Located) -> Any:
    tokenizer = load_tokenizer(located)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _json(file: Path, remedy: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LuthierError(f"{file}: does not exist; {remedy}") from error
    except ValueError as error:
        raise LuthierError(f"{file}: cannot be read ({error})") from error
    return found
