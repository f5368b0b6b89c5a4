"""Solutions of grade-school mathematics: what do random words in what was written before do to the next one?"""

from functools import cache

from toys import mean_nll, rows_of, shuffled

from luthier.data.rendering import Renderer
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
from luthier.objectives.masked_thought import MaskedThought
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora

STEPS, BATCH, SHARE = 120, 16, 0.2


@cache
def rendered(split, count):
    renderer, rows = Renderer(load_tokenizer(locate(BUILTIN)), plain=True), rows_of("gsm8k", split)
    return [
        renderer.render({"prompt": f"{rows[i]['question']}\n", "completion": rows[i]["solution"]}, f"{split}:{i}")
        for i in shuffled(0, len(rows))[:count].tolist()
    ]


def corrupted(row, vocabulary):
    """A fifth of the solution's tokens are any token in the input; what is to be said stays right."""
    generator = Streams(0).at("corrupt", row["key"])
    ids, prompt = list(row["ids"]), row["token"]["prompt"]
    for at in range(len(ids)):
        if not prompt[at] and generator.random() < SHARE:
            ids[at] = int(generator.integers(vocabulary))
    return {**row, "ids": ids}


def measure(arm, seed, say):
    view = load_model(locate(BUILTIN))
    objective = MaskedThought(max_rate=0.4, seed=seed) if arm == "random" else Sft()
    settings = TrainSettings(max_steps=STEPS, batch_size=BATCH, learning_rate=5e-4, tokens_per_forward=8192, seed=seed)
    tuner = Lora(rank=16, alpha=32, seed=seed)
    loop = Loop(view, rendered("train", STEPS * BATCH), tuner.attach(view, None, STEPS), objective, settings)
    for _ in range(STEPS):
        loop.step()
    held = rendered("test", 200)
    wrong = [corrupted(r, view.embedding.num_embeddings) for r in held]
    return {"clean": mean_nll(view, held), "corrupted": mean_nll(view, wrong)}
