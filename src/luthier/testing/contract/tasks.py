"""Tests of every task: rows are read, rendered, scored equally in both layouts, learnt and shown; wrong rows are named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import recipe
from luthier.data.batch import IGNORE, collate, predicted
from luthier.data.reading import SHAPES, read
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.evaluation.base import Exam, examine
from luthier.inference.services import lab_with
from luthier.method import registry as manifest
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.support.errors import LuthierError, RecipeError
from luthier.tasks.base import Draw, Task
from luthier.testing.contract.examples import SETTINGS, Example, snapshot
from luthier.testing.contract.subjects import SHAPED, Subject, Values, exam_of, labels_of, maker_of, subject
from luthier.training.loop import Loop
from luthier.tuners.base import with_head
from luthier.tuners.full import Full
from luthier.update.files import load, save_update


def task_of(task: Example) -> Task:
    """The method itself."""
    assert isinstance(task.method, Task)
    return task.method


def shapes_of(task: Example) -> Iterator[tuple[str, Values]]:
    """Each shape that the task declares, with rows: the example's own if they have this shape."""
    for shape in task_of(task).shapes:
        own = [r for r in task.rows or () if all(field in r for field in SHAPES[shape])]
        yield shape, own or SHAPED[shape]


def asked(task: Example) -> tuple[Subject, Values]:
    """A model that knows rows of the task's first shape and one that does not; and these rows."""
    _, values = next(shapes_of(task))
    return subject(maker_of(task, task_of(task)), task_of(task), values), values


def fresh(task: Example) -> ModelView:
    """The model before it has learnt anything."""
    model, tokenizer = maker_of(task, task_of(task))()
    return ModelView.probed(model.eval(), tokenizer)


def made_of(task: Example, view: ModelView, values: Values) -> tuple[list[dict[str, Any]], Any]:
    """(training rows, the maker of them)."""
    renderer, sources = Renderer(view.tokenizer), [Row(f"rows:{i}", dict(v)) for i, v in enumerate(values, start=1)]
    maker = task_of(task).maker(renderer, view.module.config, labels_of(view, task_of(task), sources))
    return maker.made(sources, renderer), maker


