"""The toy bench at half the FLOPs of full tuning: which tensors should train?"""

from toys import bench

from luthier.support.rng import Streams
from luthier.tuners.green_trainer import GreenTrainable, GreenTrainer, cost_model


class ByRule(GreenTrainable):
    """The same budget, filled by another rule."""

    def __init__(self, rule, tuner, view, every):
        self.rule = rule
        super().__init__(tuner, view, every)

    def _select(self, window, probe):
        tokens = sum(b.num_tokens for b in window.micro)
        pairs = sum(n * n for b in window.micro for n in b.lengths)
        costs = cost_model(self.view.anatomy, tokens, pairs, sum(b.num_sequences for b in window.micro))
        budget = self.tuner.flops_share * (costs.forward + costs.full_backward) - costs.forward
        items = sorted(costs.items, key=lambda x: -x.level)
        if self.rule == "random":
            order = Streams(self.tuner.seed).at("set", window.clock.step).permutation(len(items))
            items = [items[i] for i in order]
        chosen = []
        for item in items:
            if costs.backward([*chosen, item.name]) <= budget:
                chosen.append(item.name)
        return chosen


class Ruled(GreenTrainer):
    """GreenTrainer with another choice; for this experiment only."""

    rule: str = "random"
    """Which tensors."""

    def attach(self, model, lab=None, total_steps=None):
        return ByRule(self.rule, self, model, self.reselect_every)


def measure(arm, seed, say):
    keys = {"flops_share": 0.5, "reselect_every": 50, "seed": seed}
    tuner = GreenTrainer(**keys) if arm == "chosen" else Ruled(rule=arm, **keys)
    return bench(tuner, seed, 1e-3)
