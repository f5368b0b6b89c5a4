"""Invented names of several tokens, to be repeated from a passage: do heads that look ahead help to get them whole?"""

from functools import cache

from luthier.data.builtin.people import people
from luthier.data.rendering import Renderer
from luthier.inference.generation import generate
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
from luthier.objectives.caft import Caft
from luthier.step.settings import TrainSettings
from luthier.support.rng import Streams
from luthier.training.loop import Loop
from luthier.tuners.frozen import Frozen
from luthier.tuners.lora import Lora

AHEAD, STEPS, BATCH, ASKED, TOGETHER = 5, 60, 16, 200, 6


@cache
def renderer():
    return Renderer(load_tokenizer(locate(BUILTIN)), plain=True)


def questions(seed, count):
    """Six people with their cities, and one of the cities: who lives there?"""
    everyone, drawn, out = people(seed, 3 * TOGETHER + count), Streams(seed).at("groups"), []
    for _ in range(count):
        some = [everyone[i] for i in drawn.permutation(len(everyone))[:TOGETHER].tolist()]
        wanted = some[int(drawn.integers(TOGETHER))]
        told = " ".join(f"{p.name} lives in {p.city}." for p in some)
        out.append({"prompt": f"{told}\nWho lives in {wanted.city}?\n", "completion": wanted.name})
    return out


def loop_of(view, rows, tuner, objective, seed, carried=None):
    settings = TrainSettings(max_steps=STEPS, batch_size=BATCH, learning_rate=5e-4, tokens_per_forward=8192, seed=seed)
    return Loop(view, rows, tuner.attach(view, None, STEPS), objective, settings, carried=carried)


@cache
def trained_heads(seed):
    """State of the heads after a stage of their own on the same rows."""
    loop = loop_of(load_model(locate(BUILTIN)), rendered(seed), Frozen(), Caft(stage="heads", ahead=AHEAD), seed)
    for _ in range(STEPS):
        loop.step()
    return {n: t.clone() for n, t in loop.extra.state_dict().items()}


@cache
def rendered(seed):
    return [renderer().render(r, str(i)) for i, r in enumerate(questions(1000 + seed, STEPS * BATCH))]


def measure(arm, seed, say):
    weight = {"sft": 0.0, "caft": 0.01, "caft 0.1": 0.1}[arm]
    view, heads = load_model(locate(BUILTIN)), trained_heads(seed)
    tuner, objective = Lora(rank=16, alpha=32, seed=seed), Caft(ahead=AHEAD, weight=weight)
    loop = loop_of(view, rendered(seed), tuner, objective, seed, carried=heads)
    for _ in range(STEPS):
        loop.step()
    asked = questions(2000 + seed, ASKED)
    replies = generate(view, [renderer().prompt_ids(r) for r in asked], renderer(), 16)
    right = [reply.text.strip() == r["completion"] for reply, r in zip(replies, asked, strict=True)]
    return {"right": sum(right) / len(right)}
