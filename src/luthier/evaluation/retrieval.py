"""The release gate for retrieval: does a tuned model still find and combine what is in its passages?"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from luthier.data.store import Row
from luthier.evaluation.base import Answering, Exam, Gate, Question, Results
from luthier.evaluation.contexts import Context, Corpus, documents_of, gold_of
from luthier.evaluation.measures import Measure, ratio
from luthier.evaluation.text import normalised, token_f1
from luthier.method import Facts, Problem, Source, Traits
from luthier.step.lab import Completion
from luthier.support.cache import content_of
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams
from luthier.support.statistics import Estimate, estimate

Condition = Literal["retrieved", "oracle", "closed", "adversarial"]
COVERED = 0.6  # share of a key point's content words
RIGHT = 0.5  # from this F1 on, a reply is not wrong
NOT_EXTRACTED = 0.3  # below this F1, the reply contains nothing of the answer
FEWEST = 50  # with fewer questions, the gate is inconclusive
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_COMMON = "the a an of to in on at by for with and or not is are was were be been has have had it its this that as from"
_STOP = frozenset(_COMMON.split())

# --- scores of one reply ---


def content_words(text: str) -> set[str]:
    """Its normalised words without the most common ones; all of them if there are no others."""
    words = set(normalised(text).split())
    return words - _STOP or words


def recall(wanted: str, text: str) -> float:
    """Share of the wanted text's content words that occur in the other."""
    words = content_words(wanted)
    return len(words & set(normalised(text).split())) / len(words) if words else 0.0


def completeness(reply: str, reference: str) -> float:
    """Share of the reference's key points (sentences, or items on lines of their own) that the reply covers."""
    points = [p for p in _SENTENCE.split(reference) if normalised(p)]
    return sum(recall(p, reply) >= COVERED for p in points) / len(points) if points else 0.0


def groundedness(reply: str, context: str) -> float:
    """Share of the reply's sentences whose content words occur in the context; 0 for an empty reply."""
    sentences = [s for s in _SENTENCE.split(reply) if normalised(s)]
    return sum(recall(s, context) >= COVERED for s in sentences) / len(sentences) if sentences else 0.0


def not_shown(context: Context, gold: Sequence[str], corpus: Collection[str]) -> int:
    """Why the gold document is not in a context: 1 not in the corpus, 2 not found, 3 found but cut; else 0."""
    if not gold or set(gold) & set(context.docs):
        return 0
    if not set(gold) & set(corpus):
        return 1
    return 3 if set(gold) & set(context.found) else 2


def failure(reply: str, references: Sequence[str], form: str | None = None) -> int:
    """What is wrong with a reply whose context has the answer: 4 nothing of the answer, 5 not of the required form (a regular
    expression), 6 the answer among many other words, 7 only some of its key points; 0 for a right reply.
    """
    if form and not re.fullmatch(form, reply.strip()):
        return 5
    f1 = max(token_f1(reply, r) for r in references)
    if f1 >= RIGHT:
        return 0
    whole = max(completeness(reply, r) for r in references)
    if whole == 1.0:
        return 6
    return 4 if f1 < NOT_EXTRACTED or whole == 0.0 else 7


# --- the gate ---


def gate(difference: Estimate, delta: float, questions: float) -> str:
    """The outcome: "fail" if the whole interval is below -delta, "pass" if it is above, else "inconclusive"."""
    if questions < FEWEST:
        return "inconclusive"
    if difference.high < -delta:
        return "fail"
    return "pass" if difference.low > -delta else "inconclusive"


def needed(values: np.ndarray, delta: float) -> int:
    """The number of paired differences [N] that is needed to see delta with a probability of 80%."""
    return int(np.ceil((1.96 + 0.84) ** 2 * values.var(ddof=1) / delta**2)) if len(values) > 1 else 0


