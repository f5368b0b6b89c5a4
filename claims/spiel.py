"""A linear map with 60 planted changes: does a sparse delta of 90 entries find them?"""

import torch
from torch import nn

from luthier.model.anatomy import Linear
from luthier.support.rng import Streams
from luthier.tuners.spiel import Spiel, SpielTrainable

SIZE, PLANTED, ENTRIES, STEPS = 64, 60, 90, 300


class OneLayer:
    """What a tuner needs of a view, over one linear layer."""

    def __init__(self, weight):
        self.module, self.device, self.base = (
            nn.ModuleDict({"map": nn.Linear(SIZE, SIZE, bias=False)}),
            weight.device,
            None,
        )
        self.module["map"].weight.data.copy_(weight)
        linear = Linear("map", "other", -1, (SIZE, SIZE), False)
        self.anatomy = type(
            "Anatomy", (), {"match": lambda _, t: (linear,), "num_parameters": SIZE * SIZE, "tied": False, "head": None}
        )()

    def weight(self, name):
        return self.module.get_parameter(name)


def measure(arm, seed, say):
    streams = Streams(seed)
    g = streams.torch("map")
    weight = torch.randn(SIZE, SIZE, generator=g) / SIZE**0.5
    places = torch.randperm(SIZE * SIZE, generator=g)[:PLANTED]
    delta = torch.zeros(SIZE * SIZE)
    delta[places] = 0.5 * (2 * torch.randint(2, (PLANTED,), generator=g) - 1).float()
    goal = weight + delta.view(SIZE, SIZE)
    view = OneLayer(weight)
    fixed = arm == "fixed"
    tuner = Spiel(num_weights=ENTRIES, seed=seed, reselect_every=10**6 if fixed else 20, window=10**5 if fixed else 5)
    trainable = SpielTrainable(tuner, view, STEPS)
    optimizer = trainable.optimizer(
        trainable.groups(),
        lambda groups: torch.optim.AdamW([p for x in groups for p in x.params], lr=0.03, weight_decay=0.0),
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / STEPS)
        x = torch.randn(64, SIZE, generator=g)
        trainable.before_window()
        loss = (view.module["map"](x) - x @ goal.T).square().mean() * SIZE
        loss.backward()
        trainable.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        trainable.after_step()
    found = set(trainable.sparse.indices["map.weight"].tolist())
    error = float((view.module["map"].weight.detach() - goal).square().sum() / SIZE)
    return {"recovered": len(found & set(places.tolist())) / PLANTED, "error": error}
