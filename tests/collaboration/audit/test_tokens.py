"""recit's exact checks on token leakage; numbers in names are the sheet's."""

import pytest
import torch

from luthier.collaboration.audit.tokens import EXACT, TokenAudit, distances, inputs_of, span
from luthier.data.batch import collate
from luthier.objectives.base import Forward
from luthier.objectives.sft import Sft
from luthier.testing.models import VOCABULARY, view_of
from luthier.tuners.lora import Lora

Q, V = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qv")


def exactly(rank, seed=0):
    """A tiny rotary model in float64 with LoRA on its first projections."""
    view = view_of(layers=2, hidden_size=64, seed=seed)
    view.module.double()
    trainable = Lora(rank=rank, targets=("q_proj", "v_proj")).attach(view)
    for p in trainable.parameters():
        p.data = p.data.double()
    trainable.initial = {n: t.double() for n, t in trainable.initial.items()}
    return view, trainable


def row(ids, answer=None):
    """All tokens teach but the first, or only the last few."""
    labels = [-100, *ids[1:]] if answer is None else [-100] * (len(ids) - answer) + ids[-answer:]
    return {"ids": list(ids), "labels": labels, "key": str(ids)}


def gradient(view, trainable, rows):
    """dL/dA and dL/dB by "a.NAME" and "b.NAME"."""
    trainable.view.module.zero_grad()
    for p in trainable.parameters():
        p.grad = None
    fwd = Forward(collate(rows), view)
    sum(t.sums.sum() for t in Sft().loss(fwd).values()).backward()
    return {
        f"{k}.{n}": t.grad.clone()
        for k, factors in (("a", trainable.a), ("b", trainable.b))
        for n, t in factors.items()
    }


def derived(view, trainable, rows):
    """s G^T X A^T of both projections from what hooks see, in float64: autograd's own ends in float32."""
    seen, handles = {}, []
    for name in (Q, V):
        module = view.module.get_submodule(name.removesuffix(".weight"))
        keep = lambda m, args, out, n=name: seen.update({n: (args[0].detach(), out)}) or out.retain_grad()  # noqa: E731
        handles.append(module.register_forward_hook(keep))
    gradient(view, trainable, rows)
    for h in handles:
        h.remove()
    flat = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    return {n: trainable.scale * flat(out.grad).T @ flat(x) @ trainable.a[n].detach().T for n, (x, out) in seen.items()}


def audit_of(view, trainable):
    return TokenAudit(view, {n.removeprefix("a."): t for n, t in trainable.initial.items()})


IDS = [7, 11, 23, 5, 42, 31, 19, 3, 28, 37]


def test_1_while_b_is_zero_only_b_has_a_gradient():
    payload = gradient(*exactly(16), [row(IDS)])
    assert not payload[f"a.{V}"].any() and payload[f"b.{V}"].any() and not payload[f"a.{Q}"].any()


def test_2_true_tokens_lie_in_the_span_and_others_do_not():
    view, trainable = exactly(32)
    payload = gradient(view, trainable, [row(IDS)])
    basis = span(derived(view, trainable, [row(IDS)])[V], 1e-10)
    x = inputs_of(view, [linear for linear in view.anatomy.linears if linear.name == V])[V]
    far = distances(x @ trainable.initial[f"a.{V}"].T, basis)
    members = IDS[:-1]  # the last input has no label after it
    others = [t for t in range(VOCABULARY) if t not in IDS]
    assert float(far[members].max()) <= 1e-12 and float(far[others].min()) >= 5e-3
    found = {f.tensor: f for f in audit_of(view, trainable)(payload, members)}[f"b.{V}"]
    assert (found.mode, found.recall[1e-4], found.inside, found.auc) == ("exact", 1.0, 1.0, 1.0)


def test_3_the_rank_counts_the_tokens_that_a_projection_sees():
    view, trainable = exactly(32)
    payload, exact = gradient(view, trainable, [row(IDS)]), derived(view, trainable, [row(IDS)])
    assert [len(span(exact[n], 1e-10)) for n in (V, Q)] == [len(IDS) - 1, len(IDS) - 2]
    assert [len(span(payload[f"b.{n}"])) for n in (V, Q)] == [len(IDS) - 1, len(IDS) - 2], "in float32, too"


def test_masking_the_prompt_does_not_hide_it():
    view, trainable = exactly(32)
    payload = gradient(view, trainable, [row(IDS, answer=2)])
    found = {f.tensor: f for f in audit_of(view, trainable)(payload, IDS[:-1])}
    assert found[f"b.{V}"].inside == 1.0, "answers attend to the prompt"


def test_4_a_full_span_says_nothing_and_so_does_the_audit():
    view, trainable = exactly(4)
    payload = gradient(view, trainable, [row(IDS)])
    basis = span(payload[f"b.{V}"], 1e-10)
    x = inputs_of(view, [linear for linear in view.anatomy.linears if linear.name == V])[V]
    far = distances(x @ trainable.initial[f"a.{V}"].T, basis)
    assert float(far[x.any(1)].max()) <= 1e-12, "but for the padding token, whose embedding is zero"
    found = {f.tensor: f for f in audit_of(view, trainable)(payload, IDS)}[f"b.{V}"]
    assert (found.mode, found.recall, found.inside) == ("saturated", {}, 0.0)


