"""LiST's exact checks: adapters, soft loss, re-weighting, schedule, rounds; numbers in names are the sheet's."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F

from helpers.cloze import WORDS, cloze, with_soft
from luthier.cli.check import check_recipe, show
from luthier.data.batch import collate
from luthier.data.reading import read
from luthier.model.view import attention_implementation
from luthier.objectives.base import Clock, Window
from luthier.objectives.distill import Distill, soft_loss
from luthier.objectives.sft import Sft
from luthier.pipelines import base
from luthier.pipelines.base import Apply, run_pipeline
from luthier.pipelines.list import List
from luthier.recipe import load_file
from luthier.run.rows import apart
from luthier.step.lab import Lab
from luthier.step.outcome import Outcome
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import view_of
from luthier.training.loop import Loop
from luthier.tuners.adapter import Adapter


def moved(view):
    """Adapters away from zero, on the view."""
    return Adapter(rank=4, init_std=0.1).attach(view)


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_1_zero_adapters_are_the_backbone_and_small_ones_nearly(kind):
    batch = collate(cloze(6, 0))
    view = view_of(kind)
    plain = view.trace(batch).hidden[-1].detach()
    for std, tolerance in ((0.0, 0.0), (0.0002, 1e-3)):
        trainable = Adapter(rank=8, init_std=std).attach(view)
        torch.testing.assert_close(view.trace(batch).hidden[-1], plain, atol=tolerance, rtol=0)
        trainable.detach()


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_1_merged_weights_equal_the_unmerged_forward(kind):
    batch = collate(cloze(6, 0))
    view = view_of(kind)
    trainable = moved(view)
    live, merged = view.trace(batch).hidden[-1].detach(), trainable.merged_weights()
    trainable.detach()
    with torch.no_grad():
        for name, value in merged.items():
            view.weight(name).copy_(value)
    torch.testing.assert_close(view.trace(batch).hidden[-1], live, atol=1e-5, rtol=1e-5)


def test_2_only_adapters_train_and_their_number_is_4_l_r_d():
    view = view_of("bert")
    base = [p for n, p in view.module.named_parameters()]
    trainable = moved(view)
    assert sum(p.numel() for p in trainable.parameters()) == 4 * 3 * 4 * 32
    assert not any(p.requires_grad for p in base)


def test_3_soft_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    soft = torch.randn(5, 3, generator=generator, dtype=torch.float64).softmax(-1)
    entropy = -(soft * soft.log()).sum(-1)
    expected = F.cross_entropy(logits, soft, reduction="none") - entropy
    torch.testing.assert_close(soft_loss(logits, soft).double(), expected, atol=1e-6, rtol=0)
    assert float(soft_loss(logits, logits.float().softmax(-1)).abs().max()) < 1e-6
    hard = torch.tensor([[1.0, 0.0, 0.0]])
    assert soft_loss(logits[:1], hard).isfinite().all()


def looked_ahead(view, batch, labelled, eta=0.01):
    """[S]: u_i / eta, from the graph of a gradient step taken with weights that are zero, by transformers' own forward.

    theta(eps) = theta - eta grad sum eps_i KL_i(theta); u_i = -d CE(theta(eps)) / d eps_i.
    """
    names = [n for n, p in view.module.named_parameters() if p.requires_grad]
    params = {n: view.module.get_parameter(n) for n in names}

    def scores(weights, rows):
        ids = rows.ids.view(rows.num_sequences, -1)
        return torch.func.functional_call(view.module, weights, (ids,)).logits[:, 5, WORDS]  # [S, C]

    eps, soft = torch.zeros(batch.num_sequences, requires_grad=True), batch.row["soft"]
    with attention_implementation(view.module, "eager"), torch.enable_grad():
        rows = (soft * (soft.log() - F.log_softmax(scores(params, batch), -1))).sum(-1)
        grads = torch.autograd.grad((eps * rows).sum(), list(params.values()), create_graph=True)
        ahead = {n: p - eta * g for (n, p), g in zip(params.items(), grads, strict=True)}
        loss = F.cross_entropy(scores(ahead, labelled), labelled.row["label"])
        return -torch.autograd.grad(loss, eps)[0] / eta


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("seed", range(3))
def test_4_weights_equal_those_of_the_explicit_look_ahead(kind, layout, seed):
    view = view_of(kind, seed=seed)
    view.layout = layout
    trainable = Adapter(rank=4, init_std=0.1, seed=seed).attach(view)
    rows, labelled = with_soft(cloze(6, 10 + seed), seed), cloze(7, 20 + seed)
    objective = Distill(warmup_share=0.0)
    window = Window([collate(rows[:4]), collate(rows[4:])], Clock(9, 10), Lab({"labelled": labelled}))
    probe = Probe(view, objective)
    u = looked_ahead(view, collate(rows), collate(labelled))
    torch.testing.assert_close(objective.helpfulness(window, probe), u, atol=1e-6, rtol=1e-3)
    planned, counts = objective.plan(window, probe)
    ours = torch.cat([b.row["weight"] for b in planned.micro])
    expected = u.clamp_min(0) / u.clamp_min(0).sum()
    assert 0 < int((expected > 0).sum()) < 6, "some help and some do not"
    torch.testing.assert_close(ours / counts["weight"], expected, atol=2e-6, rtol=0)
    trainable.detach()


def students_weights(monkeypatch, pipeline, sign=1.0):
    """(step, weights over their denominator) of a run's first student; its own are noted, whatever it does with them."""
    seen, plan, gradients = [], Distill.plan, Probe.gradients

    def noted(self, window, probe):
        planned, counts = plan(self, window, probe)
        weights = torch.cat([b.row["weight"] for b in planned.micro])
        seen.append((window.clock.step, weights / counts["weight"]))
        return planned, counts

    def turned(self, *args, **kwargs):
        found = gradients(self, *args, **kwargs)
        return found._replace(grads={n: sign * g for n, g in found.grads.items()})

    lab = Lab({"labelled": cloze(8, 0), "unlabelled": cloze(16, 1)})
    with monkeypatch.context() as patch:
        patch.setattr(Distill, "plan", noted)
        patch.setattr(Probe, "gradients", turned)
        run_pipeline(pipeline, view_of("bert"), lab)
    return seen


