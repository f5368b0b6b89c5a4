"""Tasks of EleutherAI's lm-eval, with luthier's own scoring and the run's own template."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from luthier.data.rendering import Segment
from luthier.evaluation.base import Evaluator, Exam
from luthier.evaluation.measures import Measure, mean
from luthier.method import Facts, Problem, Source, Traits
from luthier.method.building import closest
from luthier.support.cache import cache_folder, key_of
from luthier.support.errors import LuthierError, RecipeError
from luthier.support.files import write_text


class LmEval(Evaluator):
    """Tasks of lm-eval by name, scored by luthier: flat batches, the head on answers only, the run's template.

    Prompt and answer are tokenised separately, as in training. So the numbers can differ in the last digits from lm-eval's own
    Hugging Face model, which tokenises them together and pads. Values of single rows are kept; a group's measure is over
    the rows of all its tasks. Tasks load their data from the Hub. Tasks in your own folder may contain Python code, which
    needs --allow-code. Tasks that run generated programs are refused: use pass-at-k.
    Cost: one scored row for each choice of a question, or one generated answer.
    """

    traits: ClassVar[Traits] = Traits(tasks=frozenset({"causal-lm"}))
    source: ClassVar[Source] = Source(
        "The Language Model Evaluation Harness", 2024, "https://github.com/EleutherAI/lm-evaluation-harness"
    )
    own_rows: ClassVar[bool] = True

    packages: ClassVar[Mapping[str, str]] = {"lm_eval": "lm-eval"}
    paths: ClassVar[tuple[str, ...]] = ("folder",)
    tasks: tuple[str, ...] = Field(min_length=1, examples=[["hellaswag"]])
    """Names of tasks or groups."""
    metrics: tuple[str, ...] = ("acc", "acc_norm", "exact_match")
    """Metrics to report, if a task has them."""
    num_fewshot: int | None = Field(None, ge=0)
    """Worked examples before each question; null: as in the task."""
    limit: int | None = Field(None, ge=1)
    """Number of questions of each task, from the first; null: all."""
    folder: str | None = None
    """A folder with your own tasks (.yaml), relative to the recipe's folder; needs --allow-code."""

    def names(self) -> tuple[str, ...]:
        return tuple(f"{task}_{metric}" for task in self.tasks for metric in self.metrics)

    def content(self) -> str:
        own = sorted(Path(self.folder).rglob("*")) if self.folder else []
        return super().content() + key_of(version("lm_eval"), *(f.read_bytes() for f in own if f.is_file()))

    def check(self, facts: Facts) -> list[Problem]:
        problems = super().check(facts)
        if self.folder is not None and not Path(self.folder).is_dir():
            problems.append(
                Problem("folder", f"there is no folder {self.folder}", "the path is relative to the recipe's folder")
            )
        if (
            not problems and facts.model_config is not None
        ):  # not for each reading of a recipe: it may take half a minute
            problems += self._unknown()
        return problems

    def _unknown(self) -> list[Problem]:
        """A problem for each name that is neither a task nor a group."""
        known = known_tasks(self.folder)
        close = {name: closest(name, known) for name in self.tasks if name not in known}
        return [
            Problem("tasks", f"lm-eval has no task {name}", f"did you mean {c}?" if c else "see lm-eval ls tasks")
            for name, c in close.items()
        ]

    def destinations(self) -> list[str]:
        return [f"the Hub, to download data of {', '.join(self.tasks)}"]

    @property
    def brings_code(self) -> bool:
        return self.folder is not None

    def evaluate(self, exam: Exam) -> list[Measure]:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise LuthierError("lm-eval needs the extra: pip install 'luthier[lm-eval]'") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        for problem in self._unknown():
            raise RecipeError(f"evaluate.lm-eval.{problem.key}", problem.what, problem.remedy)
        seeds: dict[str, Any] = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))
        with _undisturbed():
            found = simple_evaluate(
                _asked(exam), tasks=list(self.tasks), num_fewshot=self.num_fewshot, limit=self.limit,
                task_manager=TaskManager(include_path=self.folder), apply_chat_template=not exam.renderer.plain,
                bootstrap_iters=0, **seeds,
            )  # fmt: skip
        assert found is not None  # only other ranks get None
        return [m for task in self.tasks for m in self._measures(task, found)]

    def _measures(self, task: str, found: Mapping[str, Any]) -> list[Measure]:
        leaves = _leaves(task, found.get("group_subtasks", {}))
        out = []
        for metric in self.metrics:
            values, keys = [], []
            for leaf in leaves:
                for row in found["samples"][leaf]:
                    if isinstance(row.get(metric), int | float):
                        values.append(float(row[metric]))
                        keys.append(f"{leaf}:{row['doc_id']}:{row.get('filter', 'none')}")
            if values:
                higher = all(found["higher_is_better"][leaf].get(metric, True) for leaf in leaves)
                out.append(mean(f"{task}_{metric}", values, tuple(keys), higher=higher, unit="mean over questions"))
        return out


