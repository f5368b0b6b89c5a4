"""A tokenizer in a GGUF file: byte-level BPE as model "gpt2", SentencePiece's BPE as model "llama"."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.data.rendering import Renderer
from luthier.model.pre_tokenizers import name_of
from luthier.support.errors import LuthierError
from luthier.tuned.sentencepiece import SPACE, Pieces

# Text on which two tokenizers that differ usually show it.
FIXED = (
    "The quick brown fox jumps over it.", "  two  spaces,\ttabs\n\n\nand lines \r\n", "12 345.6789 1,000,000 x2y3",
    "don't WON'T we'll I'M", "naïve café déjà ﬁn ｆｕｌｌ ½ ﷽", "日本語 中文 한국어 русский العربية हिन्दी ไทย",
    "\U0001f999\U0001f680 \U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "def f(x):\n    return {x: [1, 2]}  # <b>&amp;</b>\n", "https://a.b/c?d=e&f=%20 -- __init__ #$%^&*()", "ÀÉ aÁ \u200b\u00a0.",
)  # fmt: skip
NEVER = -1e6  # score of a piece that no pair is joined to


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer.

    model   "gpt2" or "llama"
    pre     llama.cpp's name for how text is cut before it is merged
    types   gguf's token type by id
    ids     ids of special tokens by gguf's name: bos, eos, eot, unk, pad
    adds    which of "bos" and "eos" are put around a text
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    adds: dict[str, bool]
    template: str | None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False

    def write(self, writer: Any) -> None:
        """Put it into a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        for name, value in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(value)
        writer.add_add_space_prefix(self.space_prefix)
        if self.template is not None:
            writer.add_chat_template(self.template)


def vocabulary_of(renderer: Renderer, size: int, texts: Sequence[str] = FIXED) -> Vocabulary:
    """The vocabulary of a renderer's tokenizer, for a model with embeddings for `size` tokens.

    texts  texts whose ids llama.cpp must find, too
    Raises LuthierError for a tokenizer whose ids llama.cpp would not find.
    """
    tokenizer = renderer.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise _refused(f"{type(tokenizer).__name__} has no tokenizer.json")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > size:
        raise _refused(f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {size}")
    if raw["model"]["type"] == "BPE" and raw["model"].get("byte_fallback"):
        return _sentencepiece(renderer, raw, size, texts)
    return _byte_level(renderer, raw, size)


def _refused(why: str) -> LuthierError:
    return LuthierError(f"export --to gguf: {why}; use --to hf")


def _byte_level(renderer: Renderer, raw: Mapping[str, Any], size: int) -> Vocabulary:
    if raw["model"]["type"] != "BPE":
        raise _refused(
            f"{raw['model']['type']} tokenizers are not supported, only byte-level BPE and the BPE of SentencePiece"
        )
    pre, change = name_of(raw), raw.get("normalizer")
    if pre is None:
        raise _refused("llama.cpp has no name for how this tokenizer cuts text (pre_tokenizer in tokenizer.json)")
    if change is not None and change["type"] != "NFC":  # which the converter leaves out, too: written text is NFC
        raise _refused(f"llama.cpp does not change text before it cuts it, as this tokenizer does ({change['type']})")
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    tokens, types = _tokens(renderer.tokenizer, size)
    return Vocabulary(
        "gpt2", pre, tokens, types, _ids(renderer), _adds(renderer.tokenizer), _template(renderer), merges
    )


def _sentencepiece(renderer: Renderer, raw: Mapping[str, Any], size: int, texts: Sequence[str]) -> Vocabulary:
    """Pieces are joined by score: the place of the first merge that makes the piece, as in SentencePiece's own files."""
    import gguf

    tokenizer = renderer.tokenizer
    place: dict[str, int] = {}
    for merge in raw["model"]["merges"]:
        place.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), len(place))
    tokens, types = _tokens(tokenizer, size)
    unknown = tokenizer.unk_token_id
    for i, token in enumerate(tokens):
        if types[i] == gguf.TokenType.USER_DEFINED:
            tokens[i] = token.replace(SPACE, " ")
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = gguf.TokenType.BYTE
        elif i == unknown:
            types[i] = gguf.TokenType.UNKNOWN
    scores = [-float(place[t]) if t in place else NEVER for t in tokens]
    whole = {t: i for i, t in enumerate(tokens) if types[i] in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)}
    ids = {t: i for i, t in enumerate(tokens) if types[i] != gguf.TokenType.UNUSED}
    prefix = _space_prefix(tokenizer, ids, scores, whole, texts)
    return Vocabulary(
        "llama", "default", tokens, types, _ids(renderer), _adds(tokenizer), _template(renderer), [], scores, prefix
    )


def _space_prefix(
    tokenizer: Any, ids: Mapping[str, int], scores: Sequence[float], whole: Mapping[str, int], texts: Sequence[str]
) -> bool:
    """Whether llama.cpp must put a space before text. Raises LuthierError if it finds other ids with it and without it."""
    wanted = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    worst = ""
    for prefix in (True, False):
        pieces = Pieces(ids, scores, whole, prefix)
        worst = next((t for t, right in zip(texts, wanted, strict=True) if pieces.encode(t) != right), "")
        if not worst:
            return prefix
    raise _refused(f"llama.cpp would find other token ids than this tokenizer, for example in {worst[:60]!r}")


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """(text, gguf's type) by id. Rows of the embedding without a token are filled up."""
    import gguf

    by_id = {i: t for t, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = list[str](), list[int]()
    for i in range(size):
        tokens.append(by_id.get(i, f"[PAD{i}]"))
        if i not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif i in added:
            types.append(gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    return tokens, types


def _ids(renderer: Renderer) -> dict[str, int]:
    tokenizer = renderer.tokenizer
    found = {n: getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "unk", "pad")}
    others = [i for i in renderer.stop_ids if i != found["eos"]]
    if others and renderer.tokenizer.chat_template is not None:
        found["eot"] = next((i for i in others if tokenizer.convert_ids_to_tokens(i) in tokenizer.chat_template), None)
    return {n: i for n, i in found.items() if i is not None}


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Which special tokens the tokenizer puts around a text. Raises LuthierError for others than its first and last token."""
    inner, outer = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
            if outer == [*before, *inner, *after]:
                return {"bos": bos, "eos": eos}
    raise _refused("this tokenizer puts other tokens than its first and its last around a text")


def _template(renderer: Renderer) -> str | None:
    found = renderer.tokenizer.chat_template
    if found is None or isinstance(found, str):
        return found
    default: str | None = found.get("default")
    return default
