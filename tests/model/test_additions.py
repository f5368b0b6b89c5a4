"""Several adapters on one layer: what they compute together, their way off in any order, their derivatives and cost."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from luthier.kernels.linear import low_rank_linear
from luthier.model.adapters import ADAPTERS, Fixed
from luthier.model.additions import around, bare_copy, low_rank_adapter, oriented, output_adapter, register
from luthier.objectives.sft import Sft
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import Adapter, Dept, Full, Lift, Lora, Peft, Spiel
from luthier.update import Dense, LowRank, Modules, Prompt, Replace, Sparse, Update

SETTINGS = TrainSettings(
    max_steps=3, batch_size=4, learning_rate=1e-2, shuffle=False, lr_scheduler_type="constant", warmup_fraction=0
)


def draw(*shape, seed=0, std=0.3):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layer(kind):
    """A layer with a bias: nn.Linear of BERT, Conv1D of GPT-2."""
    module = tiny(kind).get_submodule(
        {"bert": "bert.encoder.layer.0.intermediate.dense", "gpt2": "transformer.h.0.mlp.c_fc"}[kind]
    )
    with torch.no_grad():
        module.bias.normal_(generator=torch.Generator().manual_seed(9))
    return module.requires_grad_(False)


def adapters(module):
    """name -> (how to add it, what it adds to the weight or puts behind it)."""
    out, width = oriented(module).shape
    low = {n: (draw(r, width, seed=i), draw(out, r, seed=i)) for i, (n, r) in enumerate((("one", 3), ("two", 2)))}
    behind = {n: (draw(4, out, seed=i), draw(out, 4, seed=i)) for i, n in ((5, "three"), (6, "four"))}

    def add_low(a, b, own):
        if not own:
            return [low_rank_adapter(module, Fixed(a), Fixed(b), 0.7).undo]
        (get_a, undo_a), (get_b, undo_b) = (register(module, n, torch.nn.Parameter(t)) for n, t in (("a", a), ("b", b)))
        return [undo_a, undo_b, low_rank_adapter(module, get_a, get_b, 0.7).undo]

    add = {n: lambda ab=ab, n=n: add_low(*ab, own=n == "one") for n, ab in low.items()}
    add |= {n: lambda ab=ab: [output_adapter(module, Fixed(ab[0]), Fixed(ab[1])).undo] for n, ab in behind.items()}
    return add, low, behind


def formula(module, x, low, behind):
    """(I + B' A') ((W + sum s B A) x + bias), each product written out."""
    h = x @ (oriented(module) + sum(0.7 * b @ a for a, b in low.values())).T + module.bias
    for a, b in behind.values():
        h = h + h @ a.T @ b.T
    return h


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("order", list(itertools.permutations(("one", "two", "three"))), ids="-".join)
def test_three_on_a_layer_come_and_go_in_any_order(kind, order):
    module = layer(kind)
    x, own = draw(5, 32), set(module._parameters)
    base = module(x)
    add, low, behind = adapters(module)
    for leaving in itertools.permutations(order):
        undo = {n: add[n]() for n in order}
        left = set(order)
        for name in [None, *leaving]:
            if name is not None:
                for step in undo[name]:
                    step()
                left.discard(name)
            wanted = formula(
                module, x, {n: v for n, v in low.items() if n in left}, {n: v for n, v in behind.items() if n in left}
            )
            torch.testing.assert_close(module(x), wanted, atol=1e-5, rtol=1e-5)
        assert torch.equal(module(x), base)
        assert "forward" not in vars(module) and ADAPTERS not in vars(module) and set(module._parameters) == own


def test_what_takes_the_output_does_so_in_the_order_it_came():
    module, x = layer("bert"), draw(5, 32)
    add, _, behind = adapters(module)
    for order in (("three", "four"), ("four", "three")):
        undo = [step for n in order for step in add[n]()]
        torch.testing.assert_close(
            module(x), formula(module, x, {}, {n: behind[n] for n in order}), atol=1e-5, rtol=1e-5
        )
        for step in undo:
            step()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_one_alone_is_the_fused_kernel_to_the_bit_and_several_share_it(kind, monkeypatch):
    module, x, calls = layer(kind), draw(5, 32), []
    add, low, _ = adapters(module)

    def counted(*args):
        calls.append(args[3].shape[0])
        return low_rank_linear(*args)

    monkeypatch.setattr("luthier.model.adapters.low_rank_linear", counted)
    add["one"]()
    a, b = low["one"]
    assert torch.equal(module(x), low_rank_linear(x, oriented(module), module.bias, a, b, 0.7))
    assert calls == [3]
    add["two"]()
    module(x)
    assert calls == [3, 5], "one product of rank 3 + 2"
    low_rank_adapter(module, Fixed(a), Fixed(b), 0.7, dropout=0.5)
    module.eval()(x)
    module.train()(x)
    assert calls == [3, 5, 8, 5], "what drops out stands apart while training"


def test_in_bf16_two_adapters_and_the_product_are_rounded_once():
    """Added to a result that is on bf16's grid already, a young adapter would be rounded twice."""
    module = torch.nn.Linear(64, 512, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        module.weight.copy_(draw(512, 64))
    x = draw(256, 64, std=1.0).bfloat16()
    pairs = [(draw(4, 64), draw(512, 4)), (draw(2, 64, seed=3, std=0.05), draw(512, 2, seed=3, std=0.05))]
    exact = x.double() @ module.weight.double().T
    for a, b in pairs:
        exact += x.double() @ a.bfloat16().double().T @ b.bfloat16().double().T
    low_rank_adapter(module, Fixed(pairs[0][0]), Fixed(pairs[0][1]), 1.0)
    last = module(x) + (x @ pairs[1][0].bfloat16().T) @ pairs[1][1].bfloat16().T
    low_rank_adapter(module, Fixed(pairs[1][0]), Fixed(pairs[1][1]), 1.0)
    off = [float((y.double() - exact).square().mean()) for y in (module(x), last)]
    assert off[0] < 0.7 * off[1], off


def test_dropout_of_one_leaves_the_other_alone():
    module, x = layer("bert"), draw(5, 32)
    _, low, _ = adapters(module)
    (a1, b1), (a2, b2) = low["one"], low["two"]
    low_rank_adapter(module, Fixed(a1), Fixed(b1), 0.7, dropout=0.5)
    low_rank_adapter(module, Fixed(a2), Fixed(b2), 0.7)
    module.train()
    torch.manual_seed(1)
    seen = module(x)
    torch.manual_seed(1)
    kept = F.dropout(torch.ones_like(x), 0.5)
    wanted = formula(module, x, {"two": low["two"]}, {}) + 0.7 * (x * kept) @ a1.T @ b1.T
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-5)
    module.eval()
    torch.testing.assert_close(module(x), formula(module, x, low, {}), atol=1e-5, rtol=1e-5)
    a3, b3 = draw(2, 32, seed=8), draw(64, 2, seed=8)
    low_rank_adapter(module, Fixed(a3), Fixed(b3), 0.5, dropout=0.25)
    module.train()
    torch.manual_seed(1)
    both = module(x)
    torch.manual_seed(1)
    F.dropout(torch.ones_like(x), 0.5)
    kept = F.dropout(torch.ones_like(x), 0.25)
    torch.testing.assert_close(both, seen + 0.5 * (x * kept) @ a3.T @ b3.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trains", [True, False])
def test_gradients_are_autograds(trains):
    """The gradients of the input, of both factors, and of the layer's own weight and bias where these train."""
    module = layer("gpt2").requires_grad_(trains)
    x = draw(5, 32).requires_grad_()
    add, low, behind = adapters(module)
    for name in ("one", "two", "three"):
        add[name]()
    a, b = module.luthier_a, module.luthier_b
    leaves = [x, a, b, *((module.weight, module.bias) if trains else ())]
    along = draw(5, len(module.bias), seed=4)
    seen = torch.autograd.grad((module(x) * along).sum(), leaves)
    expected = torch.autograd.grad(
        (formula(module, x, {"one": (a, b), "two": low["two"]}, {"three": behind["three"]}) * along).sum(), leaves
    )
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)


