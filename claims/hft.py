"""The toy bench: a reader of Python source is tuned on grade-school text; how much of each does it then read?"""

from toys import bench

from luthier.tuners.full import Full
from luthier.tuners.hft import Hft

RATES = {"1e-3": 1e-3, "3e-4": 3e-4}


def measure(arm, seed, say):
    kind, _, rate = arm.partition(" ")
    tuner = Full(seed=seed) if kind == "full" else Hft(seed=seed)
    return bench(tuner, seed, RATES[rate])