def test_5_gradients_are_those_of_the_derivation():
    view, trainable = exactly(8)
    for b in trainable.b.values():
        torch.nn.init.normal_(b, std=0.02)
    seen = {}
    module = view.module.get_submodule(V.removesuffix(".weight"))
    module.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach(), y=out) or out.retain_grad())
    payload = gradient(view, trainable, [row(IDS)])
    x, g = seen["x"].reshape(-1, 64), seen["y"].grad.reshape(-1, seen["y"].shape[-1])
    a, b, s = trainable.a[V].detach(), trainable.b[V].detach(), trainable.scale
    assert torch.allclose(payload[f"b.{V}"], s * g.T @ x @ a.T, atol=1e-6)
    assert torch.allclose(payload[f"a.{V}"], s * b.T @ g.T @ x, atol=1e-6) and payload[f"a.{V}"].any()


def moved(steps, make_optimizer, ids=IDS, seed=0, rank=32):
    """What so many steps change, as a payload."""
    view, trainable = exactly(rank)
    if seed:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(VOCABULARY - 3, generator=generator)[: len(IDS)].add(3).tolist()
    optimizer = make_optimizer(list(trainable.parameters()))
    for _ in range(steps):
        gradient(view, trainable, [row(ids)])
        optimizer.step()
    delta = {f"a.{n}": t.detach() - trainable.initial[f"a.{n}"] for n, t in trainable.a.items()}
    return view, trainable, delta | {f"b.{n}": t.detach() for n, t in trainable.b.items()}, ids


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_6_steps_of_plain_gradient_descent_hide_nothing(steps):
    view, trainable, delta, ids = moved(steps, lambda p: torch.optim.SGD(p, lr=0.1))
    found = {f.tensor: f for f in audit_of(view, trainable)(delta, ids[:-1])}
    assert found[f"b.{V}"].inside == 1.0 and found[f"a.{V}"].inside == 1.0


def test_6_adam_hides_tokens_from_the_exact_test_and_not_from_the_calibrated_one():
    adam = lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0)  # noqa: E731
    view, trainable, delta, ids = moved(5, adam, rank=4)
    audit = audit_of(view, trainable)
    public = [moved(5, adam, seed=seed, rank=4)[2:] for seed in range(1, 21)]
    audit.calibrate([p for p, _ in public], [t[:-1] for _, t in public])
    found = {f.tensor: f for f in audit(delta, ids[:-1])}[f"a.{V}"]
    assert found.inside == 0.0 and found.mode == "soft" and found.auc > 0.7, found


def test_7_sums_over_clients_add_their_tokens_and_are_harder_to_read():
    view, trainable = exactly(24)
    generator = torch.Generator().manual_seed(1)
    clients = torch.randperm(VOCABULARY - 3, generator=generator).add(3)[: 8 * 5].view(5, 8).tolist()
    payloads = [gradient(view, trainable, [row(ids)]) for ids in clients]
    audit, ranks, recalls = audit_of(view, trainable), [], []
    for m in range(1, 6):
        total = {k: sum(p[k] for p in payloads[:m]) for k in payloads[0]}
        found = {f.tensor: f for f in audit(total, clients[0][:-1])}[f"b.{V}"]
        ranks.append(found.rank)
        recalls.append(found.recall.get(1e-4, 0.0))
    assert ranks == [7, 14, 21, 24, 24], "until the rank is full"
    assert recalls == sorted(recalls, reverse=True) and recalls[0] == 1.0 and recalls[-1] == 0.0


def test_what_cannot_be_audited_is_refused():
    view, trainable = exactly(8)
    payload, audit = gradient(view, trainable, [row(IDS)]), audit_of(view, trainable)
    with pytest.raises(ValueError, match="true tokens are needed"):
        audit(payload, [])
    with pytest.raises(ValueError, match=r"has no a\."):
        audit({}, IDS)
    with pytest.raises(ValueError, match="should have 64 numbers"):
        audit({**payload, f"a.{Q}": torch.ones(8, 63)}, IDS)
    with pytest.raises(ValueError, match="no query, key or value matrix of block 0"):
        TokenAudit(view, {"model.layers.1.self_attn.q_proj.weight": torch.zeros(8, 64)})
    learnt = view_of("gpt2", layers=2)
    qkv = next(x for x in learnt.anatomy.linears if x.role == "qkv" and x.block == 0)
    with pytest.raises(ValueError, match="depend on the position"):
        inputs_of(learnt, [qkv])
    with pytest.raises(ValueError, match="mixtures of tokens"):
        inputs_of(view, [next(x for x in view.anatomy.linears if x.block == 1)])
    assert EXACT < 5e-3


def test_inputs_are_those_of_a_whole_forward_and_no_later_block_is_run():
    view = view_of(layers=2)
    linears = [x for x in view.anatomy.linears if x.block == 0 and x.role in ("q", "v")]
    ran = []
    handle = view.block(1).register_forward_pre_hook(lambda module, args: ran.append(1))
    found = inputs_of(view, linears)
    assert not ran and len(found) == 2 and len(found[V]) == view.embedding.num_embeddings
    seen = []
    other = view.module.get_submodule(V.removesuffix(".weight")).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    view.trace(collate([{"ids": [5, 9, 5, 7], "labels": [-100, 9, 5, 7], "key": "a"}]))
    handle.remove()
    other.remove()
    assert ran == [1]
    torch.testing.assert_close(found[V][[5, 9, 5, 7]].float(), seen[0].reshape(4, -1), rtol=1e-5, atol=1e-6)
