"""One update after another: what both together are on the base."""

import pytest
import torch

from luthier.testing.models import batch_of, view_of
from luthier.update import Dense, LowRank, Prompt, Replace, Seeds, Sparse, Update

Q, UP, NORM = (
    "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight",
)  # fmt: skip
VIEW = view_of()
BASE = {n: p.detach().clone() for n, p in VIEW.module.named_parameters()}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(name, seed):
    out, into = BASE[name].shape
    return LowRank({name: drawn(2, into, seed=seed)}, {name: drawn(out, 2, seed=seed + 1)}, {name: 0.5})


def sparse(name, *at):
    return Sparse({name: torch.tensor(at)}, {name: torch.arange(1.0, len(at) + 1)}, {name: tuple(BASE[name].shape)})


def of(*parts):
    return Update(VIEW.base, parts)


def weights_in_turn(*updates):
    """Each update merged into the weights that the one before it left, by hand."""
    out = {n: t.clone() for n, t in BASE.items()}
    for update in updates:
        for part in update.parts:
            if isinstance(part, Replace):
                out |= {n: v.clone() for n, v in part.values.items()}
            else:
                for n, d in part.deltas():
                    out[n] = out[n] + d
    return out


def dense(*names, seed=0):
    return Dense({n: drawn(*BASE[n].shape, seed=seed) for n in names})


LAYER = {n: drawn(*BASE[n].shape, seed=9) for n in (Q, NORM)}
OTHER = {Q: drawn(*BASE[Q].shape, seed=11)}
SHAPES = {n: tuple(BASE[n].shape) for n in (Q, UP)}
SEEDS = Seeds(torch.tensor([3, 5]), torch.tensor([0.1, -0.2], dtype=torch.float64), SHAPES)
CASES = {
    "dense after dense": (of(dense(Q)), of(dense(Q, UP, seed=1))),
    "sparse after sparse": (of(sparse(Q, 1, 4)), of(sparse(Q, 4, 7))),
    "low rank after low rank": (of(low_rank(Q, 0)), of(low_rank(Q, 5))),
    "low rank after dense": (of(dense(Q)), of(low_rank(Q, 0))),
    "seeds after sparse": (of(sparse(Q, 1)), of(SEEDS)),
    "replaced after dense": (of(dense(Q)), of(Replace(LAYER))),
    "dense after replaced": (of(Replace(LAYER)), of(dense(Q, UP))),
    "low rank after replaced": (of(Replace(LAYER)), of(low_rank(Q, 0))),
    "sparse after replaced": (of(Replace(LAYER)), of(sparse(Q, 2, 3))),
    "seeds after replaced": (of(Replace(LAYER)), of(SEEDS)),
    "replaced after replaced": (of(Replace(LAYER), low_rank(UP, 0)), of(Replace(OTHER))),
    "replaced and moved after replaced": (of(Replace(LAYER)), of(dense(Q), Replace(OTHER))),
    "a head both times": (of(Replace(LAYER), low_rank(UP, 0)), of(low_rank(UP, 3), Replace(OTHER))),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_two_do_in_turn(case):
    first, second = CASES[case]
    wanted, both = weights_in_turn(first, second), first.then(second)
    with both.in_place(VIEW):
        for n, t in wanted.items():
            torch.testing.assert_close(VIEW.weight(n).detach(), t, atol=1e-5, rtol=1e-5, msg=lambda m, n=n: f"{n}: {m}")
    assert all(torch.equal(VIEW.weight(n), t) for n, t in BASE.items())
    module = view_of().module
    both.merge_into(module)
    for n, t in wanted.items():
        torch.testing.assert_close(module.get_parameter(n).detach(), t, atol=1e-5, rtol=1e-5)


def test_bound_it_gives_the_states_of_the_weights_in_turn():
    first, second = of(Replace(LAYER), sparse(UP, 5)), of(low_rank(Q, 0))
    batch, states = batch_of(), []
    for how in ("bind", "in_place"):
        with getattr(first.then(second), how)(VIEW):
            states.append(VIEW.trace(batch).hidden[-1].detach())
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-4)


def test_what_lies_beside_the_weights_is_kept_in_its_order():
    prompts = [Prompt(drawn(3, 32, seed=s)) for s in (0, 1)]
    parts = of(prompts[0], sparse(Q, 1)).then(of(prompts[1])).parts
    assert [p.kind for p in parts] == ["sparse", "prompt", "prompt"]
    assert parts[1] is prompts[0] and parts[2] is prompts[1]
