"""The ledger's formulas against torch's own counter, for every tuner and objective, in both layouts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from helpers.cloze import cloze
from helpers.examples import EXAMPLES
from luthier.compute.lemo import Lemo
from luthier.model.meter import Meter, svd_flops
from luthier.objectives.sft import Sft
from luthier.step.lab import Lab
from luthier.testing.contract import CONSTANT, SETTINGS
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.adapter import Adapter
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

EQUAL = (12, 12, 12, 12)  # one length: the short-attention kernel then computes no padding


def loop_of(tuner, objective, layout="flat", rows=None, compute=None, kind="llama", **changes):
    view = view_of(kind)
    view.layout, view._native_attention = layout, "eager"  # torch's counter does not see the fused kernel
    closure = "closure" in tuner.traits.needs
    settings = SETTINGS.model_copy(update={**(CONSTANT if closure else {}), "max_steps": 6, **changes})
    trainable = tuner.attach(view, total_steps=6)
    lab = Lab({"labelled": cloze(6, 5)})
    return Loop(view, rows or rows_of(EQUAL, answer=5), trainable, objective, settings, lab=lab, compute=compute)


def product(into, a, b, **_):
    return 2 * a[0] * a[1] * b[1]


def attention(query, key, value, *_, **__):
    return sdpa_flop_count(query, key, value)


LEFT_OUT = {  # by torch's counter
    torch.ops.aten.addmm_: product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
}


def counted(loop, steps=1):
    with FlopCounterMode(display=False, custom_mapping=LEFT_OUT) as counter:
        for _ in range(steps):
            loop.step()
    return counter.get_total_flops()


# peft's DoRA multiplies its factors out once a layer; torch's forward mode takes products with derivatives that are zero.
TOLERANCE = {"peft": 0.35, "distill": 0.1, "lift": 0.02}
TUNERS = [e for e in EXAMPLES if e.kind == "tuner" and e.trains]
OBJECTIVES = [e for e in EXAMPLES if e.kind == "objective"]


@pytest.mark.parametrize("tuner", TUNERS, ids=[e.name for e in TUNERS])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_every_tuners_step_takes_what_torch_counts(tuner, layout):
    loop = loop_of(tuner.method, Sft(), layout)
    torch_says = counted(loop, steps=3)
    spent = loop.progress.flops
    choosing = spent["select"] if tuner.name == "lift" else 0.0  # a decomposition, which torch's counter does not know
    assert sum(spent.values()) - choosing == pytest.approx(torch_says, rel=TOLERANCE.get(tuner.name, 0.01))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=[e.name for e in OBJECTIVES])
def test_every_objectives_step_takes_what_torch_counts(objective):
    loop = loop_of(Lora(rank=4), objective.method, rows=objective.rows)
    torch_says = counted(loop, steps=3)
    assert sum(loop.progress.flops.values()) == pytest.approx(torch_says, rel=TOLERANCE.get(objective.name, 0.01))


LAST = ("layers.2.mlp.down_proj", "layers.2.self_attn.o_proj")  # the second one's input wants no gradient


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize(
    "tuner",
    [Lora(rank=4), Lora(rank=4, targets=LAST), Adapter(rank=3), Full(), Spiel(density=0.05)],
    ids=["lora", "lora above", "adapter", "full", "spiel"],
)
def test_what_hangs_below_a_tuner_is_counted(layout, tuner):
    """A low-rank and an output adapter are bound on the layers that a tuner works on."""
    below = [t.attach(view_of()).update() for t in (Lora(rank=6, seed=1), Adapter(rank=5, init_std=0.1))]
    view = view_of()
    view.layout, view._native_attention = layout, "eager"
    with below[0].bind(view), below[1].bind(view):
        settings = SETTINGS.model_copy(update={"max_steps": 3})
        loop = Loop(view, rows_of(EQUAL, answer=5), tuner.attach(view, total_steps=3), Sft(), settings)
        torch_says = counted(loop, steps=2)
    assert sum(loop.progress.flops.values()) == pytest.approx(torch_says, rel=0.01)


def test_a_derivative_takes_the_factors_it_is_along():
    """T rows, W [out, in] with A [3, in] and B [out, 3]: two products each, and one more for what moves itself."""
    view, batch = view_of(), batch_of((8,))
    trainable = Lora(rank=3, targets=("layers.0.mlp.up_proj",)).attach(view)
    (name,) = trainable.a
    layer = view.layer(name.removesuffix(".weight"))
    (out, width), meter = view.weight(name).shape, view.meter
    with meter.watching(layer), torch.no_grad():
        for along, expected in (
            ([], 2 * (out * width + 3 * width + 3 * out)),
            (["luthier_b"], 2 * (out * width + 3 * width + 3 * out) + 3 * out),
            (["weight", "luthier_a"], 3 * (out * width + 3 * width) + 2 * 3 * out),
        ):
            before = meter.total
            with meter.derivative(view.module, [f"{name.removesuffix('.weight')}.{n}" for n in along]):
                layer(torch.ones(batch.num_tokens, width))
            assert meter.total - before == 2 * batch.num_tokens * expected


def test_scoring_and_training_are_charged_apart():
    from luthier.objectives.q_tuning import QTuning

    loop = loop_of(Lora(rank=4), QTuning(keep_rows=0.5))
    loop.step()
    spent = loop.progress.flops
    plain = loop_of(Lora(rank=4), Sft())
    plain.step()
    assert 0 < spent["plan"] < spent["train"] and spent["train"] == pytest.approx(
        plain.progress.flops["train"] / 2, rel=0.02
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt2", "opt", "lfm2"])
def test_other_architectures(kind):
    for tuner in (Full(), Lora(rank=4)):
        loop = loop_of(tuner, Sft(), kind=kind)
        torch_says = counted(loop)
        assert sum(loop.progress.flops.values()) == pytest.approx(torch_says, rel=0.03), tuner


def test_a_checkpointed_forward_is_counted_twice_and_its_backward_once():
    loop = loop_of(Lora(rank=4), Sft(), gradient_checkpointing=True)
    assert sum(loop.progress.flops.values()) == 0
    torch_says = counted(loop)
    assert sum(loop.progress.flops.values()) == pytest.approx(torch_says, rel=0.01)


def test_left_out_tokens_cost_nothing():
    rows = rows_of((32, 32), answer=5)
    loop = loop_of(Adapter(rank=2, init_std=0.05), Sft(), rows=rows, compute=Lemo(block_size=4), batch_size=2)
    torch_says = counted(loop)
    assert sum(loop.progress.flops.values()) == pytest.approx(torch_says, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_mlps_pruned_backward_costs_what_is_left(checkpointing):
    tuner = Lora(rank=4, targets=("q_proj", "v_proj"))
    compute = Lemo(keep_fraction=1.0, mlp_prune_fraction=0.75)
    loop = loop_of(tuner, Sft(), compute=compute, gradient_checkpointing=checkpointing)
    torch_says = counted(loop)
    assert sum(loop.progress.flops.values()) == pytest.approx(torch_says, rel=0.01)


def test_generation_with_its_cache():
    model, meter = tiny().eval(), Meter()
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 97, (3, 7))
    with meter.watching(model), meter.stage("generate"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert meter.flops == {"generate": pytest.approx(counter.get_total_flops(), rel=0.01)}
    before = meter.total
    with torch.no_grad():
        model(ids)
    assert meter.total == before, "nothing is counted that is not watched"


def test_a_decomposition_costs_the_same_lying_down():
    assert svd_flops(4, 8) == svd_flops(8, 4) == 14 * 8 * 16 + 8 * 64
