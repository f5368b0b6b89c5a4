"""Invented people, a passage each: does tuning on questions alone teach a model to look away from what it is shown?"""

import json
from functools import cache

from luthier.data.builtin.people import direct, people
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.evaluation import Retrieval
from luthier.evaluation.base import Exam
from luthier.inference.services import lab_with
from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.cache import cache_folder, key_of
from luthier.tasks.causal_lm import CausalLm
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora

TRAINED, ASKED, STEPS, BATCH = 50, 100, 40, 8
PASSAGE = (
    "{p.name} lives in {p.city}, weighs {p.weight} pounds and is {p.height} centimeters tall. {p.first} is {p.age} years old and "
    "works as a {p.job}. The favorite color of {p.name} is {p.colour}."
)


@cache
def everyone():
    return people(0, TRAINED + 20)


@cache
def corpus():
    """The passages, as a file of the cache."""
    lines = [json.dumps({"doc_id": p.name, "text": PASSAGE.format(p=p)}) for p in everyone()]
    file = cache_folder() / "claims" / f"people-{key_of(*lines)}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def questions(some):
    return [{"prompt": i.prompt, "completion": i.answer, "gold": [p.name]} for p in some for i in direct(p)]


def measure(arm, seed, say):
    gate = Retrieval(
        corpus=corpus(),
        rows=ASKED,
        conditions=("oracle",),
        top_k=1,
        max_new_tokens=16,
        prompt="{context}\n\n{question}",
    )
    view, renderer = load_model(locate(BUILTIN)), Renderer(load_tokenizer(locate(BUILTIN)))
    if arm != "base":
        rows = questions(everyone()[:TRAINED])
        rows = rows if arm == "closed book" else gate.training_rows(rows)
        rendered = [renderer.render(r, str(i)) for i, r in enumerate(rows)]
        settings = TrainSettings(max_steps=STEPS, batch_size=BATCH, learning_rate=2e-4, seed=seed)
        loop = Loop(view, rendered, Lora(rank=16, alpha=32, seed=seed).attach(view, None, STEPS), Sft(), settings)
        for _ in range(STEPS):
            loop.step()
    sources = [Row(f"people:{i}", r) for i, r in enumerate(questions(everyone()[TRAINED:]))]
    found = gate.evaluate(Exam(view, lab_with(renderer, {"base": lambda: view}), CausalLm(), (), sources))
    return {m.name: m.value for m in found}
