"""The exact checks of the sheet; numbers in names are the sheet's."""

import pytest
import torch
import torch.nn.functional as F

from luthier.data.batch import IGNORE, collate
from luthier.integrations.own_loop import Loss, as_batch
from luthier.method import Facts
from luthier.model.view import ModelView
from luthier.objectives.base import Clock, Forward, Window
from luthier.objectives.caft import Caft, further_labels, schedule_weight
from luthier.objectives.sft import Sft
from luthier.pipelines.stages import Stage
from luthier.step.probe import Probe
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.dept import Dept
from luthier.tuners.frozen import Frozen
from luthier.tuners.full import Full
from luthier.tuners.lora import Lora


def planned(view, objective, batch, clock=Clock(0, 10)):  # noqa: B008
    extra = objective.extend(view)
    window, counts = objective.plan(Window([batch], clock), Probe(view, objective, extra))
    return Forward(window.micro[0], view, extra), counts


def test_1_weight_zero_is_sft_to_the_bit():
    ends = []
    for objective in (Sft(), Caft(weight=0.0, allow_untrained_heads=True)):
        view = view_of()
        loop = Loop(view, rows_of(), Lora(rank=4).attach(view), objective, TrainSettings(max_steps=3, batch_size=4))
        ends.append([loop.step()["loss"] for _ in range(3)] + [float(p.sum()) for p in loop.trainable.parameters()])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_2_copied_heads_predict_what_the_model_does(kind, layout):
    view, objective = view_of(kind), Caft(allow_untrained_heads=True)
    view.layout = layout
    fwd, _ = planned(view, objective, batch_of())
    last = len(view.anatomy.blocks) - 1
    for block in fwd.extra.blocks:
        torch.testing.assert_close(objective._state(fwd, block, last), fwd.hidden(), atol=1e-5, rtol=1e-5)


def test_3_shift_equals_a_plain_cross_entropy():
    view, objective = view_of(), Caft(allow_untrained_heads=True)
    rows = rows_of((12,), answer=6)
    batch = collate(rows)
    fwd, counts = planned(view, objective, batch)
    with torch.no_grad():
        for p in fwd.extra.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    terms = objective.loss(fwd)
    labels = torch.tensor(rows[0]["labels"])
    for i in range(1, 5):
        z = objective._state(fwd, fwd.extra.blocks[i - 1], 2) @ view.head_weight.T
        expected = F.cross_entropy(z[: -(1 + i)], labels[1 + i :], ignore_index=IGNORE, reduction="sum")
        assert float(terms[f"ahead_{i}"].sums) == pytest.approx(float(expected), abs=1e-4)
    assert counts["ahead.4"] == 6.0  # some of them inside the prompt


def test_3_changing_a_label_moves_one_position():
    batch = batch_of((10,), answer=6)
    for i in range(1, 5):
        base = further_labels(batch, i)
        labels = batch.labels.clone()
        labels[7] = 3  # what position 7 predicts, token 8
        changed = (further_labels(type(batch)(**{**vars(batch), "labels": labels}), i) != base).nonzero().squeeze(1)
        assert changed.tolist() == [7 - i]


def test_3_labels_stay_within_their_sequence():
    batch = batch_of((5, 6), answer=3)
    for i in range(1, 5):
        ahead = further_labels(batch, i)
        for s in range(2):
            alone = further_labels(batch.select(torch.tensor([s])), i)
            assert torch.equal(ahead[batch.seq == s], alone)


PADDING = {"none": (0, 0), "right": (0, 3), "left": (3, 0)}


def padded(ids, side):
    """[S, L] rows as transformers pads them, with their mask."""
    left, right = PADDING[side]
    pad = lambda x, value: F.pad(x, (left, right), value=value)  # noqa: E731
    return {"input_ids": pad(ids, 0), "attention_mask": pad(torch.ones_like(ids), 0), "labels": pad(ids, IGNORE)}


def head_states(attention, layout, side, wiring, ids):
    """[heads, S, L, D] what each head hands to the vocabulary matrix, of rows padded on a side."""
    module = tiny().eval()
    module.set_attn_implementation(attention)
    view = ModelView(module, layout=layout)
    objective = Caft(allow_untrained_heads=True, wiring=wiring)
    fwd, _ = planned(view, objective, as_batch(padded(ids, side)))
    states = [objective._state(fwd, block, 2).detach() for block in fwd.extra.blocks]
    return torch.stack(states).view(4, *ids.shape, -1)