SHORT = {"rounds": 1, "labelled_epochs": 1, "rank": 4, "init_std": 0.1, "learning_rate": 0.01}


def test_5_weights_of_a_run_are_positive_sum_to_one_and_turn_with_the_labelled_gradient(monkeypatch):
    pipeline = List(unlabelled_steps=1, warmup_share=0.0, unlabelled_batch=16, **SHORT)
    monkeypatch.setattr(Distill, "reweights", lambda self, step, total: self.reweight)  # from the first step on
    ((_, ours),) = students_weights(monkeypatch, pipeline)
    ((_, turned),) = students_weights(monkeypatch, pipeline, sign=-1.0)
    ((_, plain),) = students_weights(monkeypatch, pipeline.model_copy(update={"reweight": False}))
    for weights in (ours, turned, plain):
        assert bool((weights >= 0).all()) and float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    assert 0 < int((ours > 0).sum()) < 16
    assert torch.equal(ours > 0, turned == 0)  # the gradient's sign decides who is heard
    assert torch.equal(plain, torch.full((16,), 1 / 16))


def test_5_the_loss_of_a_re_weighted_step_is_the_weighted_sum():
    rows, labelled = with_soft(cloze(6, 1)), cloze(7, 2)
    objective = Distill(warmup_share=0.0)
    lab = Lab({"labelled": labelled})
    settings = TrainSettings(max_steps=2, batch_size=6, learning_rate=1e-9, shuffle=False, tokens_per_forward=16)
    trainable = Adapter(rank=4, init_std=0.1).attach(view_of("bert"))
    loop = Loop(trainable.view, rows, trainable, objective, settings, lab=lab)
    loop.step()  # step 0 is never re-weighted: the comparison is strict
    u = looked_ahead(trainable.view, collate(rows), collate(labelled)).clamp_min(0)
    ids = torch.tensor([r["ids"] for r in rows])
    soft = torch.stack([r["row"]["soft"] for r in rows])
    with torch.no_grad():
        q = trainable.view.module(ids).logits[:, 5, WORDS].log_softmax(-1)
    expected = float((u / u.sum() * (soft * (soft.log() - q)).sum(-1)).sum())
    assert loop.step()["loss"] == pytest.approx(expected, abs=1e-5)


