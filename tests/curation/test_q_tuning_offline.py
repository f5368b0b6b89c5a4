"""The sample stage of q-tuning over a whole set."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.commands import luthier, rows, write
from luthier.curation import QTuningOffline
from luthier.curation.q_tuning_offline import scored
from luthier.data.batch import IGNORE
from luthier.data.quadrants import choose_rows, named
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.inference.services import lab_with
from luthier.model.view import ModelView
from luthier.step.lab import Lab
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import byte_tokenizer, tiny


@pytest.fixture(scope="module")
def base():
    view = ModelView(tiny("llama", vocab_size=260, max_position_embeddings=512).eval(), byte_tokenizer())
    return lab_with(Renderer(view.tokenizer), {"base": lambda: view})


def some(n, start=0):
    return [Row(f"f:{i}", {"prompt": f"say {i}", "completion": f"{i} " * (1 + i % 5)}) for i in range(start, start + n)]


def test_perplexity_and_entropy_against_a_plain_softmax(base):
    plane, flops = scored(some(5), base)
    for row, (ppl, entropy) in zip(some(5), plane, strict=True):
        item = base.renderer.render(row.values, row.key)
        p = base.view().module(input_ids=torch.tensor([item["ids"]])).logits[0].double().softmax(-1)
        at = [i for i, y in enumerate(item["labels"]) if y != IGNORE]
        nll = [-float(p[i - 1, item["ids"][i]].log()) for i in at]
        assert ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
        assert entropy == pytest.approx(np.mean([-float((p[i - 1] * p[i - 1].log()).sum()) for i in at]), rel=1e-4)
    assert flops > 0


def test_the_choice_is_the_objectives_over_the_whole_set(base):
    chosen = QTuningOffline(keep_fraction=0.3).select(some(40), base)
    plane, _ = scored(some(40), base)
    by_hand = choose_rows(plane[:, 0], plane[:, 1], 0.3, 10)
    assert chosen.keep.tolist() == by_hand.keep.tolist() and len(chosen.keep) == 12
    quadrants = named(plane[:, 0], plane[:, 1], by_hand.alpha)
    inside = set(chosen.keep.tolist())
    for i, reason in enumerate(chosen.reason):
        assert reason.endswith(quadrants[i]) and reason.startswith("kept" if i in inside else "left out")
    assert chosen.axes == ("log perplexity", "mean entropy") and chosen.plane.shape == (40, 2)
    many, most = QTuningOffline(keep_fraction=0.9).select(some(40), base), choose_rows(*plane.T, 0.9, 10)
    topped = set(most.keep[most.topped_up].tolist())
    assert [("fill up" in r) for r in many.reason] == [i in topped for i in range(40)] and 0 < len(topped) < 36


@pytest.mark.parametrize("steps", [1, 10])
def test_the_search_takes_the_steps_that_were_asked_for(base, steps):
    chosen = QTuningOffline(keep_fraction=0.3, bisection_steps=steps).select(some(40), base)
    plane, _ = scored(some(40), base)
    by_hand = choose_rows(plane[:, 0], plane[:, 1], 0.3, steps)
    assert by_hand.alpha != choose_rows(plane[:, 0], plane[:, 1], 0.3, 11 - steps).alpha
    assert [r.rpartition(": ")[2] for r in chosen.reason] == named(plane[:, 0], plane[:, 1], by_hand.alpha)
    assert chosen.score.tolist() == plane[:, 0].tolist()
    np.testing.assert_allclose(chosen.plane, np.stack([np.log(plane[:, 0]), plane[:, 1]], 1))


def test_rows_without_a_target_are_counted_but_never_kept(base):
    """Six of twelve, all from the nine that can be scored, and in the places that these have among the twelve."""
    bare = [Row(f"b:{i}", {"messages": [{"role": "user", "content": f"say {i}"}]}) for i in range(3)]
    mixed = [bare[0], *some(4), bare[1], *some(5, 4), bare[2]]
    chosen = QTuningOffline(keep_fraction=0.5).select(mixed, base)
    usable = [i for i, r in enumerate(mixed) if r not in bare]
    plane, _ = scored(some(9), base)
    by_hand = choose_rows(plane[:, 0], plane[:, 1], 6.5 / 9, 10)
    assert chosen.keep.tolist() == [usable[i] for i in by_hand.keep] and len(chosen.keep) == 6
    assert [chosen.reason[i] for i in (0, 5, 11)] == ["without a supervised token"] * 3
    assert np.isnan(chosen.score[[0, 5, 11]]).all()
    with pytest.raises(RecipeError, match="no row has a supervised token"):
        QTuningOffline(keep_fraction=0.5).select(bare, base)


def test_the_count_is_exact_where_some_rows_have_no_target(base):
    """15 of 25, of which 22 can be scored: int(15 / 22 * 22) is 14. All of twelve, of which nine can be scored: nine."""
    bare = [Row(f"b:{i}", {"messages": [{"role": "user", "content": f"say {i}"}]}) for i in range(3)]
    assert len(QTuningOffline(keep_fraction=0.6).select([*some(22), *bare], base).keep) == 15
    assert QTuningOffline(keep_fraction=1.0).select([*bare, *some(9)], base).keep.tolist() == list(range(3, 12))


def test_progress_is_told_with_the_first_row_of_each_part(base, monkeypatch):
    from luthier.curation import q_tuning_offline

    monkeypatch.setattr(q_tuning_offline, "PART", 5)
    said = []
    scored(some(12), replace(base, tick=lambda *what: said.append(what)))
    assert said == [("curating", 0, "f:0"), ("curating", 5, "f:5"), ("curating", 10, "f:10")]


def test_scoring_is_cut_into_parts_and_forwards_and_counted_once(base, monkeypatch):
    from luthier.curation import q_tuning_offline

    before = base.view().meter.total
    plane, flops = scored(some(12), base)
    assert flops == pytest.approx(base.view().meter.total - before), "what was counted before is not counted again"
    monkeypatch.setattr(q_tuning_offline, "PART", 5)
    small = lab_with(base.renderer, {"base": base.view}, tokens_per_forward=30)
    apart, again = scored(some(12), small)
    np.testing.assert_allclose(apart, plane, rtol=1e-4)
    assert again == pytest.approx(flops, rel=0.05)


def test_dropout_is_off_and_a_loss_beyond_exp_is_the_largest():
    model = tiny("llama", vocab_size=260, max_position_embeddings=512, attention_dropout=0.9).train()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    view = ModelView(model, byte_tokenizer(), layout="padded")
    noisy = lab_with(Renderer(view.tokenizer), {"base": lambda: view})
    first, second = scored(some(6), noisy)[0], scored(some(6), noisy)[0]
    assert np.array_equal(first, second)
    assert first[:, 0].max() == pytest.approx(np.exp(80), rel=1e-4)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
def test_the_count_is_exact(base, fraction):
    assert len(QTuningOffline(keep_fraction=fraction).select(some(40), base).keep) == int(fraction * 40)


def test_the_order_of_rows_does_not_matter(base):
    mixed = list(reversed(some(30)))
    one, other = (QTuningOffline(keep_fraction=0.3).select(r, base) for r in (some(30), mixed))
    assert {some(30)[i].key for i in one.keep} == {mixed[i].key for i in other.keep}


def test_corners_of_the_plane_have_their_names():
    ppl, entropy = np.array([9.0, 9, 1, 1, 5, 5, 5, 1, 9]), np.array([9.0, 1, 1, 9, 5, 1, 9, 5, 5])
    corners = ["Q1 noise", "Q2 misconception", "Q3 redundant", "Q4 to calibrate"]
    assert named(ppl, entropy, 0.3) == [*corners, *["between"] * 5]


def test_what_cannot_be_chosen_is_refused(base):
    with pytest.raises(LuthierError, match="asks a model and was given none; pass model and tokenizer"):
        QTuningOffline(keep_fraction=0.5).choose([r.values for r in some(4)])
    with pytest.raises(LuthierError, match="there is no model called 'base' here"):
        QTuningOffline(keep_fraction=0.5).select(some(4), Lab())
    with pytest.raises(RecipeError, match=r"q-tuning-offline\.keep_fraction: 0.01 of 4 rows keeps none"):
        QTuningOffline(keep_fraction=0.01).select(some(4), base)
    assert QTuningOffline(keep_fraction=1.0).select(some(1), base).keep.tolist() == [0]
    with pytest.raises(ValueError, match="keep_fraction"):
        QTuningOffline(keep_fraction=1.5)


def test_a_run_shows_the_plane_and_another_fraction_is_not_scored_again(model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    keys = {"curate": [{"q-tuning-offline": {"keep_fraction": 0.5}}], "evaluate": [], "max_steps": 1}
    path = write(tmp_path, model_folder, train=rows(40), data={"train": "train.jsonl"}, **keys)
    done = luthier("run", path, cwd=tmp_path)
    assert (
        done.returncode == 0
        and "q-tuning-offline: 40 rows before, 20 after" in done.stderr
        and sum(map(int, re.findall(r"(\d+) left out: ", done.stderr))) == 20
        and "left out: Q1 noise" in done.stderr
    ), done.stderr
    page = (tmp_path / "out/report.html").read_text()
    assert (
        "The step q-tuning-offline" in page and page.count('class="stayed"') == 20 and page.count('class="gone"') == 20
    )
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["spent"]["flops"]["curate"] > 0 and run["census"]["rows"] == 20
    from luthier.curation import q_tuning_offline

    monkeypatch.setattr(q_tuning_offline, "scored", None)  # would fail if it were asked
    less = "curate=[q-tuning-offline: {keep_fraction: 0.25}]"
    again = json.loads(luthier("curate", path, less, "--output-dir", "other", "--json", cwd=tmp_path).stdout)
    assert [(s["of"], s["rows"]) for s in again["steps"]] == [(40, 10)]
    said = json.loads(luthier("check", path, "--json", "--no-forecast", cwd=tmp_path).stdout)
    assert said["curated"][0]["rows"] == 20
