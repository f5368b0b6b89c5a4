"""Exports: a merged Hugging Face folder, a peft adapter, a GGUF file. Each is read back and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from luthier.data.rendering import Renderer
from luthier.federation.outcome import read_given
from luthier.model.weights import save
from luthier.report.card import base_of, card
from luthier.report.card_rules import faults
from luthier.support.errors import LuthierError
from luthier.support.files import whole
from luthier.tuned import llama_cpp
from luthier.tuned.gguf_file import read_back, refuse_architecture, write
from luthier.tuned.gguf_vocabulary import FIXED, vocabulary_of
from luthier.tuned.merged import merged_in
from luthier.tuned.modelfile import modelfile
from luthier.tuned.open import Tuned, open_run, state_of
from luthier.tuned.probe import TOLERANCE, difference, logits, probe_of
from luthier.tuned.vllm import rank_to_serve, refused_by_vllm

Writer = Callable[[Tuned, Path, str], nn.Module]
FORMS = ("hf", "peft", "gguf")


def export(folder: Path, to: str, output: Path, allow_code: bool = False) -> dict[str, Any]:
    """Write a finished run, a merge, or the result of a collaboration in another form. Returns folder, form, and the
    difference of logits after reading it back.

    An update of a run in 4 bits is merged into the original weights.
    Raises LuthierError if the form cannot hold the update, or if the export differs from the tuned model.
    """
    if to not in FORMS:
        raise LuthierError(f"--to {to!r}: there are {', '.join(FORMS)}")
    if output.exists() and any(output.iterdir()):
        raise LuthierError(f"{output}: exists and is not empty; choose another folder")
    run = open_run(folder, allow_code, quantize=False)
    task = run.recipe.task
    if to not in task.export_forms:
        raise LuthierError(
            f"--to {to}: cannot hold a model tuned for {task.key()}; use {' or '.join(task.export_forms)}"
        )
    if to != "hf":  # peft and GGUF round in other places than luthier, so the outputs without rounding are compared
        run.view.widen()
    probe = probe_of(run.renderer.tokenizer)
    with run.update.bind(run.view):
        tuned = logits(run.view.module, probe)
    base = logits(run.view.module, probe)
    writer: Writer = {"hf": _hf, "peft": _peft, "gguf": _gguf}[to]
    with whole(output) as half:
        written = logits(writer(run, half, output.name), probe)
        off = difference(written, tuned)
        if off > TOLERANCE[torch.float16 if to == "gguf" else run.view.dtype]:
            raise LuthierError(
                f"{output}: the export differs from the tuned model by {off:.3g} of the largest logit; it was removed"
            )
        if difference(written, base) == 0.0:
            raise LuthierError(f"{output}: the export equals the base model; nothing was exported")
    more = {"vllm": _vllm(output)} if to == "peft" else {}
    return {"folder": str(output), "form": to, "difference": off, **more}


def _vllm(folder: Path) -> str:
    """Whether vLLM loads an adapter: with which option, or why not."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    why = refused_by_vllm(config, names)
    if why is None:
        return f"loads with --max-lora-rank {rank_to_serve(config)}"
    return f"refuses it: {why}; export with --to hf"


def push_to_hub(folder: Path, name: str) -> str:
    """Upload an export to a Hub id, as a private repository. Returns its address.

    Raises LuthierError, before anything is sent, for a model card that the Hub would refuse.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    file = folder / "README.md"
    if not file.is_file():
        raise LuthierError(f"--push {name}: {folder}: there is no model card (README.md); write one")
    if found := faults(file.read_text(encoding="utf-8")):
        raise LuthierError(f"--push {name}: {file}: the Hub refuses it: {'; '.join(found)}; correct it")
    try:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise LuthierError(f"--push {name}: {first}; {folder} is written, log in with `hf auth login`") from error
    return str(url)


def _merged(run: Tuned) -> PreTrainedModel:
    """The model with the update merged into its weights."""
    if why := run.update.refusal(run.view.module):
        raise LuthierError(f"{run.folder}: {why}; use the run folder itself")
    run.update.merge_into(run.view.module)
    return run.view.module


def _peft(run: Tuned, output: Path, name: str) -> nn.Module:
    from peft import PeftModel

    files = [run.folder / n for n in ("adapter_config.json", "adapter_model.safetensors")]
    if not all(f.exists() for f in files):
        raise LuthierError(
            f"{run.folder}: holds no low-rank adapter that peft would read as it was trained; use --to hf"
        )
    for file in (*files, run.folder / "README.md"):
        shutil.copy(file, output / file.name)
    return PeftModel.from_pretrained(run.view.module, str(output))


def _hf(run: Tuned, output: Path, name: str) -> PreTrainedModel:
    save(_merged(run), output)
    run.renderer.tokenizer.save_pretrained(output)
    (output / "README.md").write_text(_card(run), encoding="utf-8")
    found: PreTrainedModel = run.recipe.task.auto(run.view.module.config).from_pretrained(output, dtype=run.view.dtype)
    return found


def _base(run: Tuned) -> dict[str, str]:
    """What is known of the base model, for a file's general metadata."""
    licence = base_of(run.recipe.model, run.view.name).licence
    return {} if licence is None else {"license": licence}


def _card(run: Tuned) -> str:
    told = read_given(run.folder) or merged_in(run.folder)
    if told is not None:
        return told.card(run.folder.name, "merge")
    return card(run.folder, state_of(run.folder), run.recipe, run.view.name, "merge")


def _gguf(run: Tuned, output: Path, name: str) -> PreTrainedModel:
    config = run.view.module.config  # merging writes the sizes of a smaller model into it
    refuse_architecture(config)
    vocabulary = vocabulary_of(run.renderer, config.vocab_size, (*FIXED, *_conversations(run.renderer)))
    file = output / "model.gguf"
    write(file, _merged(run), vocabulary, name, _base(run))
    (output / "README.md").write_text(_card(run), encoding="utf-8")
    (output / "Modelfile").write_text(modelfile(run.renderer, file.name), encoding="utf-8")
    model = read_back(file, config)
    if llama_cpp.installed():
        texts = (*FIXED, *_conversations(run.renderer))
        prompts = [run.renderer.prompt_ids({"prompt": text}) for text in FIXED[:3]]
        llama_cpp.compare(
            file, run.renderer.tokenizer, texts, prompts, lambda ids: logits(model, ids), TOLERANCE[torch.float16]
        )
    return model


def _conversations(renderer: Renderer) -> list[str]:
    """Prompts as the model's own template writes them."""
    if renderer.plain:
        return []
    turns = [[{"role": "user", "content": text}] for text in FIXED]
    said: list[str] = [
        renderer.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns
    ]
    return said
