"""The toy bench: which entries of a matrix are worth training, and what does it cost what was known?"""

from toys import bench

from luthier.support.rng import Streams
from luthier.tuners.lift import Lift, LiftTrainable, low_rank, num_entries, principal
from luthier.tuners.lora import Lora


class ByRule(LiftTrainable):
    """The same sparse training with another rule of choice."""

    def __init__(self, rule, tuner, view, total_steps):
        self.rule = rule
        super().__init__(tuner, view, total_steps)

    def _choose(self, linear):
        weight = self.view.weight(linear.name).detach()
        k = num_entries(linear.shape, self.tuner.rank, self.tuner.density)
        if self.rule == "magnitude":
            return principal(weight, k)
        if self.rule == "smallest":
            near = low_rank(weight, self.tuner.filter_rank).abs()
            return principal(near.max() - near, k)
        drawn = Streams(self.tuner.seed).at("random", linear.module).permutation(weight.numel())[:k]
        import torch

        return torch.from_numpy(drawn).sort().values


class Ruled(Lift):
    """Lift with another choice; for this experiment only."""

    rule: str = "magnitude"
    """Which entries."""

    def attach(self, model, lab=None, total_steps=None):
        return ByRule(self.rule, self, model, total_steps or 0)


def measure(arm, seed, say):
    tuners = {
        "lift": Lift(rank=4, filter_rank=4, reselect_every=0, seed=seed),
        **{r: Ruled(rank=4, filter_rank=4, reselect_every=0, seed=seed, rule=r) for r in ("magnitude", "random", "smallest")},
        "lora 1e-3": Lora(rank=4, alpha=8, seed=seed), "lora 3e-3": Lora(rank=4, alpha=8, seed=seed),
    }  # fmt: skip
    rate = 1e-3 if arm == "lora 1e-3" else 3e-3
    return bench(tuners[arm], seed, rate)
