"""Full tuning: plain AdamW in float32, masters and stochastic rounding in bf16, and the way back."""

import pytest
import torch
import torch.nn.functional as F

from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import Full

SETTINGS = TrainSettings(
    max_steps=4, batch_size=4, learning_rate=1e-3, shuffle=False, lr_scheduler_type="constant", weight_decay=0.1
)


def test_float32_is_plain_adamw_with_decay_on_matrices_only():
    view, model, rows = view_of(), tiny(), rows_of()
    loop = Loop(view, rows, Full().attach(view), Sft(), SETTINGS)
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    )
    for _ in range(4):
        total = sum(sum(y != -100 for y in r["labels"][1:]) for r in rows)
        for r in rows:
            logits = model(torch.tensor([r["ids"]])).logits[0, :-1]
            (F.cross_entropy(logits, torch.tensor(r["labels"][1:]), reduction="sum") / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loop.step()
    theirs = dict(model.named_parameters())
    for n, p in view.module.named_parameters():
        torch.testing.assert_close(p, theirs[n], atol=1e-5, rtol=1e-5)  # of steps of 1e-3


def test_in_bf16_weights_follow_their_masters_in_the_mean():
    """At a learning rate far below a bf16 step. Along the masters' own direction, the weights move as far as these do."""
    view, name = view_of(), "model.layers.0.mlp.up_proj.weight"
    view.module.to(torch.bfloat16)
    stored = view.weight(name).detach().float()
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-6, "warmup_fraction": 0.0})
    loop = Loop(view, rows_of(), Full().attach(view), Sft(), settings)
    for _ in range(4):
        loop.step()
    delta = loop.trainable.update().dense()[name]
    assert 1e-6 < float(delta.abs().mean()) < 1e-5
    nearest, live = (stored + delta).to(torch.bfloat16).float() - stored, view.weight(name).float() - stored
    moved, kept, lost = (float((x * delta.sign()).mean()) for x in (delta, live, nearest))
    assert abs(kept - moved) < 0.5 * moved and lost < 0.5 * moved


def test_every_parameter_trains_once_tied_ones_included():
    view = view_of()
    trainable = Full().attach(view)
    assert sum(p.numel() for p in trainable.parameters()) == view.anatomy.num_parameters
    tied = view_of("gpt2")
    assert sum(p.numel() for p in Full().attach(tied).parameters()) == tied.anatomy.num_parameters


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_embeddings_can_stay_and_with_them_a_head_that_is_tied(kind):
    view, rows = view_of(kind), rows_of()
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    loop = Loop(view, rows, Full(train_embeddings=False).attach(view), Sft(), SETTINGS)
    loop.step()
    stays = {n for n, p in view.module.named_parameters() if torch.equal(p, before[n])}
    table = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}.get(
        kind, "bert.embeddings.word_embeddings.weight"
    )
    assert table in stays and not view.weight(table).requires_grad
    assert {n for n in before if n not in stays} >= {
        n for n in before if n.endswith(("q_proj.weight", "c_attn.weight"))
    }
    assert ("lm_head.weight" in before) == (kind == "llama") and "lm_head.weight" not in stays


def test_the_update_is_what_moved_and_nothing_else():
    view, fresh = view_of(), tiny()
    loop = Loop(view, rows_of(), Full().attach(view), Sft(), SETTINGS)
    loop.step()
    (part,) = loop.trainable.update().parts
    for n, p in view.module.named_parameters():
        assert torch.equal(part.changes[n], p.detach() - fresh.get_parameter(n).detach()), n
