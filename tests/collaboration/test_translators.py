"""grad-transformer's exact checks on its translators; numbers in names are the sheet's."""

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from transformers import T5Config, T5Model

from luthier.collaboration.translators.base import PADDED, Pairs, identity, standard
from luthier.collaboration.translators.ridge import Ridge
from luthier.collaboration.translators.transformer import Transformer, masked_error
from luthier.support.rng import Streams


def pairs(sets=24, snapshots=1, layers=(2, 3), width=(12, 20), scale=1e-3, latent=3, seed=0):
    """Both sides are linear images of a few hidden numbers, as updates of one data set are of its mixture."""
    g = torch.Generator().manual_seed(seed)
    n = sets * snapshots
    hidden = torch.randn(sets, latent, generator=g).repeat_interleave(snapshots, 0)
    hidden = hidden + 0.01 * torch.randn(n, latent, generator=g)
    sides = [
        scale * (hidden @ torch.randn(latent, a * d, generator=g)).view(n, a, d)
        for a, d in zip(layers, width, strict=True)
    ]
    kinds = [
        torch.arange(d).lt(d // 2).logical_not().to(torch.int8).expand(a, d) for a, d in zip(layers, width, strict=True)
    ]
    return Pairs(*sides, torch.arange(sets).repeat_interleave(snapshots), *kinds)


def small(**more):
    return Transformer(**{"width": 32, "layers": 1, "heads": 2, "epochs": 3, "dropout": 0.0, **more})


@pytest.fixture(scope="module")
def fitted():
    return small(epochs=5).fit(pairs())


def test_3_a_written_layer_depends_on_earlier_ones_only(fitted):
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 12), torch.randn(2, 3, 20)
    with torch.no_grad():
        before = fitted.net(x, y)
        for j in range(3):
            other = y.clone()
            other[:, j] += 1
            moved = (fitted.net(x, other) - before).abs().amax((0, 2)) > 1e-6
            assert moved.tolist() == [i > j for i in range(3)]
        for j in range(2):
            other = x.clone()
            other[:, j] += 1
            assert ((fitted.net(other, y) - before).abs().amax((0, 2)) > 1e-6).all()


def test_4_writing_with_a_cache_without_one_and_under_its_own_teacher_agree(fitted):
    with torch.no_grad():
        fitted.net.embed_t.bias.add_(1.0)  # a start vector that differed between the two would show now
        x = torch.randn(4, 2, 12)
        written = fitted.net.write(x, 3)
        assert torch.allclose(written, fitted.net.write(x, 3, cached=False), atol=1e-5)
        assert torch.allclose(written, fitted.net(x, written), atol=1e-5)
        fitted.net.embed_t.bias.sub_(1.0)


def test_5_the_loss_is_equation_10_over_the_width_and_padding_gets_no_gradient():
    guess, truth = torch.randn(4, 3, 20, requires_grad=True), torch.randn(4, 3, 20)
    whole = torch.ones(3, 20, dtype=torch.bool)
    equation = sum((guess[k, j] - truth[k, j]).norm() ** 2 for k in range(4) for j in range(3)) / (4 * 3)
    assert torch.allclose(masked_error(guess, truth, whole), equation / 20, rtol=1e-6)
    mask = whole.clone()
    mask[1, 15:] = False
    masked_error(guess, truth, mask).backward()
    assert guess.grad[:, 1, 15:].abs().max() == 0
    assert (guess.grad[:, mask] != 0).all()


def test_6_ridge_is_affine_so_pooling_before_and_after_agree_and_the_transformer_is_not(fitted):
    p = pairs()
    clients = 1.5 * pairs(seed=0).x[:4]
    for translator, affine in ((Ridge().fit(p), True), (fitted, False)):
        before, after = translator(clients.mean(0, keepdim=True))[0], translator(clients).mean(0)
        assert torch.allclose(before, after, atol=1e-5 * float(after.abs().max())) == affine


def test_7_without_ridge_every_target_is_reproduced_and_with_an_endless_one_the_mean_comes_back():
    p = pairs(sets=10, latent=12)
    exact, mean = Ridge(strength=0).fit(p), Ridge(strength=1e12).fit(p)
    assert torch.allclose(exact(p.x), p.y, atol=1e-4 * float(p.y.abs().max()))
    assert torch.allclose(mean(p.x), p.y.mean(0).expand_as(p.y), atol=1e-6 * float(p.y.abs().max()))


def test_7_ridge_agrees_with_scikit_learn():
    p, unseen = pairs(), pairs(seed=0).x[:5] * 0.7
    fitted = Ridge(strength=0.3, standardise=False).fit(p)
    x, y = p.x.flatten(1).double().numpy(), p.y.flatten(1).double().numpy()
    middle = x.mean(0)
    gram = (x - middle) @ (x - middle).T
    theirs = KernelRidge(alpha=0.3 * np.diag(gram).mean(), kernel="precomputed").fit(gram, y - y.mean(0))
    guess = theirs.predict((unseen.flatten(1).numpy() - middle) @ (x - middle).T) + y.mean(0)
    assert np.allclose(fitted(unseen).flatten(1).numpy(), guess, atol=1e-6 * np.abs(y).max())