def known_tasks(folder: str | None = None) -> list[str]:
    """The names of lm-eval's tasks and groups, and of those in a folder."""
    if folder is None:
        return names_of_lm_eval()
    from lm_eval.tasks import TaskManager

    return [*names_of_lm_eval(), *TaskManager(include_path=folder, include_defaults=False).all_tasks]


def names_of_lm_eval() -> list[str]:
    """The names of its own tasks and groups. It reads fifteen thousand files to find them, so the cache keeps them."""
    file = cache_folder() / "lm-eval" / f"{version('lm_eval')}.json"
    if not file.is_file():
        from lm_eval.tasks import TaskManager

        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(sorted(TaskManager().all_tasks)))
    return list(json.loads(file.read_text(encoding="utf-8")))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore the global generators afterwards: lm-eval draws its worked examples from Python's."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group is made of, or the task itself."""
    return [leaf for part in groups[task] for leaf in _leaves(part, groups)] if groups.get(task) else [task]


def _asked(exam: Exam) -> Any:
    """The model as lm-eval calls it."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Asked(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
        """Scores and generates by luthier."""

        tokenizer = exam.renderer.tokenizer
        tokenizer_name = str(getattr(exam.renderer.tokenizer, "name_or_path", "") or "tokenizer")
        room = getattr(exam.view.module.config.get_text_config(), "max_position_embeddings", None) or 2048

        @property
        def eot_token_id(self) -> int:
            return int(self.tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is False:
                return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
            return exam.renderer.encode([[exam.renderer.bare(string)]])[0][0]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = exam.renderer.encode([[exam.renderer.bare(context), Segment(continuation, True)]])[0]
            return before, after

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            turns = exam.renderer.messages({"messages": chat_history})
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt, **exam.renderer.options,
            )  # fmt: skip
            return text

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            # If a context is too long, its beginning is cut.
            pairs = [(before[-max(1, self.room - len(after)) :], after) for _, before, after in requests]
            found = exam.lab.scorer.continuations(exam.view, pairs)
            return [(-total, greedy) for total, greedy in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows, whose = [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(ids, self.prefix_token_id, self.room, 1):
                    before, after = make_disjoint_window(window)
                    windows.append((None, list(before), list(after)))
                    whose.append(number)
            out = np.zeros(len(requests))
            np.add.at(out, whose, [total for total, _ in self._loglikelihood_tokens(windows)])
            return [float(x) for x in out]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            out: dict[int, str] = {}
            lengths = [_length(r.args[1]) for r in requests]
            for length in sorted(set(lengths)):
                mine = [i for i, n in enumerate(lengths) if n == length]
                prompts = [self.tok_encode(requests[i].args[0])[-max(1, self.room - length) :] for i in mine]
                done = exam.generated(prompts, length)
                out |= {i: _cut(c.text, requests[i].args[1]) for i, c in zip(mine, done, strict=True)}
            return [out[i] for i in range(len(requests))]

    return Asked()


def _length(asked: Mapping[str, Any]) -> int:
    if asked.get("do_sample") or (asked.get("temperature") or 0) > 0:
        raise LuthierError(
            "lm-eval: this task needs drawn answers, but luthier gives greedy ones, so the task cannot be used here"
        )
    return int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or 256)


def _cut(text: str, asked: Mapping[str, Any]) -> str:
    """Up to the first of the strings that end an answer."""
    until = asked.get("until") or []
    for stop in [until] if isinstance(until, str) else until:
        text = text.split(stop)[0] if stop else text
    return text
