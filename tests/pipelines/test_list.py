"""LiST's exact checks: adapters, soft loss, re-weighting, schedule, rounds; numbers in names are the sheet's."""

import pytest
import torch
import torch.nn.functional as F

from helpers.cloze import cloze, with_soft
from luthier.data.batch import collate
from luthier.kernels.plain import plain_operations
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.distill import Distill, helpful_weights, soft_loss
from luthier.pipelines.base import run_pipeline
from luthier.pipelines.list import List
from luthier.step.lab import Lab
from luthier.step.probe import Probe, _call_with
from luthier.support.errors import LuthierError
from luthier.testing.models import view_of
from luthier.tuners.adapter import Adapter


def moved(view, rank=4):
    trainable = Adapter(rank=rank, init_std=0.1).attach(view)
    return trainable


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
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    trainable = moved(view)
    assert sum(p.numel() for p in trainable.parameters()) == 4 * 3 * 4 * 32
    trainable.detach()
    lab = Lab({"labelled": cloze(8, 0), "unlabelled": cloze(16, 1)})
    run_pipeline(List(rounds=1, unlabelled_steps=4, labelled_epochs=1, rank=4, init_std=0.1), view, lab)
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())


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


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_4_helpfulness_equals_the_explicit_look_ahead(kind, layout):
    view = view_of(kind)
    view.layout = layout
    trainable = moved(view)
    batch, labelled = collate(with_soft(cloze(5, 1))), cloze(7, 2)
    objective = Distill(warmup_share=0.0)
    probe = Probe(view, objective)
    window = Window([batch], Clock(9, 10), Lab({"labelled": labelled}))
    ours = objective.helpfulness(window, probe)

    # theta(eps) = theta - eta grad sum eps_i l_i; u_i = -d CE(theta(eps)) / d eps_i at 0.
    names = [n for n, p in view.module.named_parameters() if p.requires_grad]
    params, eta = [view.module.get_parameter(n) for n in names], 0.01
    eps = torch.zeros(5, requires_grad=True)
    with plain_operations():
        inner = (eps * objective._row_losses(Forward(batch, view))).sum()
        grads = torch.autograd.grad(inner, params, create_graph=True)
        ahead = {n: p - eta * g for n, p, g in zip(names, params, grads, strict=True)}
        meta = collate(labelled)
        loss = _call_with(view.module, ahead, lambda: F.cross_entropy(Forward(meta, view).logits(), meta.row["label"]))
        (u,) = torch.autograd.grad(loss, eps)
    assert float(ours.abs().max()) > 1e-7
    torch.testing.assert_close(ours, -u / eta, atol=1e-6, rtol=1e-3)
    trainable.detach()


def test_5_weights():
    u = torch.tensor([2.0, -1.0, 6.0, 0.0])
    assert helpful_weights(u).tolist() == [0.25, 0.0, 0.75, 0.0]
    assert helpful_weights(-u).tolist() == [0.0, 1.0, 0.0, 0.0]  # the gradient's sign decides who is heard
    assert helpful_weights(-u.abs()).sum() == 0


def test_6_schedule_and_fresh_students():
    objective = Distill()
    assert next(i for i in range(1000) if objective.reweights(i, 1000)) == 601
    pipeline = List(rounds=2)
    assert pipeline._adapter(0) != pipeline._adapter(1) != pipeline._adapter(2)
    view = view_of()
    starts = []
    for m in (0, 1):
        trainable = pipeline._adapter(m).attach(view)
        starts.append(next(iter(trainable.a.values())).detach().clone())
        trainable.detach()
    assert not torch.equal(*starts)


def test_rounds_come_in_order_and_the_pipeline_is_pure():
    view = view_of("bert")
    lab = Lab({"labelled": cloze(8, 0), "unlabelled": cloze(16, 1)})
    pipeline = List(rounds=2, unlabelled_steps=5, labelled_epochs=1, rank=4, init_std=0.1)
    done = run_pipeline(pipeline, view, lab)
    assert list(done) == ["teacher", "labels-1", "student-1", "round-1", "labels-2", "student-2", "round-2"]
    part = dict(list(done.items())[:3])
    assert pipeline.next(part) == pipeline.next(part) == done["round-1"].stage
    again = run_pipeline(pipeline, view_of("bert"), lab)
    for name in ("teacher", "round-2"):
        for k, t in done[name].state.items():
            assert torch.equal(t, again[name].state[k]), (name, k)
    soft = torch.stack([r["row"]["soft"] for r in done["labels-1"].rows])
    torch.testing.assert_close(soft.sum(-1), torch.ones(16))


def test_a_row_without_a_soft_label_and_an_empty_pool_are_named():
    view = view_of()
    moved(view)
    with pytest.raises(LuthierError, match="no soft label"):
        Distill().plan(Window([collate(cloze(2, 0))], Clock(0, 10)), Probe(view, Distill()))
    lab = Lab({"labelled": cloze(4, 0), "unlabelled": []})
    with pytest.raises(LuthierError, match="pool of unlabelled rows is empty"):
        run_pipeline(List(rounds=1, labelled_epochs=1, rank=2), view_of(), lab)
