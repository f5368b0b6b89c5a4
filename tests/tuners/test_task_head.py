"""Settings that take other ways through a tuner, on classifiers; the contract suite asks the plain ones."""

import pytest

from luthier.method import Facts
from luthier.model.anatomy import Anatomy
from luthier.testing.contract import Example, learns_a_task_head
from luthier.testing.models import tiny, view_of
from luthier.tuners import Full, GreenTrainer, Hft, Layerwise, Lift, Lora, Peft, Spiel
from luthier.tuners.base import with_head

VARIANTS = {  # each on the classifiers that its way differs on: GPT-2 stores matrices turned, BERT has a pooler
    "spiel ma": (Spiel(density=0.05, reselect_every=3, window=2, variant="ma"), "gpt2"),
    "spiel cosine": (Spiel(density=0.05, reselect_every=3, window=2, policy="cosine"), "llama"),
    "lift blocks": (Lift(density=0.1, block=4, reselect_every=2, svd="randomized"), "gpt2"),
    "hft epochs": (Hft(resample="epoch"), "bert"),
    "hft by layer": (Hft(level="layer", train_embeddings=False), "llama"),
    "hft by model": (Hft(level="model"), "bert"),
    "green each step": (GreenTrainer(flops_share=0.6, reselect_every=1), "bert"),
    "full but embeddings": (Full(train_embeddings=False), "gpt2"),
    "layerwise frozen": (Layerwise(freeze_blocks=1, reinit_blocks=1), "bert"),
    "layerwise frozen, turned": (Layerwise(freeze_blocks=1, reinit_blocks=1), "gpt2"),
    "layerwise cached": (Layerwise(freeze_blocks=1, cache_features=True), "bert"),
    "layerwise cached, last token": (Layerwise(freeze_blocks=1, cache_features=True), "llama"),
    "peft ia3": (Peft(type="IA3"), "gpt2"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_a_task_head_or_check_refuses(name, tmp_path):
    tuner, kind = VARIANTS[name]
    learns_a_task_head(Example(tuner), f"{kind}-classifier", tmp_path)


@pytest.mark.parametrize(
    ("tuner", "kind", "words"),
    [
        (Hft(), "gpt2-classifier", "transformer.h.0.attn.c_attn.weight is a fused projection"),
        (Hft(), "gpt2", "transformer.h.0.attn.c_attn.weight is a fused projection"),
        (Hft(), "llama-classifier", None),
        (Hft(), "bert-classifier", None),
        (GreenTrainer(), "llama-classifier", None),
        (GreenTrainer(), "gpt2-classifier", None),
        (GreenTrainer(), "bert-classifier", None),
        (GreenTrainer(), "lfm2", "does not know the place of model.layers.0.conv"),
        (Lora(targets=("score",)), "llama-classifier", "'score' is the task head, which every tuner trains whole"),
        (Lora(targets=("q_porj",)), "llama", "'q_porj' matches 0 of 22 linear layers"),
        (Lora(targets=("*_proj", "*")), "llama-classifier", None),
        (Spiel(num_weights=10**6), "llama", "asks for 1000000 entries"),
        (Spiel(targets=("lm_head",)), "gpt2", "the head is tied"),
        (Lift(targets=("lm_head",)), "gpt2", "the head is tied"),
        (Lift(block=4, targets=("lm_head",)), "llama", "lm_head.weight of 97 x 32 has no whole blocks"),
    ],
)
def test_check_knows_without_weights_which_models_can_be_trained(tuner, kind, words):
    task = "classification" if "classifier" in kind else "causal-lm"
    found = tuner.check(Facts(task=task, anatomy=Anatomy(tiny(kind))))
    assert bool(found) == (words is not None)
    assert words is None or (words in found[0].what and found[0].key in {"model", *type(tuner).model_fields})


@pytest.mark.parametrize("tuner", [Lora(targets="*"), Lift(targets="*", density=0.1), Spiel(targets="*", density=0.01)])
def test_a_task_head_is_no_target_of_its_own(tuner):
    view = view_of("llama-classifier")
    trainable = with_head(tuner.attach(view, None, 6), view.anatomy.task_head)
    assert trainable.head.names == ["score.weight"]
    assert "score.weight" not in [n for part in trainable.inner.update().parts for n in part.names()]
