"""peft's own tuners, under peft's names: DoRA, IA3, LoHa, LoKr, VeRA, OFT, HRA, and LoRA's further options."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.method import Facts, Problem, Source, Traits
from luthier.model.peft_modules import PeftModules
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.rng import Streams
from luthier.tuners.base import ParamGroup, Trainable, Tuner, as_view, copies
from luthier.update import Update
from luthier.update.compositions import PeftPart

STARTS = (True, False, "gaussian")  # peft's other starts write into the base, which then cannot be given back
OURS = frozenset({"target_modules", "task_type", "peft_type", "inference_mode", "base_model_name_or_path", "revision"})


class Peft(Tuner):
    """Attach one of peft's adapters. Its options are peft's own, and the run's folder opens with `PeftModel`.

    DoRA is `{peft: {type: LORA, options: {use_dora: true}}}`. Adapters train in float32, as peft keeps them.
    Refuses: starts that rewrite the base (PiSSA, OLoRA, CorDA, EVA, LoftQ), prompt tuning (use dept), and AdaLoRA, whose
    budget needs calls of its own.
    Cost: that of peft; casting activations to float32 adapters makes a step slower than with `lora` (1.3 times on a CPU).
    """

    traits: ClassVar[Traits] = Traits(claims=frozenset({"weight"}))
    source: ClassVar[Source] = Source("PEFT", 2022, "https://github.com/huggingface/peft")

    type: Literal["LORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "HRA"] = "LORA"
    """peft's name of the adapter."""
    options: dict[str, bool | int | float | str | list[str] | None] = Field(default_factory=dict)
    """Fields of that adapter's peft configuration."""
    targets: str | tuple[str, ...] = "all-linear"
    """Linear layers to adapt."""
    seed: int = 0
    """Seed for the adapters' start."""

    def check(self, facts: Facts) -> list[Problem]:
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        found = super().check(facts)
        known = {f.name for f in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.type)])} - OURS
        for name in self.options:
            if name not in known:
                found.append(
                    Problem(
                        f"options.{name}",
                        f"peft's {self.type} has no such option here",
                        f"known are {', '.join(sorted(known))}",
                    )
                )
        start = self.options.get("init_lora_weights", True)
        if start not in STARTS:
            found.append(Problem("options.init_lora_weights", f"{start!r} rewrites the base", "use true or gaussian"))
        if not found:
            named = self.options.get("feedforward_modules")  # IA3 wants these among the targets
            try:
                # A list, as it will be: beside a text as target_modules, peft refuses layers_to_transform.
                self.config(target_modules=["linear", *(named if isinstance(named, list) else ())])
            except (ValueError, TypeError) as error:
                found.append(Problem("options", str(error).splitlines()[0], "see peft's documentation"))
        return found

    def config(self, **found: Any) -> Any:
        """peft's configuration. Raises ValueError or TypeError for options that peft refuses.

        found  fields that are known from the model
        """
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.type)]
        return kind(**{**found, **self.options})

    def attach(
        self, model: ModelView | PreTrainedModel, lab: Lab | None = None, total_steps: int | None = None
    ) -> PeftTrainable:
        self.refuse(Facts())
        return PeftTrainable(self, as_view(model))


def tied_modules(model: nn.Module) -> set[str]:
    """Names of the modules that use a parameter which another module uses too."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {module for modules in users.values() if len(modules) > 1 for module in modules}


class PeftTrainable(Trainable):
    """peft's modules in the model's places."""

    def __init__(self, tuner: Peft, view: ModelView) -> None:
        from peft import get_peft_model

        targets, tied = view.anatomy.match(tuner.targets), tied_modules(view.module)
        super().__init__(view)
        self.freeze_base()
        found = {"target_modules": sorted(x.module for x in targets)}
        if tuner.type == "IA3":  # it scales the input of these layers and the output of the others
            found["feedforward_modules"] = sorted(x.module for x in targets if x.role == "down")
        try:
            config = tuner.config(**found)
            with torch.random.fork_rng():
                torch.manual_seed(int(Streams(tuner.seed).at("peft").integers(1 << 31)))
                self.placed = PeftModules(view.module, lambda model: get_peft_model(model, config))
        except (ValueError, TypeError) as error:
            self.detach()
            raise RecipeError("tuner.peft.options", str(error).splitlines()[0], "see peft's documentation") from error
        except LuthierError:
            self.detach()
            raise
        self.wrapped = self.placed.wrapped
        self.put(self.placed.change)
        self._refuse_copies(tied)
        # Freeze now, because a task head that trains too needs gradients.
        self.named = {n: p for n, p in self.wrapped.named_parameters() if p.requires_grad}

    def _refuse_copies(self, tied: Collection[str]) -> None:
        """Raise RecipeError if peft would train a copy of a module whose weight the model uses in two places.

        Embeddings and head would differ afterwards, but the model's configuration says that they are one tensor: whoever
        opens the merged model would lose one of them.
        """
        from peft.utils import ModulesToSaveWrapper

        found = (n for n, m in self.wrapped.get_base_model().named_modules() if isinstance(m, ModulesToSaveWrapper))
        name = next((n for n in found if n in tied), None)
        if name is not None:
            self.detach()
            raise RecipeError(
                "tuner.peft.options.modules_to_save",
                f"peft would train a copy of {name}, whose weight this model uses both as embeddings and as head",
                "leave it out, or use tuner: full, which trains that weight in both places",
            )

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup(list(self.named.values()))]

    def state_dict(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for n, p in self.named.items():
            p.copy_(state[n])

    def update(self) -> Update:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        config = self.wrapped.peft_config["default"].to_dict()
        return Update(self.base, (PeftPart(config, copies(state)),))