def test_6_the_first_re_weighted_step_of_a_thousand_is_601_and_of_a_run_as_asked(monkeypatch):
    objective = Distill()
    assert next(i for i in range(1000) if objective.reweights(i, 1000)) == 601
    seen = students_weights(monkeypatch, List(unlabelled_steps=10, unlabelled_batch=4, **SHORT))
    equal = [step for step, weights in seen if bool((weights == weights[0]).all())]
    assert [step for step, _ in seen] == list(range(10)) and equal == list(range(7))
    seen = students_weights(monkeypatch, List(unlabelled_steps=10, unlabelled_batch=4, warmup_share=0.2, **SHORT))
    assert [step for step, weights in seen if bool((weights == weights[0]).all())] == [0, 1, 2]


def test_6_every_student_of_a_run_starts_from_the_base_with_new_adapters(monkeypatch):
    """The adapters that a stage's loop starts with: drawn anew for students, its student's for a round's finish."""
    starts, weights = [], []

    class Noted(Loop):
        def __init__(self, view, rows, trainable, *args, **kwargs):
            starts.append({k: t.clone() for k, t in trainable.state_dict().items()})
            weights.append({n: p.detach().clone() for n, p in view.module.named_parameters() if "luthier" not in n})
            super().__init__(view, rows, trainable, *args, **kwargs)

    monkeypatch.setattr(base, "Loop", Noted)
    lab = Lab({"labelled": cloze(8, 0), "unlabelled": cloze(16, 1)})
    pipeline = List(unlabelled_steps=3, **{**SHORT, "rounds": 2})
    done = run_pipeline(pipeline, view_of("bert"), lab)
    trained = ["teacher", "student-1", "round-1", "student-2", "round-2"]
    assert [n for n, o in done.items() if o.rows is None] == trained
    start = dict(zip(trained, starts, strict=True))
    same = lambda a, b: all(torch.equal(a[k], b[k]) for k in b)  # noqa: E731
    fresh = view_of("bert")
    for m, name in enumerate(("teacher", "student-1", "student-2")):
        drawn = Adapter(rank=4, init_std=0.1, seed=m).attach(fresh)
        assert same(start[name], drawn.state_dict()), name
        drawn.detach()
    new = [start[n] for n in ("teacher", "student-1", "student-2")]
    assert not any(torch.equal(a[k], b[k]) for i, a in enumerate(new) for b in new[:i] for k in a)
    for m in (1, 2):
        assert same(start[f"round-{m}"], done[f"student-{m}"].state)
        assert not same(start[f"round-{m}"], done[f"round-{m}"].state)
    assert all(same(w, dict(fresh.module.named_parameters())) for w in weights)


def test_each_round_learns_what_the_model_of_the_round_before_says():
    """Soft labels are those of transformers' own forward under the teacher's adapters; the base's are others."""
    view, pool = view_of("bert"), cloze(16, 1)
    lab = Lab({"labelled": cloze(8, 0), "unlabelled": pool})
    pipeline = List(
        unlabelled_steps=5, unlabelled_batch=8, **{**SHORT, "rounds": 2, "learning_rate": 0.1, "labelled_epochs": 5}
    )
    done = run_pipeline(pipeline, view, lab)
    ids = torch.tensor([r["ids"] for r in pool])

    @torch.no_grad()
    def said():
        return view.module(ids).logits[:, 5, WORDS].softmax(-1)

    before, teachers = said(), {}
    for name, seed in (("teacher", 0), ("round-1", 1)):
        trainable = Adapter(rank=4, init_std=0.1, seed=seed).attach(view)
        trainable.load_state_dict(dict(done[name].state))
        teachers[name] = said()
        trainable.detach()
    for labels, teacher in (("labels-1", "teacher"), ("labels-2", "round-1")):
        rows = done[labels].rows
        assert [(r["key"], r["ids"]) for r in rows] == [(r["key"], r["ids"]) for r in pool]
        assert all(r["row"].keys() == {"slot", "words", "soft"} for r in rows), "a pool's own classes are not looked at"
        soft = torch.stack([r["row"]["soft"] for r in rows])
        torch.testing.assert_close(soft, teachers[teacher], atol=1e-5, rtol=0)
        assert float((soft - before).abs().max()) > 1e-3
    assert float((teachers["teacher"] - teachers["round-1"]).abs().max()) > 1e-3


