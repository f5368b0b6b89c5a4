"""The architectures of transformers: a dozen families here, all of them in `make soak`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForTokenClassification

from luthier.cli.docs import FOLDER
from luthier.data.batch import collate
from luthier.inference.session import ways
from luthier.kernels.linear import low_rank_linear
from luthier.model.anatomy import max_positions
from luthier.model.loading import load_config, load_model, locate
from luthier.model.refusals import NOT_AGAIN, REFUSED, page, refuse_architecture
from luthier.model.view import ModelView
from luthier.support.errors import LuthierError, RecipeError
from luthier.tasks.base import refuse_later_tokens
from luthier.testing.architectures import (
    HEADS,
    NEXT_TOKEN,
    TEXT_CLASS,
    TOKEN_CLASS,
    model_types,
    tiny_config,
    tiny_model,
)
from luthier.testing.matrix import Subject, broken, subject_of
from luthier.tuners import Full, Lora
from luthier.update.files import save_update

FAMILIES = [
    *((NEXT_TOKEN, t) for t in (
        "gemma2", "falcon", "deepseek_v3", "mixtral", "gpt_oss", "gpt_bigcode", "cohere", "granite", "recurrent_gemma", "mamba",
        "llama4_text", "phi", "phimoe", "bart", "roberta",
    )),
    *((TEXT_CLASS, t) for t in ("distilbert", "deberta", "modernbert", "xlnet", "electra", "albert", "convbert", "t5")),
    *((TOKEN_CLASS, t) for t in ("deberta-v2", "roberta", "qwen3", "gpt2")),
]  # fmt: skip
# What cannot be made tiny here, and why.
UNMADE = {
    "dots3_note": "its default configuration is refused by its own check", "gemma3n": "needs timm",
    "xlstm": "its code fails with small blocks",
}  # fmt: skip
# Not all promises hold: no linear layers, so only `full` trains it.
PARTLY = {"squeezebert": {"lora", "spiel"}}


@pytest.mark.parametrize(("head", "model_type"), FAMILIES)
def test_every_promise_holds(head, model_type):
    assert broken(Subject(model_type, head)) == {}


@pytest.mark.soak
@pytest.mark.parametrize("head", HEADS)
def test_nine_of_ten_architectures_keep_every_promise_and_the_others_are_refused_in_a_sentence(head):
    kept, others = [], {}
    for model_type in model_types(head):
        try:
            subject = subject_of(model_type, head)
        except Exception as error:  # one architecture must not hide the others
            others[model_type] = f"not made: {error}"
            continue
        found = subject if isinstance(subject, str) else broken(subject)
        if found:
            others[model_type] = found
        else:
            kept.append(model_type)
    print(f"{head}: {len(kept)} of {len(model_types(head))}", *others.items(), sep="\n")
    assert len(kept) >= 0.9 * len(model_types(head))
    for model_type, what in others.items():
        known = HEADS[head][1][model_type] in REFUSED or model_type in UNMADE
        assert known or set(what) == PARTLY.get(model_type), (model_type, what)


def test_the_page_of_the_docs_has_the_list():
    assert (FOLDER.parent / "models.md").read_text(encoding="utf-8") == page()
    assert all(f"| {name} | {why} |" in page() for name, why in REFUSED.items())
    classes = {c for head in HEADS for c in HEADS[head][1].values()}
    assert set(REFUSED) <= classes and set(NOT_AGAIN) - {"FlaubertWithLMHeadModel"} <= classes


def test_a_refused_architecture_is_refused_from_its_configuration_alone(tmp_path):
    tiny_config("reformer").save_pretrained(tmp_path)
    located = locate(str(tmp_path))
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        with pytest.raises(RecipeError, match="Reformer.* trains only on texts of one fixed length"):
            refuse_architecture(auto, load_config(located))
        with pytest.raises(RecipeError, match="trains only on texts of one fixed length"):
            load_model(located, auto)  # no weights are there


def test_a_head_of_tags_that_looks_at_other_tokens_is_refused_at_load():
    class MixedForTokenClassification(LlamaForTokenClassification):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return type(out)(logits=out.logits + out.logits.mean(1, keepdim=True))

    with pytest.raises(LuthierError, match="MixedForTokenClassification: it has a head that luthier does not know"):
        ModelView.probed(MixedForTokenClassification(tiny_config("llama", TOKEN_CLASS)).eval())


def test_a_model_whose_own_call_gives_other_logits_is_refused_at_load():
    model = tiny_model("llama")
    own = model.forward
    model.forward = lambda *args, **kwargs: type(out := own(*args, **kwargs))(logits=out.logits * 1.1)
    with pytest.raises(LuthierError, match=r"LlamaForCausalLM: it has a head that luthier does not know "):
        ModelView.probed(model)


def test_an_encoder_is_no_causal_model():
    refuse_later_tokens(ModelView.probed(tiny_model("bert", is_decoder=True)))
    with pytest.raises(RecipeError, match="BertLMHeadModel sees the tokens that it should predict"):
        refuse_later_tokens(ModelView.probed(tiny_model("bert", is_decoder=False)))


@pytest.mark.parametrize(("model_type", "room"), [("roberta", 127), ("bert", 128), ("xlnet", 1 << 30), ("mpnet", 126)])
def test_positions_of_padding_are_no_room_for_tokens(model_type, room):
    assert max_positions(tiny_config(model_type, TEXT_CLASS)) == room


def test_padding_is_given_only_where_the_model_minds_it():
    lengths = {t: ways(ModelView.probed(tiny_model(t))) for t in ("llama", "roberta", "bart", "mamba", "openai-gpt")}
    assert [w.cache for w in lengths.values()] == [True, True, True, False, False]
    assert [w.padding for w in lengths.values()] == [True, True, False, True, True]


def test_blocks_that_cannot_be_computed_twice_refuse_checkpointing():
    view = ModelView.probed(tiny_model("xlm", TEXT_CLASS))
    with pytest.raises(LuthierError, match="gradient_checkpointing: XLMForSequenceClassification"):
        view.checkpoint_blocks()


def test_a_block_that_runs_several_times_has_no_numbered_states():
    view = ModelView.probed(tiny_model("albert", TEXT_CLASS))
    with pytest.raises(LuthierError, match="runs block 0 several times"):
        view.trace(collate([{"ids": [5, 6, 7], "labels": [-100] * 3}]), (0, -1))


def test_states_between_blocks_of_sequences_that_run_singly_are_the_models_own():
    view = ModelView.probed(tiny_model("convbert", TEXT_CLASS))
    assert view.singly
    rows = [[5, 6, 7, 8], [9, 10]]
    batch = collate([{"ids": r, "labels": [-100] * len(r)} for r in rows])
    found = view.trace(batch, (1, -1)).hidden
    with torch.no_grad():
        own = [view.module(input_ids=torch.tensor([r]), output_hidden_states=True).hidden_states for r in rows]
    torch.testing.assert_close(found[1], torch.cat([o[1][0] for o in own]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[-1], torch.cat([o[-1][0] for o in own]), atol=1e-5, rtol=1e-5)


def test_a_model_may_write_into_what_a_layer_with_an_adapter_gives():
    x, w, a, b = (torch.randn(*s, requires_grad=s != (4, 3)) for s in ((2, 5, 3), (4, 3), (2, 3), (4, 2)))
    out = low_rank_linear(x, w, None, a, b, 1.0)
    out[..., :2] *= 2  # Falcon's rotary code does this
    out.sum().backward()
    scale = torch.tensor([2.0, 2, 1, 1])
    torch.testing.assert_close(x.grad, (scale @ (w + b @ a)).expand_as(x).detach())


def test_routers_and_kernels_weights_are_no_linear_layers():
    phimoe, mamba = (ModelView(tiny_model(t)).anatomy.block_linears for t in ("phimoe", "mamba"))
    assert not any(x.module.endswith("router") for x in phimoe) and any(x.role == "q" for x in phimoe)
    assert {x.module.rpartition(".")[2] for x in mamba} == {"in_proj"}


def test_an_adapter_that_peft_would_put_elsewhere_is_kept_in_our_own_form(tmp_path):
    for model_type, shared in (("deepseek_v3", False), ("mixtral", True)):
        view = ModelView.probed(tiny_model(model_type))
        trainable = Lora(rank=2).attach(view)
        save_update(trainable.update(), tmp_path / model_type, view)
        assert (tmp_path / model_type / "adapter_config.json").exists() == shared


def test_full_tuning_trains_experts():
    view = ModelView.probed(tiny_model("mixtral"))
    trainable = Full().attach(view)
    assert any(p.ndim == 3 for g in trainable.groups() for p in g.params)


@pytest.mark.parametrize("ids", [[5, 6, 0], [5, 0, 6], [0, 0], [7]])
def test_a_decoder_classifies_by_the_token_that_transformers_takes(ids):
    """Padding tokens at the end of a text are not read, as when the saved model is used."""
    model = tiny_model("llama", TEXT_CLASS)
    view = ModelView.probed(model)
    batch = collate([{"ids": r, "labels": [-100] * len(r)} for r in ([8, 9], ids)])
    with torch.no_grad():
        found = view.class_logits(view.trace(batch).hidden[-1], batch)[1]
        torch.testing.assert_close(found, model(input_ids=torch.tensor([ids])).logits[0], atol=1e-5, rtol=1e-5)
