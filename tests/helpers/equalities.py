"""Settings, rows and methods for tests of what must be equal; other processes import them as well."""

from luthier.objectives.caft import Caft
from luthier.objectives.q_tuning import QTuning
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.testing.models import rows_of
from luthier.tuners.adapter import Adapter
from luthier.tuners.dept import Dept
from luthier.tuners.full import Full
from luthier.tuners.green_trainer import GreenTrainer
from luthier.tuners.lora import Lora
from luthier.tuners.spiel import Spiel

# eps above the rounding of gradients: else Adam blows a gradient of 1e-9 up to a whole step.
SETTINGS = TrainSettings(max_steps=4, batch_size=8, learning_rate=1e-2, tokens_per_forward=30, adam_eps=1e-5)
CASES = {
    "lora-sft": (Lora(rank=4), Sft()),
    "full-q-tuning": (Full(), QTuning(keep_rows=0.5)),
    "lora-caft": (Lora(rank=4), Caft(allow_untrained_heads=True, weight=0.3)),
    "dept-sft": (Dept(budget_length=12, length=4, max_length=16), Sft()),
}
# Equal on two ranks where both cut their steps alike: what is chosen depends on the first forward of a window.
RANKS = {
    **CASES,
    "spiel-sft": (Spiel(density=0.05, reselect_every=3, window=1), Sft()),
    "green-sft": (GreenTrainer(flops_share=0.7, reselect_every=2), Sft()),
}
RESUMED = {
    "lora": Lora(rank=4),
    "full": Full(),
    "spiel": Spiel(density=0.05, reselect_every=4, window=2),
    "spiel-ma": Spiel(density=0.05, reselect_every=4, window=2, variant="ma"),
    "green-trainer": GreenTrainer(reselect_every=4),
    "adapter": Adapter(rank=4),
    "dept": Dept(budget_length=12, length=4, max_length=16),
}


def rows():
    return rows_of((14, 6, 13, 15, 11, 8, 12, 9, 7, 10), answer=5)


def tuned(trainable):
    return {str(i): p.detach().reshape(-1).tolist() for i, p in enumerate(trainable.parameters())}
