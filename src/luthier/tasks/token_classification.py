"""Token classification: a tag for each word of a text, such as the name of an entity or a part of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoModelForTokenClassification, PreTrainedConfig

from luthier.data.batch import IGNORE, collate
from luthier.data.prepare import RowMaker
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.method import Facts, Problem, Source, Traits
from luthier.model.view import ModelView, evaluating
from luthier.step.forward import Forward
from luthier.step.lab import Lab, RowScore
from luthier.support.errors import RecipeError
from luthier.tasks.base import Rendered, Shown, Task, in_models_order, refuse_one_class, token_guesses, told_head
from luthier.tasks.class_rows import cut_ends, item_of, spans_of


class TokenClassification(Task):
    """Choose a tag for each word of a text with a new head, which any tuner trains as well: names in texts, parts of speech.

    Rows hold words and as many tags: in two lists, or one word a line in a CoNLL file. The first token of a word has its
    tag; the others have none, as is usual with transformers (`is_split_into_words`). The head is that of transformers' class
    ForTokenClassification, of encoders and of decoders. The names of tags are stored where transformers stores them (id2label),
    in the model's order if it has these names already, else in that of `tags`, else alphabetically.
    If a row is too long, its end is cut, and the words that are cut off have no tag.
    Cost: that of the model; the head is a matrix with a row for each tag.
    Refuses: tokenizers that do not say which word a token belongs to (those without a fast form), models without such a class,
    rows with another number of tags than of words, numbers without names, tags of held-out rows that no training row has.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"token-classification"}))
    source: ClassVar[Source] = Source(
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018, "arXiv:1810.04805",
        "section 5.3",
    )  # fmt: skip

    tags: tuple[str, ...] | None = Field(None, examples=[["O", "B-PER", "I-PER"]])
    """Names of the tags, in the order of their numbers; null: the rows hold names, or their file says them."""

    always: ClassVar[tuple[str, ...]] = ("loss", "tagging")
    unit: ClassVar[str] = "nats a word"
    shows_rows: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "token-classification"
    starter: ClassVar[Mapping[str, str]] = {
        "model": "google-bert/bert-base-cased",
        "task": "token-classification",
        "data": "{train: train.conll, eval: test.conll}  # a word and its tag on each line",
    }

    @field_validator("tags")
    @classmethod
    def _names(cls, tags: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if tags is not None and (len(tags) < 2 or len(set(tags)) < len(tags)):
            raise ValueError("give at least two tags, and each of them once")
        return tags

    @property
    def shapes(self) -> tuple[str, ...]:
        return ("words and tags",)

    @property
    def untuned_answers(self) -> bool:
        return False

    def auto(self, config: PreTrainedConfig) -> Any:
        return AutoModelForTokenClassification

    def check(self, facts: Facts) -> list[Problem]:
        problems, config = super().check(facts), facts.model_config
        if config is None or type(config) in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
            return problems
        if AutoModelForTokenClassification.__name__ not in (getattr(config, "auto_map", None) or {}):
            what = f"transformers has no class of {config.model_type} models that classifies tokens"
            problems.append(Problem("model", what, "choose another one, such as BERT, DeBERTa or Llama"))
        return problems

    def labels(self, rows: Sequence[Row], held: Sequence[Row] | None, known: Mapping[str, int]) -> dict[str | int, int]:
        """Class index by tag: in the model's order if it knows these names, else in that of `tags`, else alphabetically."""
        seen = self._seen(rows)
        names = in_models_order(list(self.tags) if self.tags else sorted(seen), known)
        refuse_one_class(names)
        for tag, key in self._seen(held or ()).items():
            if tag not in names:
                raise RecipeError(key, f"tag {tag!r} occurs in no training row", "correct the tag or drop the row")
        return {n: i for i, n in enumerate(names)}

    def _seen(self, rows: Sequence[Row]) -> dict[str, str]:
        """The names of all tags of these rows, each with the key of the first row that has it. Raises RecipeError as `name`."""
        first = dict[str | int, Row]()
        for r in rows:
            for tag in r.values["tags"]:
                first.setdefault(tag, r)
        return {self.name(r, tag): r.key for tag, r in first.items()}

    def name(self, row: Row, tag: str | int) -> str:
        """The name of a tag of this row. Raises RecipeError for a number without one, and for a name that is not in `tags`."""
        names, key = self.tags, "task.token-classification.tags"
        if isinstance(tag, str):
            if names is None or tag in names:
                return tag
            raise RecipeError(row.key, f"has the tag {tag!r}, which {key} does not name", "add it, or correct the row")
        if names is None:
            raise RecipeError(row.key, f"has the tag {tag}, a number without a name", f"name them in order: {key}")
        if 0 <= tag < len(names):
            return names[tag]
        raise RecipeError(row.key, f"has the tag {tag}, and {key} names {len(names)}, from 0 on", "correct one of them")

    def head(self, rows: Sequence[Row], names: Sequence[str], config: PreTrainedConfig) -> str:
        return told_head(self.auto(config), config, names, self._seen(rows).keys())

    def maker(
        self, renderer: Renderer, config: PreTrainedConfig, labels: Mapping[str | int, int], labelled: bool = True
    ) -> RowMaker:
        if not renderer.tokenizer.is_fast:
            what = f"its tokenizer ({type(renderer.tokenizer).__name__}) does not say which word a token belongs to"
            raise RecipeError("model", what, "choose a model whose tokenizer has a fast form")
        return TagRows(self, labels if labelled else {}, getattr(config, "type_vocab_size", None))

    def scores(self, fwd: Forward) -> list[RowScore]:
        return token_guesses(fwd)

    def asked(self, row: Row, renderer: Renderer) -> tuple[str, str]:
        return " ".join(row.values["tokens"]), " ".join(self.name(row, t) for t in row.values["tags"])

    def spelt(self, tokenizer: Any, row: Rendered, names: Sequence[str]) -> list[str]:
        """Each token's text, and the tag of a word after its first token."""
        told = ((tokenizer.decode([i]), tag) for i, tag in zip(row["ids"], row["targets"], strict=True))
        return [text if tag == IGNORE else f"{text}/{names[tag]}" for text, tag in told]

    def shown(self, row: Row, seen: Rendered, score: RowScore, view: ModelView, renderer: Renderer) -> Shown:
        """The tags of the words that were scored; a word that was cut off was not."""
        names = view.classes
        wanted, answer = (" ".join(names[i] for i in part) for part in (score.wanted, score.best))
        return Shown(self.asked(row, renderer)[0], wanted, answer)

    @torch.no_grad()
    def replies(self, view: ModelView, lab: Lab, prompts: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
        """The tags of a text's words, which white space divides, with the model's probability of each.

        A word that has no token for the model has no tag, and is left out.
        """
        maker, out = TagRows(self, {}), list[dict[str, Any]]()
        for prompt in prompts:
            words = prompt.split()
            items = maker.made([Row("prompt", {"tokens": words})], lab.renderer) if words else []
            places = [at for item in items for at in item["words_at"]]
            tags, shares = list[str](), list[float]()
            if any(at is not None for at in places):
                firsts = torch.tensor([at for at in places if at is not None], device=view.device)
                with evaluating(view.module):
                    found = Forward(collate(items).to(view.device), view).logits(firsts).softmax(-1)  # [n, C]
                top, best = found.max(-1)
                tags, shares = [view.classes[i] for i in best.tolist()], top.tolist()
            kept = [w for w, at in zip(words, places, strict=True) if at is not None]
            out.append({"answer": " ".join(tags), "words": kept, "tags": tags, "shares": shares})
        return out


@dataclass(frozen=True)
class TagRows:
    """Training rows of words with their tags: `targets` holds the class of each word at its first token.

    labels     class by tag; empty for rows without tags, whose targets are not read
    num_types  the number of token types that the model embeds; None or 0: it does not say, or embeds none
    """

    task: TokenClassification
    labels: Mapping[str | int, int]
    num_types: int | None = None
    answers: ClassVar[bool] = False

    @property
    def key(self) -> str:
        return f"tags {self.task.tags} {sorted(self.labels.items(), key=str)} {self.num_types}"

    def made(self, rows: Sequence[Row], renderer: Renderer) -> list[dict[str, Any]]:
        """Besides what `collate` takes, "words_at" has the first token of each word, None for a word without tokens."""
        tokenizer, lead = renderer.tokenizer, lead_of(renderer.tokenizer)
        texts = [[lead + word for word in r.values["tokens"]] for r in rows]
        found = tokenizer(texts, is_split_into_words=True) if rows else {}
        return [self._made(row, found, i) for i, row in enumerate(rows)]

    def _made(self, row: Row, found: Any, at: int) -> dict[str, Any]:
        item = item_of(row, found, at, self.num_types)
        words, firsts = found.word_ids(at), dict[int, int]()
        for place, word in enumerate(words):
            if word is not None:
                firsts.setdefault(word, place)
        targets = [IGNORE] * len(words)
        for word, place in firsts.items() if self.labels else ():
            targets[place] = self._class(row, row.values["tags"][word])
        places = [firsts.get(word) for word in range(len(row.values["tokens"]))]
        return {**item, "targets": targets, "words_at": places, "texts_at": spans_of(found.sequence_ids(at), 1)}

    def _class(self, row: Row, tag: str | int) -> int:
        name = self.task.name(row, tag)
        if name not in self.labels:
            raise RecipeError(row.key, f"has the tag {name!r}, which the model does not know", "correct the row")
        return self.labels[name]

    def supervised(self, item: Mapping[str, Any]) -> int:
        """The number of words that have a token."""
        return sum(y != IGNORE for y in item["targets"])

    def shortened(self, item: dict[str, Any], limit: int, how: str) -> dict[str, Any]:
        return cut_ends(item, limit)


def lead_of(tokenizer: Any) -> str:
    """What stands before a word, so that its tokens are those of a word within a text: nothing, or a space.

    Tokenizers of bytes mark a word by the space before it. They need `add_prefix_space=True` for words, which does the same.
    """
    for lead in ("", " "):
        whole = tokenizer(f"{lead}a a", add_special_tokens=False)["input_ids"]
        words = tokenizer([f"{lead}a", f"{lead}a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
        if words == whole:
            return lead
    return ""