def test_forward_mode_passes_through_all_of_them():
    """The derivative along a step equals the gradient times the step, whichever of the factors on a layer moves."""
    view, batch = view_of(), batch_of()
    first, second = Lora(rank=2, seed=1).attach(view), Lora(rank=3).attach(view)
    third = Adapter(rank=2, init_std=0.1).attach(view)
    move(first, second)
    every = [p for t in (first, second, third) for p in t.parameters()]
    for p in every:
        p.requires_grad_(True)
    loss = lambda: (view.trace(batch).hidden[-1] * draw(batch.num_tokens, 32)).sum()  # noqa: E731
    loss().backward()
    names = ["luthier_a", "luthier_b", "luthier_a_2", "luthier_b_2", "luthier_a_3", "luthier_b_3"]
    for name in [f"model.layers.1.mlp.down_proj.{n}" for n in names]:
        p = view.module.get_parameter(name)
        assert any(p is q for q in every)
        step = draw(*p.shape, seed=7, std=1.0)
        _, slope = Probe(view, Sft()).jvp(loss, {name: step})
        assert float(slope) == pytest.approx(float((p.grad * step).sum()), rel=1e-3, abs=1e-3)
        assert abs(float(slope)) > 1e-2, name


def move(*trainables, std=0.2):
    for i, t in enumerate(trainables):
        with torch.no_grad():
            for k, p in enumerate(t.parameters()):
                p.copy_(draw(*p.shape, seed=100 * i + k, std=std))