def written(folder: Path, name: str, values: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as a file. Returns its name."""
    (folder / name).write_text("".join(json.dumps(v) + "\n" for v in values))
    return name


def test_every_shape_is_read_rendered_and_scored_equally_in_both_layouts(task: Example, tmp_path: Path) -> None:
    """The scores of a row are also equal alone and beside other rows."""
    for number, (shape, values) in enumerate(shapes_of(task)):
        found, wrong = read(written(tmp_path, f"{number}.jsonl", values), {}, tmp_path, shapes=task_of(task).shapes)
        assert [dict(r.values) for r in found] == [dict(v) for v in values] and not wrong, shape
        view, scores = fresh(task), []
        for layout, limit in (("flat", 10_000), ("padded", 10_000), (view.layout, 1)):
            if layout == "flat" != view.layout:
                continue  # this model cannot use the flat layout
            exam = exam_of(view, task_of(task), values, tokens_per_forward=limit)
            chosen, view.layout = view.layout, layout
            scores.append(exam.scored)
            view.layout = chosen
        for other in scores[1:]:
            assert [s.total for s in other] == pytest.approx([s.total for s in scores[0]], rel=1e-4)
            assert [s[1:] for s in other] == [s[1:] for s in scores[0]]
        assert all(s.total > 0 and s.over > 0 for s in scores[0])


def test_each_training_row_is_made_by_itself_and_rows_collate(task: Example) -> None:
    for _, values in shapes_of(task):
        view = fresh(task)
        rows, maker = made_of(task, view, values)
        assert [r["key"] for r in rows] == [f"rows:{i}" for i in range(1, len(values) + 1)]
        draw = task_of(task).draw(view.tokenizer, 0)
        for i, row in enumerate(rows):
            (alone,), again = maker.made([Row(row["key"], dict(values[i]))], Renderer(view.tokenizer)), dict(row)
            assert alone == again
            assert len(row["labels"]) == len(row["ids"]) and max(row["ids"]) < view.embedding.num_embeddings
            assert all(y in (IGNORE, x) for x, y in zip(row["ids"], row["labels"], strict=True))
            learnt = sum(predicted(row if draw is None else draw(row, 0)))
            assert maker.supervised(row) == (learnt or 1) > 0, "a class counts as one"
        batch = collate(rows)
        assert batch.num_sequences == len(values) and batch.lengths == tuple(len(r["ids"]) for r in rows)


def test_labels_supervise_answers_only(task: Example) -> None:
    """No token of the question is supervised, and every token of the answer is; a text without a question is all answer."""
    for shape, values in shapes_of(task):
        view = fresh(task)
        tokenizer, renderer = view.tokenizer, Renderer(view.tokenizer)
        for values_of, row in zip(values, made_of(task, view, values)[0], strict=True):
            prompt, answer = task_of(task).asked(Row(row["key"], dict(values_of)), renderer)
            if "targets" in row:  # a tag for each word
                told = [view.classes[y] for y in row["targets"] if y != IGNORE]
                assert " ".join(told) == answer and _bare(prompt) in _bare(tokenizer.decode(row["ids"])), shape
                continue
            on = [x for x, y in zip(row["ids"], row["labels"], strict=True) if y != IGNORE]
            said = tokenizer.decode(on, skip_special_tokens=True).lower()
            if not on:  # a class, which is in a column
                assert int(row["row"]["label"]) == view.classes.index(answer), shape
                continue
            assert _bare(answer) in _bare(said), shape
            assert not prompt or _bare(prompt) not in _bare(said), shape
            shown = tokenizer.decode(row["ids"], skip_special_tokens=True)
            assert not prompt or _bare(prompt) in _bare(shown), "the question is in the input"


def _bare(text: str) -> str:
    """Letters and digits only, because tokenizers place spaces differently."""
    return "".join(c for c in text.lower() if c.isalnum())


def test_a_row_that_is_cut_keeps_its_answer(task: Example) -> None:
    """A cut row has exactly the asked length, and still has supervised tokens."""
    for _, values in shapes_of(task):
        rows, maker = made_of(task, fresh(task), values)
        for row in rows:
            limit = len(row["ids"]) - 1
            for how in ("trim_prompt", "trim_end"):
                cut = maker.shortened(dict(row), limit, how)
                assert len(cut["ids"]) == len(cut["labels"]) == limit and cut["key"] == row["key"]
                assert maker.supervised(cut) > 0
                assert collate([cut]).lengths == (limit,)


def test_draws_depend_on_seed_epoch_and_row_alone(task: Example) -> None:
    """The same draw gives the same tokens; other epochs and seeds give others; held-out rows are the same for all seeds."""
    view, (_, values) = fresh(task), asked(task)
    rows, _ = made_of(task, view, values)
    draws = [d for seed in (0, 0, 1) if (d := task_of(task).draw(view.tokenizer, seed)) is not None]
    assert len(draws) == 3 * task_of(task).redraws
    if not draws:
        return
    first, same, other = (partial(_drawn, d, rows) for d in draws)
    assert first(3) == same(3) == _drawn(draws[0], rows[::-1], 3)[::-1]
    assert first(None) == other(None) and first(3) != other(3) and first(3) != first(4)
    for row, drawn in zip(rows, first(3), strict=True):
        asked_for = [i for i, y in enumerate(drawn["targets"]) if y != IGNORE]
        assert asked_for and all(drawn["targets"][i] == row["labels"][i] for i in asked_for)
        assert all(drawn["ids"][i] == x for i, x in enumerate(row["ids"]) if i not in asked_for)


def _drawn(draw: Draw, rows: Sequence[Mapping[str, Any]], epoch: int | None) -> list[dict[str, Any]]:
    return [dict(draw(r, epoch)) for r in rows]


def test_the_usual_evaluators_prefer_the_model_that_knows(task: Example) -> None:
    """Evaluators of `always` work on this task. Their measures and samples separate a model that knows from one that does not."""
    name, (one, values) = task_of(task).key(), asked(task)
    evaluators = [manifest.find("evaluate", n)() for n in task_of(task).always]
    assert evaluators and all(name in type(e).traits.tasks for e in evaluators)
    usual = [e for e in evaluators if not e.own_rows]
    exams = {w: exam_of(one.view(w), task_of(task), values) for w in ("knowing", "wrong")}
    found = {w: examine(exam, usual) for w, exam in exams.items()}
    for n, m in found["knowing"].measures.items():
        gain = m.value - found["wrong"].measures[n].value
        assert (gain > 0) == m.higher and gain, n
    _samples_tell(task, exams["knowing"], found["knowing"].samples, len(values))


def _samples_tell(task: Example, exam: Exam, samples: Sequence[Any], count: int) -> None:
    if not task_of(task).shows_rows:
        assert not samples, "a task shows rows only if it declares this"
        return
    assert len(samples) == count == len({s.key for s in samples})
    for sample in samples:
        assert sample.prompt and sample.wanted and sample.answer == sample.wanted, "this model knows its rows"


def test_rows_of_another_form_are_named_by_file_and_line(task: Example, tmp_path: Path) -> None:
    """A row of a shape that the task does not read, a row without the fields, and a row with fields of another type."""
    shape, values = next(shapes_of(task))
    wrong: list[dict[str, Any]] = [{"nothing": 1}, {f: 3.5 for f in SHAPES[shape]}]
    wrong += [dict(SHAPED[s][0]) for s in SHAPES if not _reads(task_of(task).shapes, SHAPED[s][0])]
    for number, row in enumerate(wrong):
        file = written(tmp_path, f"{number}.jsonl", [values[0], row])
        with pytest.raises(RecipeError) as refused:
            read(file, {}, tmp_path, shapes=task_of(task).shapes)
        assert str(refused.value).startswith(f"{tmp_path / file}:2: "), row


def _reads(shapes: Sequence[str], row: Mapping[str, Any]) -> bool:
    """True if a row has all fields of one of these shapes."""
    return any(all(field in row for field in SHAPES[s]) for s in shapes)


def test_a_label_that_was_never_trained_on_is_named(task: Example) -> None:
    view, (_, values) = fresh(task), asked(task)
    if not any({"label", "tags"} & v.keys() for v in values):
        assert task_of(task).labels([], None, {}) == {}, "a task without labels has no classes"
        return
    rows = [Row(f"f:{i}", dict(v)) for i, v in enumerate(values, start=1)]
    known = {name: i for i, name in enumerate(view.classes)}
    labels = task_of(task).labels(rows, rows, known)
    assert sorted(labels.values()) == list(range(len(labels))) and labels == task_of(task).labels(
        rows[::-1], None, known
    )
    field = "label" if "label" in values[0] else "tags"
    nobody: Any = "nobody" if field == "label" else ["nobody", *values[0]["tags"][1:]]
    strange = Row("held:7", {**values[0], field: nobody})
    with pytest.raises(RecipeError, match=r"held:7: .*nobody"):
        task_of(task).labels(rows, [strange], known)


def test_a_saved_model_opens_with_its_head_and_no_new_weights(task: Example, tmp_path: Path) -> None:
    """The class that the task names opens it, `check_view` accepts it, and its scores are the same."""
    one, values = asked(task)
    view = one.view()
    view.module.save_pretrained(tmp_path)
    auto = task_of(task).auto(view.module.config)
    opened, told = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(opened) is type(view.module) and not told["missing_keys"] and not told["unexpected_keys"]
    again = ModelView.probed(opened.eval(), view.tokenizer)
    task_of(task).check_view(again)
    assert exam_of(again, task_of(task), values).scored == exam_of(view, task_of(task), values).scored


def test_a_task_is_learnt_and_its_update_has_equal_scores_on_a_fresh_base(task: Example, tmp_path: Path) -> None:
    (_, values), view = next(shapes_of(task)), fresh(task)
    before = sum(s.total for s in exam_of(view, task_of(task), values).scored)
    draw = task_of(task).draw(view.tokenizer, 0)
    trainable = with_head(Full().attach(view), view.anatomy.task_head)
    settings = SETTINGS.model_copy(update={"max_steps": 8})
    loop = Loop(view, exam_of(view, task_of(task), values).rows, trainable, Sft(), settings, draw=draw)
    for _ in range(8):
        loop.step()
    live = [s.total for s in exam_of(view, task_of(task), values).scored]
    assert sum(live) < before
    save_update(trainable.update(), tmp_path, view)
    base = fresh(task)
    with load(tmp_path).bind(base):
        assert [s.total for s in exam_of(base, task_of(task), values).scored] == pytest.approx(live, abs=1e-3)


def test_each_prompt_is_answered_by_itself_and_the_model_is_unchanged(task: Example) -> None:
    one, values = asked(task)
    view = one.view()
    lab = lab_with(Renderer(view.tokenizer), {"base": lambda: view}, task=task_of(task))
    prompts = [p for p, _ in (task_of(task).asked(Row("x", dict(v)), lab.renderer) for v in values)]
    if not any(prompts):  # texts: the answer fills their gap
        with pytest.raises(LuthierError, match="gap"):
            task_of(task).replies(view, lab, ["no gap here"], 4)
        prompts = [f"{view.tokenizer.mask_token} {v['text']}" for v in values]
    view.module.train()
    before = snapshot(view)
    torch.manual_seed(1)
    together = task_of(task).replies(view, lab, prompts, 4)
    assert snapshot(view) == before
    alone = [task_of(task).replies(view, lab, [p], 4)[0] for p in prompts]
    assert [r["answer"] for r in together] == [r["answer"] for r in alone] and all(r["answer"] for r in together)
    assert task_of(task).replies(view, lab, [], 4) == []


def test_the_first_lines_of_a_recipe_name_the_task(task: Example) -> None:
    starter = task_of(task).starter
    text = "".join(f"{key}: {starter[key]}\n" for key in ("model", "task", "data"))
    assert type(recipe.load(text).task) is type(task_of(task))


__all__ = [
    "test_a_label_that_was_never_trained_on_is_named",
    "test_a_row_that_is_cut_keeps_its_answer",
    "test_a_saved_model_opens_with_its_head_and_no_new_weights",
    "test_a_task_is_learnt_and_its_update_has_equal_scores_on_a_fresh_base",
    "test_draws_depend_on_seed_epoch_and_row_alone",
    "test_each_prompt_is_answered_by_itself_and_the_model_is_unchanged",
    "test_each_training_row_is_made_by_itself_and_rows_collate",
    "test_every_shape_is_read_rendered_and_scored_equally_in_both_layouts",
    "test_labels_supervise_answers_only",
    "test_rows_of_another_form_are_named_by_file_and_line",
    "test_the_first_lines_of_a_recipe_name_the_task",
    "test_the_usual_evaluators_prefer_the_model_that_knows",
]