def test_what_every_stage_is_told():
    pipeline = List(
        rounds=2, unlabelled_steps=7, unlabelled_batch=5, labelled_epochs=2.0, labelled_batch=3, learning_rate=0.02, rank=4,
        init_std=0.1, warmup_share=0.3, reweight=False, seed=4,
    )  # fmt: skip
    done, told = {}, []
    while (stage := pipeline.next(done)) is not None:
        done[stage.name] = None
        told.append(stage)
    applied = [(s.name, s.inputs) for s in told if isinstance(s, Apply)]
    assert applied == [("labels-1", ("teacher",)), ("labels-2", ("round-1",))]
    trained = [s for s in told if not isinstance(s, Apply)]
    sft, distill = Sft(), Distill(warmup_share=0.3, reweight=False)
    assert [(s.name, s.start, s.data, s.objective, s.tuner.seed, s.settings.seed) for s in trained] == [
        ("teacher", "base", "labelled", sft, 4000, 4),
        ("student-1", "base", "labels-1", distill, 4001, 5),
        ("round-1", "student-1", "labelled", sft, 4001, 5),
        ("student-2", "base", "labels-2", distill, 4002, 6),
        ("round-2", "student-2", "labelled", sft, 4002, 6),
    ]
    for s in trained:
        how = s.settings
        assert (s.tuner.rank, s.tuner.init_std, how.learning_rate, how.warmup_fraction) == (4, 0.1, 0.02, 0.0)
        sizes = (7, 5) if s.name.startswith("student") else (None, 3)
        assert (how.max_steps, how.batch_size) == sizes and (how.max_steps or how.epochs == 2.0)


# --- the pool ---


def labels_of(pool, labelled, **fields):
    """What a first teacher makes of a pool."""
    lab = Lab({"labelled": labelled, "unlabelled": pool})
    view, pipeline = view_of("bert"), List(unlabelled_steps=1, **{**SHORT, **fields})
    done = {}
    for _ in range(2):
        stage = pipeline.next(done)
        done[stage.name] = base.run_stage(pipeline, stage, view, lab, done)
    return done["labels-1"].rows


def test_a_teacher_labels_without_dropout():
    pool, lab = cloze(6, 1), Lab({"labelled": cloze(4, 0), "unlabelled": cloze(6, 1)})
    view = view_of("bert", hidden_dropout_prob=0.5)
    trainable = Adapter(rank=2).attach(view)
    done = {"teacher": Outcome("teacher", update=trainable.update())}
    trainable.detach()
    stage, found = List(unlabelled_batch=1).next(done), []
    for _ in range(2):
        view.module.train()
        found.append(torch.stack([r["row"]["soft"] for r in List().apply(stage, view, lab, done).rows]))
    assert torch.equal(*found) and len(found[0]) == len(pool)


def test_rows_that_are_labelled_already_leave_the_pool_and_that_is_said(caplog):
    labelled, pool = cloze(8, 0), cloze(16, 1)
    mixed = [*pool[:9], *labelled[:5], *pool[9:]]
    with caplog.at_level(logging.WARNING):
        kept = labels_of(mixed, labelled, unlabelled_batch=4)
    assert [r["ids"] for r in kept] == [r["ids"] for r in pool]
    assert "labels-1: 5 rows of the pool are labelled rows as well and are left out" in caplog.messages
    with pytest.raises(LuthierError, match="all 8 rows of the pool are among the labelled rows"):
        labels_of(labelled, labelled)