def update_of(tuner, kind="llama"):
    trainable = tuner.attach(view_of(kind))
    move(trainable)
    return trainable.update()


def test_a_bare_copy_of_a_layer_with_several():
    view, batch = view_of(), batch_of((7,))
    block = view.block(1)
    plain = copy.deepcopy(view_of().block(1))
    first, second, third = Lora(rank=2).attach(view), Adapter(rank=2).attach(view), Lora(rank=3, seed=1).attach(view)
    move(first, second, third)
    around(block, lambda beneath: lambda *args, **kwargs: beneath(*args, **kwargs) * 0)
    out = bare_copy(block, {})
    assert [n for n, _ in out.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any({"forward", ADAPTERS} & set(vars(m)) for m in out.modules())
    trace = view.trace(batch, (1, -1))
    hidden = trace.hidden[1]
    assert torch.equal(view.run_block(out, hidden, trace), view.run_block(plain, hidden, trace))
    with pytest.raises(LuthierError, match="a copy of one with adapters"):
        low_rank_adapter(copy.deepcopy(block).mlp.up_proj, Fixed(draw(2, 32)), Fixed(draw(64, 2)), 1.0)


# --- updates on updates, and on tuners ---


def parts():
    """One update of every kind on the tiny model."""
    view = view_of()
    weight, matrix = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj"
    shapes = view.anatomy.parameters
    dora = Peft(options={"r": 2, "use_dora": True}).attach(view)
    move(dora)
    with_dora = dora.update()
    dora.detach()
    return view.base, {
        "low-rank": update_of(Lora(rank=3)),
        "modules": update_of(Adapter(rank=3)),
        "dense": Update(view.base, (Dense({weight: draw(*shapes[weight])}),)),
        "sparse": Update(
            view.base, (Sparse({weight: torch.arange(0, 900, 7)}, {weight: draw(129)}, {weight: shapes[weight]}),)
        ),
        "replace": Update(view.base, (Replace({"model.layers.0.input_layernorm.weight": draw(32, std=1.0)}),)),
        "prompt": Update(view.base, (Prompt(draw(3, 32), draw(5, 32)),)),
        "deeper": Update(view.base, (Modules({matrix: draw(2, 32, seed=8)}, {matrix: draw(32, 2, seed=8)}),)),
        "peft": with_dora,
    }


BASE, PARTS = parts()
PAIRS = [p for p in itertools.permutations(PARTS, 2) if set(p) != {"low-rank", "peft"}]  # see below


@pytest.mark.parametrize(("outer", "inner"), PAIRS, ids=["-".join(p) for p in PAIRS])
def test_an_update_bound_in_another_is_both_and_goes_alone(outer, inner):
    view, plain, batch = view_of(), tiny(), batch_of()
    states = lambda: view.trace(batch).hidden[-1].detach()  # noqa: E731
    base, first, second = states(), PARTS[outer], PARTS[inner]
    with first.bind(view):
        alone = states()
        with second.bind(view):
            both = states()
            with first.bind(view) if {outer, inner}.isdisjoint({"peft"}) else view_itself():
                pass  # even a third time
            assert torch.equal(states(), both)
        assert torch.equal(states(), alone)
    assert torch.equal(states(), base)
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in view.module.named_parameters())
    assert not any(ADAPTERS in vars(m) or "forward" in vars(m) for m in view.module.modules())
    if {outer, inner} != {"low-rank", "peft"}:  # DoRA takes norms of weights; one update has the difference in them
        together = Update(BASE, (*first.parts, *second.parts))  # the kinds in their order, those behind in ours
        with together.bind(view):
            torch.testing.assert_close(states(), both, atol=2e-5, rtol=1e-4)
    assert min(float((both - x).abs().max()) for x in (alone, base)) > 1e-3


