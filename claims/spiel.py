"""A linear map with 60 planted changes: does a sparse delta of 90 entries find them?"""

import torch

from luthier.support.rng import Streams
from luthier.testing.models import view_of
from luthier.tuners.spiel import Spiel

SIZE, PLANTED, ENTRIES, STEPS = 64, 60, 90, 300
LAYER = "model.layers.0.self_attn.o_proj"  # of a tiny model, called alone


def measure(arm, seed, say):
    streams = Streams(seed)
    g = streams.torch("map")
    weight = torch.randn(SIZE, SIZE, generator=g) / SIZE**0.5
    places = torch.randperm(SIZE * SIZE, generator=g)[:PLANTED]
    delta = torch.zeros(SIZE * SIZE)
    delta[places] = 0.5 * (2 * torch.randint(2, (PLANTED,), generator=g) - 1).float()
    goal = weight + delta.view(SIZE, SIZE)
    view = view_of("llama", layers=1, hidden_size=SIZE)
    layer = view.module.get_submodule(LAYER)
    with torch.no_grad():
        layer.weight.copy_(weight)
    fixed = arm == "fixed"
    pace = {"reselect_every": 10**6 if fixed else 20, "window": 10**5 if fixed else 5}
    trainable = Spiel(num_weights=ENTRIES, targets=LAYER, seed=seed, **pace).attach(view, None, STEPS)
    optimizer = trainable.optimizer(
        trainable.groups(),
        lambda groups: torch.optim.AdamW([p for x in groups for p in x.params], lr=0.03, weight_decay=0.0),
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / STEPS)
        x = torch.randn(64, SIZE, generator=g)
        trainable.before_window()
        loss = (layer(x) - x @ goal.T).square().mean() * SIZE
        loss.backward()
        trainable.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        trainable.after_step()
    found = set(trainable.sparse.indices[f"{LAYER}.weight"].tolist())
    error = float((layer.weight.detach() - goal).square().sum() / SIZE)
    return {"recovered": len(found & set(places.tolist())) / PLANTED, "error": error}