def test_a_small_pool_and_a_teacher_of_one_class_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        labels_of(cloze(16, 1), cloze(8, 0), unlabelled_batch=16, learning_rate=1e-9)
    sizes = [m for m in caplog.messages if "less than a batch" in m]
    with caplog.at_level(logging.WARNING):
        labels_of(cloze(15, 1), cloze(8, 0), unlabelled_batch=16, learning_rate=1e-9)
    assert sizes == [] and "labels-1: the pool has 15 rows, less than a batch of 16" in caplog.messages
    caplog.clear()
    one_class = [r for r in cloze(60, 0) if int(r["row"]["label"]) == 1][:8]
    with caplog.at_level(logging.WARNING):
        labels_of(cloze(16, 1), one_class, unlabelled_batch=4, learning_rate=0.05, labelled_epochs=10)
    assert caplog.messages == ["labels-1: the teacher gives class 1 to 16 of 16 rows"]


def test_a_class_that_gets_exactly_the_share_is_not_warned_of(caplog):
    def labelled(most):
        return [{"row": {"soft": torch.tensor([0.2, 0.8] if i < most else [0.6, 0.4])}} for i in range(20)]

    stage = Apply("labels-1", inputs=("teacher-1",))
    with caplog.at_level(logging.WARNING):
        List(unlabelled_batch=4)._tell(stage, labelled(19), 20)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        List(unlabelled_batch=4)._tell(stage, labelled(20), 20)
    assert caplog.messages == ["labels-1: the teacher gives class 1 to 20 of 20 rows"]


def lines(file, rows):
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_texts_that_differ_in_case_and_space_only_are_one(tmp_path):
    lines(tmp_path / "a.jsonl", [{"text": t} for t in ("A  thing\n", "another", "a Thing!", "STRASSE", "a thing")])
    lines(tmp_path / "b.jsonl", [{"text": t, "label": "x"} for t in ("a thing", "straße", "unlike")])
    pool, _ = read("a.jsonl", {}, tmp_path, "pool", shapes=("text",))
    labelled, _ = read("b.jsonl", {}, tmp_path, shapes=("text and label",))
    assert [r.values["text"] for r in apart(pool, labelled)] == ["another", "a Thing!"]
    assert apart(pool, labelled[2:]) is pool


def test_check_says_how_many_rows_of_the_pool_are_training_rows(model_folder, tmp_path, capsys):
    train = [{"text": f"thing {i}", "label": "yes" if i % 2 else "no"} for i in range(6)]
    lines(tmp_path / "train.jsonl", train)
    recipe = {
        "model": model_folder, "data": {"train": "train.jsonl", "pool": "pool.jsonl"}, "task": "classification",
        "pipeline": {"list": {"rounds": 1}},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    lines(tmp_path / "pool.jsonl", [{"text": f"Thing  {i}"} for i in range(4, 14)])
    found = check_recipe(load_file(tmp_path / "r.yaml"), tmp_path)
    show(found)
    assert found["pool_shared"] == 2
    assert "pool: 2 rows are left out, because they are also training rows" in capsys.readouterr().out
    lines(tmp_path / "pool.jsonl", [{"text": f"THING {i}"} for i in range(6)])
    with pytest.raises(RecipeError, match="data.pool: all its 6 rows are training rows too"):
        check_recipe(load_file(tmp_path / "r.yaml"), tmp_path)
    lines(tmp_path / "pool.jsonl", [{"text": "thing that is new"}])
    found = check_recipe(load_file(tmp_path / "r.yaml"), tmp_path)
    show(found)
    assert found["pool_shared"] == 0 and "pool:" not in capsys.readouterr().out


def test_a_row_without_a_soft_label_and_an_empty_pool_are_named():
    view = view_of()
    moved(view)
    with pytest.raises(LuthierError, match="no soft label"):
        Distill().plan(Window([collate(cloze(2, 0))], Clock(0, 10)), Probe(view, Distill()))
    lab = Lab({"labelled": cloze(4, 0), "unlabelled": []})
    with pytest.raises(LuthierError, match="pool of unlabelled rows is empty"):
        run_pipeline(List(rounds=1, labelled_epochs=1, rank=2), view_of(), lab)


def test_what_will_be_trained_is_known_before_anything_is():
    sets = {"labelled": cloze(2, 0), "unlabelled": cloze(3, 1)}
    found = [(stage.name, data) for stage, data in base.planned(List(rounds=2), sets)]
    assert found == [
        ("teacher", "labelled"), ("student-1", "unlabelled"), ("round-1", "labelled"), ("student-2", "unlabelled"),
        ("round-2", "labelled"),
    ]  # fmt: skip