def test_a_low_rank_term_and_doras_norms_are_refused_in_both_orders_and_one_update_has_both():
    """DoRA divides by the norms of the weight, which a term beside it is not in; in one update it lies in the weight."""
    for outer, inner in (("low-rank", "peft"), ("peft", "low-rank")):
        view = view_of()
        with PARTS[outer].bind(view):
            seen = view.trace(batch_of()).hidden[-1]
            with pytest.raises(
                LuthierError, match=r"DoRA.* norms would not see .*; put the low-rank update into the weights"
            ):
                PARTS[inner].bind(view).__enter__()
            assert torch.equal(view.trace(batch_of()).hidden[-1], seen)
    with PARTS["peft"].bind(view), pytest.raises(LuthierError, match="DoRA"):
        Lora(rank=2).attach(view)
    merged = view_of()
    assert merged.base.same_base(BASE)  # asked before its weights change
    PARTS["low-rank"].merge_into(merged.module)
    with Update(BASE, (*PARTS["low-rank"].parts, *PARTS["peft"].parts)).bind(view), PARTS["peft"].bind(merged):
        torch.testing.assert_close(
            view.trace(batch_of()).hidden[-1], merged.trace(batch_of()).hidden[-1], atol=2e-5, rtol=1e-4
        )


def view_itself():
    from contextlib import nullcontext

    return nullcontext()


def test_two_low_rank_updates_in_one_another_are_their_sum():
    view, batch = view_of("gpt2"), batch_of()
    one, two = update_of(Lora(rank=3), "gpt2"), update_of(Lora(rank=2, seed=4), "gpt2")
    with one.bind(view), two.bind(view, scale=0.5):
        nested = view.trace(batch).hidden[-1]
    with (one + 0.5 * two).bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], nested, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tuner", [Lora(rank=3), Full(), Spiel(density=0.2)], ids=["lora", "full", "spiel"])
