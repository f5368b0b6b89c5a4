"""What a tokenizer does at the edges of a text: tokens around it, a space before it, tokens that end it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from luthier.support.cache import key_of

FRONTS = ("\n", "\t", ".", "0")  # stand before a text when it is tokenised as text that follows other text
PROBES = ("a", "the", "1", ".")  # short texts; a vocabulary has a token for one of them
KNOWN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>")


class _Near(NamedTuple):
    """A cut in a text: where the last added token before it stands, as a character and in ids, and where the cut is in ids."""

    number: int
    cut: int
    start: int
    first: int
    end: int


class Tokens:
    """A tokenizer, asked for ids of bare texts.

    first, last  ids that `tokenizer(text)` puts before and after those of the text: BOS by its post-processor, [CLS] and [SEP]
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without special tokens around them. One call for many texts: fast tokenizers work in threads."""
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []

    def fronts(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """For each text, the ids of the text up to each of its cuts, which are in order and end with its length.

        They are those of each such text by itself. Added tokens split a text, so what stands before one changes nothing after it:
        up to a cut, only the text from the last added token on is tokenised again, and compared.
        """
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False)
        wholes = encoded["input_ids"]
        near = self._near(encoded, texts, cuts) if encoded.is_fast else {}
        again = self.bare([texts[n][start:cut] for n, cut, start, _, _ in near.values()])
        found = {
            place: wholes[n][:end]
            for (place, (n, _, _, first, end)), ids in zip(near.items(), again, strict=True)
            if wholes[n][first:end] == ids
        }
        left = [(n, c) for n, row in enumerate(cuts) for c in row[:-1] if (n, c) not in found]
        found |= zip(left, self.bare([texts[n][:c] for n, c in left]), strict=True)
        return [[*(found[n, c] for c in row[:-1]), list(wholes[n])] for n, row in enumerate(cuts)]

    def _near(self, encoded: Any, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> dict[tuple[int, int], _Near]:
        """For each (number of the text, cut) after an added token: where this token stands and where the cut is, in ids."""
        (pattern, added), out = self._added, {}
        for n, (text, row) in enumerate(zip(texts, cuts, strict=True)):
            starts = [m.start() for m in pattern.finditer(text)] if pattern is not None else []
            for cut in row[:-1]:
                at = bisect_left(starts, cut) - 1
                if at < 0:
                    continue
                first, end = encoded.char_to_token(n, starts[at]), encoded.char_to_token(n, cut)
                if first is not None and end is not None and encoded["input_ids"][n][first] in added:
                    out[n, cut] = _Near(n, cut, starts[at], first, end)
        return out

    @cached_property
    def _added(self) -> tuple[re.Pattern[str] | None, frozenset[int]]:
        """A pattern of the added tokens, and their ids."""
        words = self.tokenizer.get_added_vocab()
        pattern = "|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True)))
        return (re.compile(pattern) if pattern else None), frozenset(words.values())

    @cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for text in PROBES:
            bare, full = self.bare([text])[0], list(self.tokenizer(text)["input_ids"])
            for i in range(len(full) - len(bare) + 1 if bare else 0):
                if full[i : i + len(bare)] == bare:
                    return tuple(full[:i]), tuple(full[i + len(bare) :])
        return (), ()

    @cached_property
    def size(self) -> int:
        """The number of tokens; a model may have scores for more."""
        return len(self.tokenizer)

    @property
    def first(self) -> tuple[int, ...]:
        return self.frame[0]

    @property
    def last(self) -> tuple[int, ...]:
        return self.frame[1]

    @cached_property
    def _fronts(self) -> list[tuple[str, list[int]]]:
        return list(zip(FRONTS, self.bare(FRONTS), strict=True))

    @cached_property
    def leads(self) -> bool:
        """True if a text by itself gets a space before it, as SentencePiece does; the same text within a text gets none."""
        alone = self.bare(["a"])[0]
        return all(self.bare([f"{front}a"])[0] != [*ids, *alone] for front, ids in self._fronts)

    def following(self, text: str) -> list[int]:
        """Ids of a text that stands after other text."""
        if self.leads:
            for front, ids in self._fronts:
                within = self.bare([front + text])[0]
                if within[: len(ids)] == ids:  # no token holds the front and the text
                    return within[len(ids) :]
        return self.bare([text])[0]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of tokens that stand for no text: the named ones, and all that were added as special."""
    return {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}


def not_embedded(tokenizer: Any, token: int, size: int) -> tuple[str, str]:
    """(what is wrong, what to do) for a token that a model with this many embeddings has none for."""
    return (
        f"token {tokenizer.convert_ids_to_tokens(token)!r} has id {token}, and the model embeds {size} tokens",
        "use the model's own tokenizer, or enlarge the model with resize_token_embeddings and save it",
    )


def stop_ids(tokenizer: Any, given: Sequence[int] = (), tail: str = "") -> tuple[int, ...]:
    """Tokens that end a turn: the end of text, those of the model's generation settings, and the marker of its template.

    given  of the generation settings
    tail   what the chat template writes after an answer
    """
    vocabulary = tokenizer.get_vocab()
    # A model that names its ends may write <|end|> within an answer, after the message of another channel.
    found = {vocabulary[t] for t in KNOWN_ENDS if t in vocabulary and not (given and t == "<|end|>")}
    found |= {i for i in given if 0 <= i < len(tokenizer)}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    special = special_ids(tokenizer)
    texts = ((t, i) for t, i in tokenizer.get_added_vocab().items() if i in special and t in tail)
    ends = sorted((tail.index(t), -len(t), i) for t, i in texts)
    return tuple(sorted(found | {i for _, _, i in ends[:1]}))


def tokenizer_key(tokenizer: Any) -> str:
    """A key that changes with everything that decides a tokenizer's ids and its template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        made = backend.to_str()
    else:  # written in Python: its vocabulary, its class and the settings that it was made with
        model = getattr(tokenizer, "sp_model", None)
        made = key_of(
            type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items()), sorted(map(repr, tokenizer.init_kwargs.items())),
            b"" if model is None else model.serialized_model_proto(),
        )  # fmt: skip
    added = sorted((i, repr(t)) for i, t in tokenizer.added_tokens_decoder.items())
    return key_of(made, added, tokenizer.chat_template, str(tokenizer.special_tokens_map))