class Retrieval(Answering):
    """Answers from retrieved passages, and a gate: may the tuned model replace the base model there?

    Each question of data.eval (with `gold`, the ids of documents that hold its answer) is asked with the passages that
    TF-IDF finds, with the right passages, with none, and with only wrong ones, where the right reply is a refusal.
    Passages are the same for every model. Accuracy is the F1 of words against the reference. Completeness is the share of
    the reference's sentences that the reply covers. No judge model is used. Wrong replies are sorted into failure points;
    only those from 4 on (not extracted, format, specificity, incomplete) can come from the model. The gate fails if
    accuracy or completeness with retrieved passages fell by more than `delta`, and passes if such a fall is ruled out,
    with the paired t interval over documents. (The source's protocol is not published; the sheet uses a bootstrap, which
    agrees.) If a model is tuned on questions without passages and then asked with passages, the formats differ; a fall
    then does not prove that tuning does harm. `training_rows` makes rows in the deployed form, for a model whose format matches.
    Lengths are in words instead of tokens, so that the tokenizer does not change the passages.
    Cost: one answer for each question and condition; prompts of up to context_words words.
    """

    packages: ClassVar[Mapping[str, str]] = {"sklearn": "select"}
    paths: ClassVar[tuple[str, ...]] = ("corpus",)
    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "Fine-Tuning or Fine-Failing? Debunking Performance Myths in Large Language Models", 2024, "arXiv:2406.11201"
    )

    corpus: str = Field(examples=["passages.jsonl"])
    """A .jsonl file of {"doc_id": ..., "text": ...}; the path is relative to the recipe's folder."""
    rows: int = Field(200, ge=1)
    """Number of distinct questions of data.eval, from the first; fewer than 50 are always inconclusive."""
    conditions: tuple[Condition, ...] = ("retrieved", "oracle", "closed", "adversarial")
    """Which passages are in the prompt: retrieved ones, the right ones, none, only wrong ones."""
    top_k: int = Field(5, ge=1)
    """Number of passages that are retrieved."""
    chunk_words: int = Field(200, ge=8)
    """Words of a passage."""
    overlap_words: int = Field(25, ge=0)
    """Words that a passage shares with the one before."""
    context_words: int = Field(1200, ge=8)
    """Words of all passages together; the rest is cut."""
    prompt: str = "Answer from these passages. If the answer is not there, reply: {refusal}\n\n{context}\n\n{question}"
    """Template of a question with passages; it must contain {context} and {question}."""
    refusal: str = "Not in the text."
    """The right reply if the passages do not hold the answer."""
    form: str | None = None
    """A regular expression that replies must match; others count as failure point 5."""
    delta: float = Field(0.02, gt=0)
    """Largest fall that the gate accepts."""
    allow_shared_documents: bool = False
    """Allow questions about documents that training rows come from."""

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        named = set(re.findall(r"\{(\w*)\}", self.prompt))
        if not {"context", "question"} <= named:
            problems.append(Problem("prompt", "lacks {context} or {question}", "write both"))
        if unknown := named - {"context", "question", "refusal"}:
            what = f"names {{{min(unknown)}}}, which luthier does not fill in"
            problems.append(Problem("prompt", what, "use {context}, {question} and {refusal}"))
        if self.form is not None and (wrong := _wrong_form(self.form)):
            problems.append(Problem("form", f"{self.form!r} is not a regular expression ({wrong})", "correct it"))
        if self.overlap_words >= self.chunk_words:
            what = f"{self.overlap_words} leaves nothing new in passages of {self.chunk_words}"
            problems.append(Problem("overlap_words", what, "lower it"))
        if not Path(self.corpus).is_file():
            problems.append(
                Problem("corpus", f"there is no file {self.corpus}", "the path is relative to the recipe's folder")
            )
        return problems

    def content(self) -> str:
        return super().content() + content_of(Path(self.corpus))

    def check_rows(self, train: Sequence[Row], held: Sequence[Row]) -> None:
        """Raises RecipeError for a question without gold, or with a document that training rows come from."""
        self._gold(held)
        known = {g for r in train for g in gold_of(r.values)}
        shared = sorted({g for r in held for g in gold_of(r.values)} & known)
        if shared and not self.allow_shared_documents:
            shown = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
            what = f"{len(shared)} documents have questions both in data.train and in data.eval: {shown}"
            raise RecipeError("evaluate.retrieval", what, "split by document, or set allow_shared_documents: true")

    def names(self) -> tuple[str, ...]:
        out: list[str] = []
        for c in self.conditions:
            out += [f"{c}_refusal"] if c == "adversarial" else [f"{c}_accuracy", f"{c}_completeness"]
            out += {"oracle": ["oracle_refusal"], "retrieved": ["retrieved_grounded"]}.get(c, [])
        return (*out, *(f"failure_{n}" for n in range(1, 8) if "retrieved" in self.conditions))

    def documents(self) -> Corpus:
        """The corpus, cut into passages."""
        documents = documents_of(Path(self.corpus))
        return Corpus(documents, self.chunk_words, self.overlap_words, self.top_k, self.context_words)

    def evaluate(self, exam: Exam) -> list[Measure]:
        questions, corpus = exam.questions(self.rows), self.documents()
        gold = self._gold([q.row for q in questions])
        shown = corpus.contexts([q.prompt for q in questions], gold, self.conditions)
        out: list[Measure] = []
        for condition, contexts in shown.items():
            replies = [r.text for r in self._replies(exam, questions, contexts, condition)]
            out += self._measures(condition, questions, contexts, gold, replies)
            if condition == "retrieved" and all(gold):
                points = [not_shown(c, g, corpus.docs) for c, g in zip(contexts, gold, strict=True)]
                out += self._failures(questions, replies, points, gold)
        return out

    def _gold(self, rows: Sequence[Row]) -> list[tuple[str, ...]]:
        gold = [gold_of(r.values) for r in rows]
        if not all(gold) and {"oracle", "adversarial"} & set(self.conditions):
            first = next(r.key for r, g in zip(rows, gold, strict=True) if not g)
            raise RecipeError(first, "has no gold, the ids of documents that hold its answer",
                              "add the column, or set retrieval.conditions: [retrieved, closed]")  # fmt: skip
        return gold

    def _failures(
        self,
        questions: Sequence[Question],
        replies: Sequence[str],
        points: Sequence[int],
        gold: Sequence[Sequence[str]],
    ) -> list[Measure]:
        """Shares of questions by failure point; 1 to 3 come from the retriever and are equal for every model."""
        whole = [p or failure(a, q.references, self.form) for p, q, a in zip(points, questions, replies, strict=True)]
        clusters, share = [",".join(g) for g in gold], "share of questions"
        return [
            summed(f"failure_{n}", [float(p == n) for p in whole], clusters, higher=False, unit=share)
            for n in range(1, 8)
        ]

    def _replies(
        self, exam: Exam, questions: Sequence[Question], contexts: Sequence[Context], condition: str
    ) -> list[Completion]:
        asked = [self.asked(q.prompt, c.text) for q, c in zip(questions, contexts, strict=True)]
        rows = [{"prompt": text, "completion": q.references[0]} for q, text in zip(questions, asked, strict=True)]
        replies = [r.up_to(self.stop) for r in exam.replies(rows, self.max_new_tokens)]
        for q, text, reply in zip(questions, asked, replies, strict=True):
            key = q.key if condition == "retrieved" else f"{q.key}:{condition}"
            exam.asked.setdefault(key, (q._replace(key=key, prompt=text), reply))
        return replies

    def asked(self, question: str, context: str) -> str:
        """The text of the question, with passages or without."""
        if not context:
            return question
        return self.prompt.format(context=context, question=question, refusal=self.refusal)

    def _measures(
        self, condition: str, questions: Sequence[Question], contexts: Sequence[Context], gold: Sequence[Sequence[str]],
        replies: Sequence[str],
    ) -> list[Measure]:  # fmt: skip
        clusters = [",".join(g) or q.key for q, g in zip(questions, gold, strict=True)]
        share = "share of questions"

        def by_document(name: str, values: Sequence[float], **more: Any) -> Measure:
            return summed(f"{condition}_{name}", values, clusters, **more)

        def best(score: Callable[[str, str], float]) -> list[float]:
            return [max(score(a, r) for r in q.references) for q, a in zip(questions, replies, strict=True)]

        refused = [float(normalised(self.refusal) in normalised(a)) for a in replies]
        if condition == "adversarial":
            return [by_document("refusal", refused, unit=share)]
        out = [by_document("accuracy", best(token_f1)), by_document("completeness", best(completeness))]
        if condition == "oracle":
            out.append(by_document("refusal", refused, higher=False, unit=share))
        if condition == "retrieved":
            grounded = [groundedness(a, c.text) for a, c in zip(replies, contexts, strict=True)]
            out.append(by_document("grounded", grounded))
        return out

    def gates(self, before: Results, after: Sequence[Results]) -> list[Gate]:
        if "retrieved" not in self.conditions:
            return []
        return [self._gate(f"retrieved_{n}", before, after) for n in ("accuracy", "completeness")]

    def _gate(self, name: str, before: Results, after: Sequence[Results]) -> Gate:
        base = before.measures[name]
        # [seeds, documents]
        values = np.array([r.measures[name].pseudo_values() - base.pseudo_values() for r in after])
        fall, asked = estimate(values), float(base.stats[:, 1].sum())
        return Gate(name, fall, self.delta, gate(fall, self.delta, asked), needed(values.mean(0), self.delta))

    def training_rows(
        self, rows: Sequence[dict[str, Any]], refusals: float = 0.0, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Rows (prompt, completion, gold) with retrieved passages in the prompt, in the deployed form.

        refusals  share of rows with passages that lack the answer; their completion is the refusal
        """
        corpus, drawn = self.documents(), Streams(seed).at("refusals").random(len(rows)) < refusals
        texts, gold = [r["prompt"] for r in rows], [gold_of(r) for r in rows]
        right, wrong = corpus.contexts(texts, gold, ("retrieved", "adversarial")).values()
        return [
            {**r, "prompt": self.asked(r["prompt"], (w if bad else c).text),
             "completion": self.refusal if bad else r["completion"]}
            for r, c, w, bad in zip(rows, right, wrong, drawn, strict=True)
        ]  # fmt: skip


def _wrong_form(form: str) -> str | None:
    try:
        re.compile(form)
    except re.error as error:
        return str(error)
    return None


def summed(name: str, values: Sequence[float], clusters: Sequence[str], **more: Any) -> Measure:
    """A mean over questions. The unit of chance is the document: its questions are not independent."""
    keys = tuple(dict.fromkeys(clusters))
    above, below = dict.fromkeys(keys, 0.0), dict.fromkeys(keys, 0.0)
    for key, value in zip(clusters, values, strict=True):
        above[key] += value
        below[key] += 1
    return ratio(name, [above[k] for k in keys], [below[k] for k in keys], keys, **more)