def test_training_goes_on_from_a_low_rank_update(tuner):
    """The same losses as on a base with that update merged in; the sum of both updates is the result."""
    first, rows, batch = update_of(Lora(rank=2, seed=5, targets=("q_proj", "up_proj"))), rows_of(), batch_of()
    view, merged = view_of(), view_of()
    first.merge_into(merged.module)
    with first.bind(view):
        loop = Loop(view, rows, tuner.attach(view, total_steps=3), Sft(), SETTINGS)
        wanted = Loop(merged, rows, tuner.attach(merged, total_steps=3), Sft(), SETTINGS)
        losses = [(loop.step()["loss"], wanted.step()["loss"]) for _ in range(3)]
        assert [x for x, _ in losses] == pytest.approx([y for _, y in losses], abs=1e-5)
        assert losses[2][0] < losses[0][0] - 0.05
        live, second = view.trace(batch).hidden[-1].detach(), loop.trainable.update()
        loop.trainable.detach()
    assert all(torch.equal(p, tiny().get_parameter(n)) for n, p in view.module.named_parameters())
    with (first + second).bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], live, atol=1e-5, rtol=1e-4)


TUNERS = {
    "lora": Lora(rank=3), "adapter": Adapter(rank=2, init_std=0.1), "peft": Peft(type="IA3"), "full": Full(),
    "spiel": Spiel(density=0.05), "lift": Lift(density=0.1), "dept": Dept(budget_length=12, length=4, max_length=16),
}  # fmt: skip


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("name", ["low-rank", "modules", "prompt", "peft"])
@pytest.mark.parametrize("first_off", ["tuner", "update"])
def test_an_update_over_or_under_a_tuner_and_off_in_any_order(tuner, name, first_off):
    if tuner == name == "peft" or (tuner, name) == ("lora", "peft"):  # refused, as others say
        return
    view, plain, batch = view_of(), tiny(), batch_of()
    states = lambda: view.trace(batch).hidden[-1].detach()  # noqa: E731
    base = states()
    with PARTS[name].bind(view):
        under = states()
    seen = []
    for update_first in (True, False):
        update = PARTS[name].bind(view)
        if update_first:
            update.__enter__()
        trainable = TUNERS[tuner].attach(view, total_steps=4)
        if tuner in ("spiel", "lift"):
            trainable.sparse.write(torch.Generator())
        move(trainable, std=0.1)
        if tuner in ("spiel", "lift"):
            trainable.sparse.write(torch.Generator())
        alone = states()
        if not update_first:
            update.__enter__()
        seen.append(states())
        if first_off == "tuner":
            trainable.detach()
            torch.testing.assert_close(states(), under, atol=1e-6, rtol=1e-5)
            update.__exit__(None, None, None)
        else:
            update.__exit__(None, None, None)
            if not update_first:
                torch.testing.assert_close(states(), alone, atol=1e-6, rtol=1e-5)
            trainable.detach()
        assert torch.equal(states(), base)
        assert [n for n, _ in view.module.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert all(
            torch.equal(p, plain.get_parameter(n)) and p.requires_grad for n, p in view.module.named_parameters()
        )
        assert not view.input_hooks and not view.attached
        assert not any(ADAPTERS in vars(m) or {"forward", "generate"} & set(vars(m)) for m in view.module.modules())
    if {tuner, name} not in (
        {"prompt", "dept"},
        {"modules", "adapter"},
    ):  # among these the order is a part of the meaning
        torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-4)
    assert float((seen[0] - under).abs().max()) > 1e-4


def test_two_trainables_leave_in_any_order_and_flags_come_back():
    for order in itertools.permutations(range(3)):
        view = view_of()
        view.weight("model.norm.weight").requires_grad_(False)
        flags = {n: p.requires_grad for n, p in view.module.named_parameters()}
        trainables = [
            Lora(rank=2).attach(view),
            Full(train_embeddings=False).attach(view),
            Adapter(rank=2).attach(view),
        ]
        for i in order:
            assert not view.embedding.weight.requires_grad
            trainables[i].detach()
        assert {n: p.requires_grad for n, p in view.module.named_parameters()} == flags


def test_entries_of_one_layer_train_once():
    view = view_of()
    Spiel(density=0.05).attach(view, total_steps=4)
    with pytest.raises(LuthierError, match=r"entries of model.*_proj.weight train already; detach that tuner first"):
        Lift(density=0.1).attach(view, total_steps=4)
    assert len(view.attached) == 1


