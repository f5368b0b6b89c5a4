"""Passages of a corpus for questions: cut, ranked and joined; the same for every model.

Lengths are counted in words, not in a model's tokens, so that models with different tokenizers get the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from luthier.data.reading import objects_of
from luthier.support.errors import LuthierError, RecipeError


class Chunk(NamedTuple):
    """A piece of one document."""

    doc: str
    text: str

    @property
    def words(self) -> int:
        return len(self.text.split())


class Context(NamedTuple):
    """The context of one question: its text, the documents in it, and the documents that were found (before the cut)."""

    text: str
    docs: tuple[str, ...]
    found: tuple[str, ...]


def documents_of(path: Path) -> list[tuple[str, str]]:
    """(doc_id, text) of a .jsonl file. Raises RecipeError with the line of a document that cannot be used."""
    out: dict[str, str] = {}
    for number, row in objects_of(path):
        name, text = row.get("doc_id"), row.get("text")
        if not isinstance(name, str | int) or not isinstance(text, str):
            raise RecipeError(f"{path}:{number}", "has no doc_id and text", 'write {"doc_id": ..., "text": ...}')
        if str(name) in out:
            raise RecipeError(f"{path}:{number}", f"names the document {str(name)!r} again", "give each its own doc_id")
        out[str(name)] = text
    if not out:
        raise RecipeError(f"retrieval.corpus: {path}", "holds no document", "write one in each line")
    return list(out.items())


def chunked(documents: Sequence[tuple[str, str]], words: int, overlap: int) -> list[Chunk]:
    """Pieces of `words` words, each beginning `overlap` words before the last one's end; never across documents."""
    out = []
    for doc, text in documents:
        whole = text.split()
        starts = range(0, max(1, len(whole) - overlap), words - overlap)
        out += [Chunk(doc, " ".join(whole[i : i + words])) for i in starts]
    return out


def ranked(chunks: Sequence[Chunk], questions: Sequence[str]) -> np.ndarray:
    """[Q, C] chunk numbers, the most similar first: cosine of TF-IDF of words and pairs of words, with 1 + log counts."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.metrics.pairwise import linear_kernel
    except ImportError as error:
        raise LuthierError("retrieval needs scikit-learn: pip install 'luthier[select]'") from error
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    rows = words.fit_transform([c.text for c in chunks])
    similar = linear_kernel(words.transform(questions), rows)
    order: np.ndarray = np.argsort(-similar, axis=1, kind="stable")
    return order


class Corpus:
    """A corpus that is cut into chunks and can be searched.

    Raises LuthierError if there are fewer chunks than top_k, or if a context has no room for one.
    """

    def __init__(self, documents: Sequence[tuple[str, str]], words: int, overlap: int, top_k: int, room: int) -> None:
        self.chunks = chunked(documents, words, overlap)
        self.docs = frozenset(doc for doc, _ in documents)
        self.top_k, self.room = top_k, room
        longest = max(c.words for c in self.chunks)
        if top_k > len(self.chunks):
            raise LuthierError(f"retrieval.top_k: {top_k} of {len(self.chunks)} chunks; lower it")
        if room < longest:
            raise LuthierError(f"retrieval.context_words: {room} has no room for a chunk of {longest} words; raise it")

    def contexts(
        self, questions: Sequence[str], gold: Sequence[Sequence[str]], conditions: Sequence[str]
    ) -> dict[str, list[Context]]:
        """For each condition, the context of each question. Chunks are ranked once.

        conditions  "retrieved": the most similar chunks; "oracle": those of the gold documents, then similar ones;
                    "adversarial": similar ones of other documents; "closed": none
        """
        order = [[int(i) for i in o] for o in ranked(self.chunks, questions)]
        return {c: [self._context(o, set(g), c) for o, g in zip(order, gold, strict=True)] for c in conditions}

    def _context(self, order: list[int], gold: set[str], condition: str) -> Context:
        right = [i for i in order if self.chunks[i].doc in gold]
        other = [i for i in order if self.chunks[i].doc not in gold]
        shown = {"retrieved": order, "oracle": [*right, *other], "adversarial": other, "closed": []}
        wanted = shown[condition][: self.top_k]
        taken, left = [], self.room
        for i in wanted:  # a chunk that does not fit is left out, with all later ones
            if self.chunks[i].words > left:
                break
            taken.append(i)
            left -= self.chunks[i].words
        taken.sort(key=order.index)
        text = "\n\n".join(f"[{self.chunks[i].doc}] {self.chunks[i].text}" for i in taken)
        return Context(text, _docs(self.chunks, taken), _docs(self.chunks, wanted))


def _docs(chunks: Sequence[Chunk], numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(chunks[i].doc for i in numbers))


def gold_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The documents that hold a row's answer: its column `gold`, one id or a list; () without the column."""
    gold = row.get("gold")
    if gold is None:
        return ()
    return tuple(str(g) for g in gold) if isinstance(gold, list | tuple) else (str(gold),)