@pytest.mark.parametrize("wiring", ["parallel", "official"])
@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize(("attention", "layout"), [("eager", "padded"), ("sdpa", "padded"), ("sdpa", "flat")])
def test_4_heads_do_not_see_the_future_nor_padding(attention, layout, side, wiring):
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 90
    here, there = (head_states(attention, layout, side, wiring, x) for x in (ids, other))
    torch.testing.assert_close(here[:, :, :-1], there[:, :, :-1], atol=1e-6, rtol=0)
    assert (here[:, :, -1] - there[:, :, -1]).abs().amax(-1).min() > 1e-3, (
        "every head sees the last token where it stands"
    )
    alone = torch.cat([head_states("eager", "padded", "none", wiring, ids[i : i + 1]) for i in range(2)], dim=1)
    torch.testing.assert_close(here, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_4_padding_changes_no_loss_and_no_gradient(side):
    """Through the loss as transformers' loops have it."""
    ids, found = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0)), []
    for where in ("none", side):
        model = tiny()
        loss = Loss(Caft(allow_untrained_heads=True, weight=0.5), model)
        value = loss(padded(ids, where))
        value.backward()
        found.append([value.detach(), model.model.layers[0].mlp.up_proj.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_5_schedule():
    quarters = {
        "rsine": [1.0, 0.92388, 0.70711, 0.38268, 0.0],
        "sine": [0.0, 0.38268, 0.70711, 0.92388, 1.0],
        "linear": [0.0, 0.25, 0.5, 0.75, 1.0],
        "constant": [1.0] * 5,
    }
    for name, wanted in quarters.items():
        values = [schedule_weight(name, Clock(s, 100)) for s in (0, 25, 50, 75, 100)]
        assert values == pytest.approx(wanted, abs=1e-5), name
        assert schedule_weight(name, Clock(0, 0)) == 1.0
    view, objective = view_of(), Caft(stage="heads")
    fwd, _ = planned(view, objective, batch_of())
    assert [t.weight for t in objective.loss(fwd).values()] == pytest.approx([0.8, 0.64, 0.512, 0.4096])


# --- the loss written out: a Llama in plain torch, one row at a time ---


def norm_of(x, norm):
    return x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight


def turned(x, theta=10_000.0):
    """[H, L, d] with rotary positions 0..L-1."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def layer_of(block, h):
    """[L, D] -> [L, D]: one decoder layer, each position seeing itself and what is before it."""
    a, x, length = block.self_attn, norm_of(h, block.input_layernorm), len(h)
    q, k, v = (p(x).view(length, -1, 8).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))  # 4, 2 and 2 heads
    q, k, v = turned(q), turned(k).repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    scores = (q @ k.transpose(1, 2)) / 8**0.5
    future = torch.ones(length, length).triu(1).bool()
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    h = h + a.o_proj(mixed.transpose(0, 1).reshape(length, -1))
    x = norm_of(h, block.post_attention_layernorm)
    return h + block.mlp.down_proj(F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x))


def written_out(model, heads, rows, wiring, stage, weight, decay):
    """l_0 + weight sum decay^i l_i, each a mean over its own targets in all rows; without l_0 in the first stage."""
    body, losses = model.model, [[] for _ in range(1 + len(heads))]
    for row in rows:
        h = body.embed_tokens(torch.tensor(row["ids"]))
        for block in body.layers[:-1]:
            h = layer_of(block, h)
        before, final = h, norm_of(layer_of(body.layers[-1], h), body.norm)
        reads = before if wiring == "parallel" or stage == "heads" else final
        states = [layer_of(head, reads) for head in heads]
        states = [norm_of(x, body.norm) for x in states] if wiring == "parallel" else states
        for i, state in enumerate([final, *states]):
            log_p = (state @ model.lm_head.weight.T).log_softmax(-1)
            for t, y in enumerate(row["labels"]):  # unshifted: row["labels"][t] is the token at t
                if y != IGNORE and t - 1 - i >= 0:
                    losses[i].append(-log_p[t - 1 - i, y])
    means = [torch.stack(x).mean() for x in losses]
    ahead = sum(decay**i * m for i, m in enumerate(means) if i)
    return ahead if stage == "heads" else means[0] + weight * ahead


@pytest.mark.parametrize("limit", [10_000, 1])
@pytest.mark.parametrize("stage", ["heads", "tune"])
@pytest.mark.parametrize("wiring", ["parallel", "official"])
def test_the_loss_and_its_gradient_are_those_written_out(wiring, stage, limit):
    rows = rows_of((9, 5, 12, 7), answer=4)
    rows[1]["labels"] = [IGNORE, rows[1]["ids"][1], *[IGNORE] * 3]  # no head looks that far
    view = view_of()
    objective = Caft(
        stage=stage, wiring=wiring, weight=0.5, decay=0.7, ahead=4, schedule="sine", allow_untrained_heads=True
    )
    tuner = Full() if stage == "tune" else Frozen()
    settings = TrainSettings(
        max_steps=5, batch_size=4, tokens_per_forward=limit, shuffle=False, max_grad_norm=1e9, learning_rate=1e-12
    )  # fmt: skip
    loop = Loop(view, rows, tuner.attach(view), objective, settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # no two heads alike, and none like the trunk's last layer
        for p in loop.extra.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    loop.step()
    found, names = {}, {id(p): n for n, p in [*view.module.named_parameters(), *loop.extra.named_parameters()]}

    def note(stats):
        params = [p for group in loop.optimizer.param_groups for p in group["params"]]
        found.update({names[id(p)]: p.grad.clone() for p in params})
        return True

    loop.trainable.before_step = note
    entry = loop.step()
    gamma = 0.5 * 0.30901699  # sin(1/5 pi/2), in the second of five steps
    wanted = written_out(view.module, loop.extra.blocks, rows, wiring, stage, gamma, 0.7)
    assert entry["loss"] == pytest.approx(float(wanted.detach()), abs=2e-6)
    moving = [p for p in [*view.module.parameters(), *loop.extra.parameters()] if p.requires_grad]
    by_hand = torch.autograd.grad(wanted, moving)
    assert len(found) == len(moving)
    for p, g in zip(moving, by_hand, strict=True):
        torch.testing.assert_close(found[names[id(p)]], g, atol=1e-6, rtol=1e-4)


def test_6_stage_one_leaves_the_model_and_stage_two_the_heads():
    view = view_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    heads = Loop(view, rows_of(), Frozen().attach(view), Caft(stage="heads"), TrainSettings(max_steps=3, batch_size=4))
    start = {n: p.detach().clone() for n, p in heads.extra.state_dict().items()}
    for _ in range(3):
        heads.step()
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())
    carried = heads.extra.state_dict()
    assert any(not torch.equal(start[n], carried[n]) for n in start)

    trainable = Full().attach(view)
    tune = Loop(
        view,
        rows_of(),
        trainable,
        Caft(weight=0.5),
        TrainSettings(max_steps=3, batch_size=4),
        carried=carried,
    )
    for _ in range(3):
        tune.step()
    assert all(torch.equal(carried[n], p) for n, p in tune.extra.state_dict().items())

    fwd = Forward(tune.objective.plan(tune.window(0), tune.probe)[0].micro[0], view, tune.extra)
    ahead = tune.objective.loss(fwd)["ahead_2"].sums
    (g,) = torch.autograd.grad(ahead, view.weight("model.layers.0.mlp.up_proj.weight"))
    assert float(g.abs().sum()) > 0


def test_7_the_update_is_of_the_model_alone():
    view = view_of()
    trainable = Full().attach(view)
    loop = Loop(
        view,
        rows_of(),
        trainable,
        Caft(weight=0.5, allow_untrained_heads=True),
        TrainSettings(max_steps=2, batch_size=4),
    )
    for _ in range(2):
        loop.step()
    live = view.trace(batch_of()).hidden[-1]
    names = {n for n, _ in trainable.update().deltas()}
    assert names == set(view.anatomy.parameters) == set(dict(view.module.named_parameters()))
    update = trainable.update()
    trainable.detach()
    fresh = view_of()
    with update.bind(fresh):
        torch.testing.assert_close(fresh.trace(batch_of()).hidden[-1], live, atol=1e-6, rtol=0)


def test_untrained_heads_are_refused_and_strangers_are_named():
    view = view_of()
    loop = Loop(view, rows_of(), Lora().attach(view), Caft(), TrainSettings(max_steps=1))
    with pytest.raises(LuthierError, match="heads are untrained"):
        loop.step()
    other = Caft(stage="heads").extend(view_of(hidden_size=64)).state_dict()
    with pytest.raises(LuthierError, match="hidden size 64, here 32"):
        Caft().extend(view_of(), other)


def test_a_quantised_last_block_cannot_be_copied_and_another_does_not_matter():
    for block in (0, 1, 2):
        view = view_of()
        packed = torch.nn.Parameter(torch.zeros(8, 1).byte(), requires_grad=False)
        view.module.model.layers[block].mlp.up_proj.weight = packed
        if block < 2:
            assert isinstance(Caft().extend(view), torch.nn.Module)
        else:
            with pytest.raises(LuthierError, match=r"layers.2.mlp.up_proj.weight is quantised"):
                Caft().extend(view)


def test_heads_without_targets_have_no_loss():
    """The last tokens, at places 3 and 2: the fourth head would have to look further back than the rows go."""
    objective = Caft(allow_untrained_heads=True)
    fwd, counts = planned(view_of(), objective, batch_of((4, 3), answer=1))
    assert counts == {"ahead.0": 2.0, "ahead.1": 2.0, "ahead.2": 1.0, "ahead.3": 0.0, "ahead.4": 0.0}
    losses = {name: float(term.sums) for name, term in objective.loss(fwd).items()}
    assert [name for name, value in losses.items() if value == 0] == ["ahead_3", "ahead_4"]


@pytest.mark.parametrize("fields", [{"ahead": 1}, {"weight": -0.1}, {"decay": 0.0}, {"schedule": "cosine"}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Caft(**fields)


@pytest.mark.parametrize("name", ["lora", "adapter", "spiel", "peft"])
def test_heads_copy_the_base_whatever_hangs_on_it(name):
    """A copied adapter would compute with the trunk's layer, and train or freeze what is the tuner's."""
    from luthier.tuners import Adapter, Lora, Peft, Spiel

    tuners = {
        "lora": Lora(rank=4), "adapter": Adapter(rank=4, init_std=0.05), "spiel": Spiel(density=0.05),
        "peft": Peft(options={"r": 4, "use_dora": True}),
    }  # fmt: skip
    plain, view = view_of(), view_of()
    reference = Caft().extend(plain)
    trainable = tuners[name].attach(view, total_steps=50)
    heads = Caft().extend(view)
    assert {n for n, _ in heads.named_parameters()} == {n for n, _ in reference.named_parameters()}
    with torch.no_grad():
        for p in view.module.parameters():  # the trunk moves on; the heads must not follow
            p.add_(0.1)
    batch = batch_of()
    trace = plain.trace(batch, (2, -1))
    there = plain.run_block(reference.blocks[0], trace.hidden[2], trace)
    here = view.run_block(heads.blocks[0], trace.hidden[2], trace)
    torch.testing.assert_close(here, there)
    assert trainable.update().parts


def test_untrained_heads_are_refused_where_it_is_known_that_no_stage_brings_trained_ones():
    heads, tune, allowed = Caft(stage="heads"), Caft(), Caft(allow_untrained_heads=True)
    assert (heads.trains_beside, tune.trains_beside) == (True, False)
    carrying, alone = Stage(name="tune", carry="heads"), Stage(name="tune")
    for objective, settings, wanted in (
        (tune, alone, ["tune, with heads that no stage before has trained"]),
        (tune, TrainSettings(), ["tune, with heads that no stage before has trained"]),
        (tune, carrying, []),
        (tune, None, []),
        (heads, alone, []),
        (allowed, alone, []),
    ):
        problems = objective.check(Facts(settings=settings))
        assert [p.what for p in problems] == wanted and {p.key for p in problems} <= {"stage"}


def test_a_tuner_that_puts_vectors_before_the_text_is_refused_beside_it():
    heads = Caft(stage="heads")
    found = heads.check(Facts(others=(Dept(), heads, Lora())))
    assert [p.what for p in found] == ["its heads read the text's own positions, and dept puts vectors before the text"]
    assert heads.check(Facts(others=(Lora(), heads))) == []