def test_under_householder_reflections_nothing_else_would_be_heard():
    view = view_of()
    reflected = Peft(type="HRA", options={"r": 4}).attach(view)
    for tuner in (Lora(rank=2), Full(), Adapter(rank=2)):
        with pytest.raises(LuthierError, match=r"q_proj|proj.*has an adapter of peft's HRA, under which nothing else"):
            tuner.attach(view)
    reflected.detach()
    view = view_of()
    trainable = Lora(rank=2).attach(view)
    with pytest.raises(LuthierError, match="peft's HRA would pass over the adapter that is on it; detach it first"):
        Peft(type="HRA", options={"r": 4}).attach(view)
    with pytest.raises(LuthierError, match="peft would train a copy of a layer with adapters on it"):
        Peft(options={"r": 2, "modules_to_save": ["up_proj"]}, targets=("q_proj",)).attach(view)
    move(trainable)
    assert not torch.equal(view.trace(batch_of()).hidden[-1], view_of().trace(batch_of()).hidden[-1])


def test_a_forward_that_somebody_else_put_there_is_used_and_comes_back():
    module, x = layer("bert"), draw(5, 32)
    foreign = lambda h: F.linear(h, module.weight, module.bias) * 2  # noqa: E731
    module.forward = foreign
    a, b = draw(2, 32), draw(64, 2)
    undo = low_rank_adapter(module, Fixed(a), Fixed(b), 0.5).undo
    torch.testing.assert_close(module(x), foreign(x) + 0.5 * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)
    undo()
    assert module.forward is foreign


def test_the_plain_call_sees_a_bound_prompt_and_a_trained_one():
    view, row = view_of(), rows_of((9,), answer=4)[0]
    ids, prompt = torch.tensor([row["ids"]]), torch.tensor([row["token"]["prompt"]])
    from luthier.data.batch import collate

    with PARTS["prompt"].bind(view):
        trainable = TUNERS["dept"].attach(view)
        move(trainable)
        ours = view.trace(collate([row])).hidden[-1] @ view.head_weight.T
        torch.testing.assert_close(view.module(input_ids=ids, prompt_mask=prompt).logits[0], ours, atol=1e-5, rtol=1e-5)
        text = view.module.generate(input_ids=ids[:, :5], max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert text.shape == (1, 8)
        trainable.detach()
    assert torch.equal(view.module(input_ids=ids).logits, tiny().eval()(input_ids=ids).logits)


def test_updates_of_several_low_rank_parts_bind_as_they_are():
    """One Update may hold two parts on the same layers."""
    one, two = update_of(Lora(rank=3)), update_of(Lora(rank=2, seed=4))
    view, batch = view_of(), batch_of()
    assert all(isinstance(p, LowRank) for p in (*one.parts, *two.parts))
    with Update(BASE, (*one.parts, *two.parts)).bind(view):
        seen = view.trace(batch).hidden[-1]
    with (one + two).bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], seen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "sparse", "replace"])
@pytest.mark.parametrize("update_first", [True, False])
def test_what_writes_over_weights_leaves_in_turn_or_is_refused(name, update_first):
    """Each gives back what it found, so that out of turn the base would be lost."""
    view, plain = view_of(), tiny()
    update = PARTS[name].bind(view)
    if update_first:
        update.__enter__()
    trainable = Full().attach(view)
    if not update_first:
        update.__enter__()
        with pytest.raises(
            LuthierError, match=r"Bound came later and changed model.* too; take it off before DenseTrainable"
        ):
            trainable.detach()
        update.__exit__(None, None, None)
        trainable.detach()
    else:
        with pytest.raises(
            LuthierError, match=r"DenseTrainable came later and changed model.* too; take it off before Bound"
        ):
            update.__exit__(None, None, None)
        trainable.detach()
        view.attached[0].changes[0].undo()
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in view.module.named_parameters())