def test_standard_form_is_one_scale_a_layer_and_kind_and_leaves_padding_alone():
    kinds = torch.tensor([[0, 0, 1, 1], [0, 0, 1, PADDED]], dtype=torch.int8)
    values = torch.randn(50, 2, 4) * torch.tensor([1.0, 1.0, 10.0, 10.0]) + 3
    values[:, 1, 3] = 0
    form = standard(values, kinds)
    out = form.apply(values)
    for layer, kind in ((0, 0), (0, 1), (1, 0), (1, 1)):
        here = out[:, layer, kinds[layer] == kind]
        assert here.mean(0).abs().max() < 1e-5
        assert abs(float(here.square().mean()) - 1) < 1e-5
    assert torch.equal(out[:, 1, 3], values[:, 1, 3])
    assert torch.allclose(form.undo(out), values, atol=1e-5)
    assert len(form.deviation[0].unique()) == 2
    same = identity(values)
    assert torch.equal(same.apply(values), values)


def test_snapshots_of_one_shadow_set_stay_on_one_side():
    p = pairs(sets=10, snapshots=4)
    training, validation = p.split(0.7, Streams(0))
    assert len(training.x) == 28 and len(validation.x) == 12
    assert not set(training.shadow.tolist()) & set(validation.shadow.tolist())


def test_shuffled_pairs_belong_to_other_sets():
    p = pairs(sets=7, snapshots=3)
    own = {tuple(y.flatten().tolist()): int(k) for y, k in zip(p.y, p.shadow, strict=True)}
    for y, k in zip(p.shuffled(Streams(3)).y, p.shadow, strict=True):
        assert own[tuple(y.flatten().tolist())] != int(k)


def test_the_transformer_learns_what_the_updates_share():
    p = pairs(sets=80)
    training, unseen = p.take(p.shadow < 60), p.take(p.shadow >= 60)
    fitted = small(width=64, epochs=60, patience=60).fit(training)
    error = (fitted(unseen.x) - unseen.y).square().mean() / (unseen.y - training.y.mean(0)).square().mean()
    assert error < 0.5
    raw = small(width=64, epochs=60, patience=60, standardise=False).fit(training)
    assert (raw(unseen.x) - unseen.y).square().mean() > 2 * (fitted(unseen.x) - unseen.y).square().mean()


def test_fitting_is_repeatable_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = small(dropout=0.1).fit(pairs())
    assert torch.equal(torch.rand(3), expected)
    b = small(dropout=0.1).fit(pairs())
    assert torch.equal(a(pairs().x), b(pairs().x)) and a.epochs == b.epochs
    assert not torch.equal(a(pairs().x), small(dropout=0.1, seed=1).fit(pairs())(pairs().x))


def test_own_outputs_change_training():
    taught, own = small(), small(own_outputs=1.0)
    assert taught.fit(pairs()).epochs[-1] != own.fit(pairs()).epochs[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.take(p.shadow == 0), "1 shadow sets"),
        (lambda p: p._replace(y=p.y[1:]), "pair them up"),
        (lambda p: p._replace(x=torch.full_like(p.x, float("nan"))), "not finite"),
        (lambda p: p._replace(x=p.x.long()), "no real numbers"),
        (lambda p: p._replace(x=p.x[:, :1]), "its layout"),
    ],
)
def test_pairs_that_no_translator_can_use_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Ridge().fit(change(pairs()))


def test_few_shadow_sets_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="19 shadow sets where 20 are needed at least: use ridge"):
        small().fit(pairs(sets=19))


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 3, 12), torch.full((1, 2, 12), float("inf")), torch.zeros(1, 2, 12).long()]
)
def test_updates_of_another_layout_or_without_numbers_are_refused(x):
    with pytest.raises(ValueError, match="update vector"):
        Ridge().fit(pairs())(x)


def test_a_pretrained_t5_is_where_training_starts(tmp_path):
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 3}
    torch.manual_seed(3)
    saved = T5Model(T5Config(vocab_size=5, eos_token_id=1, **sizes))
    saved.save_pretrained(tmp_path)
    fitted = small(pretrained=str(tmp_path), epochs=1, learning_rate=1e-9).fit(pairs())
    for name, p in saved.named_parameters():
        assert torch.allclose(dict(fitted.net.core.named_parameters())[name], p, atol=1e-6), name
    assert fitted.net.embed_s.out_features == 24 and fitted(pairs().x).shape == (24, 3, 20)
