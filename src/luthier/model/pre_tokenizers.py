"""How byte-level BPE cuts text before it merges: the rules of a tokenizer, and the names that llama.cpp gives them.

llama.cpp's converter finds the name by a hash of the ids of one text. The ids depend on the vocabulary, so it knows only the
vocabularies in its list. luthier compares the rules themselves, so that a new vocabulary is known too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARK = r"[^\r\n\p{L}\p{N}]?"

DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_MARK}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|{_MARK}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
QWEN35 = rf"{_CONTRACTIONS}|{_MARK}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
TEKKEN = (
    rf"{_MARK}{_UPPER}*{_LOWER}+|{_MARK}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)  # fmt: skip
GPT4O = (
    rf"{_MARK}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_MARK}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)


class Rules(NamedTuple):
    """How text is cut.

    cuts   regular expressions: each cuts the pieces that the one before it left
    whole  a piece that is in the vocabulary is one token, whatever the merges say
    """

    cuts: tuple[str, ...]
    whole: bool = False


# llama.cpp's names; the first name of a rule is the one that is written.
NAMES: dict[str, Rules] = {
    "gpt-2": Rules((GPT2,)),
    "smollm": Rules((DIGIT, GPT2)),
    "llama-bpe": Rules((LLAMA3,), whole=True),
    "smaug-bpe": Rules((LLAMA3,)),
    "qwen2": Rules((QWEN2,)),
    "qwen35": Rules((QWEN35,)),
    "tekken": Rules((TEKKEN,), whole=True),
    "gpt-4o": Rules((GPT4O,)),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "exaone4", "gigachat"), Rules((GPT2,))),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), Rules((DIGIT, GPT2))),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), Rules((LLAMA3,), True)),
    "dbrx": Rules((LLAMA3,)),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan"), Rules((QWEN2,))),
    **dict.fromkeys(("llama4", "kanana2", "minimax-m2"), Rules((GPT4O,))),
}  # fmt: skip


def name_of(raw: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the rules of a tokenizer; None if it has none.

    raw  the contents of its tokenizer.json
    """
    rules = rules_of(raw)
    return next((name for name, known in NAMES.items() if known == rules), None)


def rules_of(raw: Mapping[str, Any]) -> Rules | None:
    """The rules of a byte-level BPE tokenizer; None if it cuts text in another way than by regular expressions."""
    if raw["model"]["type"] != "BPE" or not raw.get("pre_tokenizer"):
        return None
    outer = raw["pre_tokenizer"]
    *steps, last = outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    cuts = [_cut(step) for step in steps]
    cuts += [GPT2] if last.get("use_regex", True) else []
    if None in cuts:
        return None
    return Rules(tuple(c for c in cuts if c is not None), bool(raw["model"].get("ignore_merges")))


def _cut(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "Digits" and step.get("individual_digits"):
        return DIGIT
    # What does not match is a piece, too. The expressions above match everything, so "removed, inverted" says the same.
    isolated = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    if step["type"] == "Split" and isolated:
        found: str | None = step["pattern"].get("Regex")
        return found
    return None


def cut_as(backend: Any, name: str) -> bool:
    """Make a tokenizer (of the library tokenizers) cut text by the rules of this name. Returns False for an unknown name."""
    from tokenizers import Regex, pre_tokenizers

    if name not in NAMES:
        return False
    rules, steps = NAMES[name], list[Any]()
    for cut in rules.cuts:
        if cut == DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif cut != GPT2:
            steps.append(pre_tokenizers.Split(Regex(cut), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in rules.cuts))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = rules.whole
    return True
