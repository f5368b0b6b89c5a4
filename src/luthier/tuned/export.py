"""Exports: a merged Hugging Face folder, a peft adapter, a GGUF file. Each is read back and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from luthier.federation.outcome import read_given
from luthier.report.card import card
from luthier.support.errors import LuthierError
from luthier.support.files import whole
from luthier.tuned.merged import merged_in
from luthier.tuned.open import Tuned, open_run, state_of
from luthier.tuned.probe import TOLERANCE, difference, logits, probe_of

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
    write: Writer = {"hf": _hf, "peft": _peft, "gguf": _gguf}[to]
    with whole(output) as half:
        written = logits(write(run, half, output.name), probe)
        off = difference(written, tuned)
        if off > TOLERANCE[torch.float16 if to == "gguf" else run.view.dtype]:
            raise LuthierError(
                f"{output}: the export differs from the tuned model by {off:.3g} of the largest logit; it was removed"
            )
        if difference(written, base) == 0.0:
            raise LuthierError(f"{output}: the export equals the base model; nothing was exported")
    return {"folder": str(output), "form": to, "difference": off}


def push_to_hub(folder: Path, name: str) -> str:
    """Upload an export to a Hub id, as a private repository. Returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

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
    _merged(run).save_pretrained(output)
    run.renderer.tokenizer.save_pretrained(output)
    (output / "README.md").write_text(_card(run), encoding="utf-8")
    found: PreTrainedModel = run.recipe.task.auto(run.view.module.config).from_pretrained(output, dtype=run.view.dtype)
    return found


def _card(run: Tuned) -> str:
    told = read_given(run.folder) or merged_in(run.folder)
    if told is not None:
        return told.card(run.folder.name, "merge")
    return card(run.folder, state_of(run.folder), run.recipe, run.view.name, "merge")


# --- GGUF, Llama-type models ---

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Llama parameter. Raises LuthierError if it has none."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    number, _, rest = name.removeprefix("model.layers.").partition(".")
    inner, _, kind = rest.rpartition(".")
    if not number.isdigit() or inner not in _NAMES:
        raise LuthierError(f"export: {name} has no place in a Llama GGUF")
    return f"blk.{number}.{_NAMES[inner]}.{kind}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary rows: [heads, 2, d / 2] -> [heads, d / 2, 2]."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _gguf(run: Tuned, output: Path, name: str) -> PreTrainedModel:
    import gguf

    config = run.view.module.config  # merging writes the sizes of a smaller model into it
    if config.model_type != "llama":
        raise LuthierError(
            f"export --to gguf: {config.model_type} models are not supported, only llama-type ones; use --to hf"
        )
    model = _merged(run)
    file = output / "model.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(run.view.anatomy.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, run.renderer.tokenizer, config.vocab_size)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for parameter, p in model.named_parameters():
        value = p.detach().float().cpu().numpy()
        role = parameter.split(".")[-2]
        value = permuted(value, heads[role]) if role in heads else value
        writer.add_tensor(gguf_name(parameter), value.astype(np.float16 if p.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (output / "README.md").write_text(_card(run), encoding="utf-8")
    stops = "\n".join(f'PARAMETER stop "{run.renderer.tokenizer.decode([i])}"' for i in run.renderer.stop_ids)
    (output / "Modelfile").write_text(f"FROM ./model.gguf\n{stops}\n", encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(
        str(output), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )


def _add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    import gguf

    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise LuthierError(
            f"export --to gguf: {raw['model']['type']} tokenizers are not supported, only byte-level BPE"
        )
    by_id = {i: t for t, i in tokenizer.get_vocab().items()}
    special = {t["id"] for t in raw["added_tokens"]}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control if i in special else normal if i in by_id else unused for i in range(vocab_size)])
    merges = raw["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
