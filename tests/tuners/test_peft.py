"""peft's tuners: they train, go back bit for bit, and what they leave opens with PeftModel."""

import pytest
import torch

from luthier.method import Facts
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners import Peft
from luthier.update import PeftPart, Update
from luthier.update.files import load, save_update

KINDS = {
    "dora": Peft(type="LORA", options={"r": 4, "use_dora": True}),
    "rslora": Peft(type="LORA", options={"r": 4, "use_rslora": True}),
    "ia3": Peft(type="IA3"),
    "loha": Peft(type="LOHA", options={"r": 4}),
    "lokr": Peft(type="LOKR", options={"r": 4}),
    "vera": Peft(type="VERA", options={"r": 8}, targets=("q_proj", "o_proj")),
    "oft": Peft(type="OFT", options={"oft_block_size": 4}),
    "hra": Peft(type="HRA", options={"r": 4}),
}


def trained(tuner, steps=4):
    view = view_of()
    loop = Loop(
        view, rows_of(), tuner.attach(view), Sft(), TrainSettings(max_steps=steps, batch_size=4, learning_rate=1e-2)
    )
    losses = [loop.step()["loss"] for _ in range(steps)]
    view.module.eval()
    return view, loop.trainable, losses


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_saves_opens_with_peft_merges_and_goes(name, tmp_path):
    from peft import PeftModel

    plain = {n: p.detach().clone() for n, p in tiny().named_parameters()}
    view, trainable, losses = trained(KINDS[name])
    assert losses[-1] < losses[0]
    batch, update = batch_of(), trainable.update()
    live = view.trace(batch).hidden[-1].detach()
    save_update(update, tmp_path, view)
    trainable.detach()
    assert {n: p for n, p in view.module.named_parameters()}.keys() == plain.keys()
    assert all(torch.equal(p, plain[n]) for n, p in view.module.named_parameters())
    base = view.trace(batch).hidden[-1]
    assert not torch.equal(base, live)
    with load(tmp_path).bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], live, atol=1e-5, rtol=1e-4)
    assert torch.equal(view.trace(batch).hidden[-1], base)
    ids = batch.ids[:9].unsqueeze(0)
    with update.bind(view):
        ours = view.module(ids).logits
    theirs = PeftModel.from_pretrained(tiny(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5, rtol=1e-4)
    merged = view_of()
    update.merge_into(merged.module)
    torch.testing.assert_close(merged.module(ids).logits, ours, atol=1e-4, rtol=1e-3)
    assert {n for n, _ in merged.module.named_parameters()} == plain.keys()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gpt2", {"bias": "all"}), ("gpt2", {"bias": "lora_only"}), ("gpt2", {"modules_to_save": ["ln_f"]}),
     ("llama", {"modules_to_save": ["lm_head"]})],
)  # fmt: skip
def test_what_peft_trains_beside_its_adapters_comes_off_too(kind, options):
    view, plain, batch = view_of(kind), tiny(kind), batch_of((9,))
    ids, flags = batch.ids[None], [p.requires_grad for p in view.module.parameters()]
    base = view.module(ids).logits
    trainable = Peft(options={"r": 4, "lora_dropout": 0.5, **options}).attach(view)
    with torch.no_grad():
        for p in trainable.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    live, update = view.module(ids).logits, trainable.update()
    assert any("lora_" not in n for n in update.parts[0].state)
    trainable.detach()
    is_the_base(view, plain, flags)
    view.module.train()
    with update.bind(view):
        torch.testing.assert_close(view.module(ids).logits, live, atol=1e-6, rtol=1e-5)  # nothing is dropped out
        own = {n for n, p in view.module.named_parameters() if p.requires_grad}
        assert not any("lora_" in n for n in own) and len(own) == len(flags)
    is_the_base(view, plain, flags)
    view.module.eval()
    assert torch.equal(view.module(ids).logits, base)


def is_the_base(view, plain, flags):
    now = dict(view.module.named_parameters())
    assert list(now) == [n for n, _ in plain.named_parameters()] and not hasattr(view.module, "peft_config")
    assert all(torch.equal(p, plain.get_parameter(n)) for n, p in now.items())
    assert [p.requires_grad for p in now.values()] == flags


def test_two_of_pefts_adapters_are_refused_and_the_first_stays():
    view, batch = view_of(), batch_of()
    first = Peft(options={"r": 4}).attach(view)
    with torch.no_grad():
        for p in first.parameters():
            p.fill_(0.1)
    live = view.trace(batch).hidden[-1]
    for second in (Peft(type="IA3"), Peft(options={"r": 2})):
        with pytest.raises(LuthierError, match="is on this model already, and two do not stack; detach it first"):
            second.attach(view)
        assert view.attached == [first] and all(p.requires_grad for p in first.parameters())
    assert torch.equal(view.trace(batch).hidden[-1], live)


@pytest.mark.parametrize(
    ("kind", "ends"), [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj"), ("bert", "2.output.dense")]
)
def test_ia3_scales_the_input_of_the_mlps_second_matrix_and_the_output_of_the_others(kind, ends):
    view = view_of(kind)
    trainable = Peft(type="IA3").attach(view)
    inputs = trainable.wrapped.peft_config["default"].feedforward_modules
    assert len(inputs) == 3 and any(n.endswith(ends) for n in inputs) and not any("attention" in n for n in inputs)
    sizes = {n: p.numel() for n, p in trainable.named.items()}
    for x in view.anatomy.block_linears:
        size = x.shape[1] if x.module in inputs else x.shape[0]
        assert sizes[f"base_model.model.{x.module}.ia3_l.default"] == size


def test_the_start_follows_the_seed_and_leaves_the_process_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    starts = [
        torch.cat([p.detach().flatten() for p in Peft(options={"r": 4}, seed=s).attach(view).named.values()])
        for s, view in ((0, view_of(seed=1)), (0, view_of(seed=1)), (1, view_of(seed=1)))
    ]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    view = view_of()
    torch.manual_seed(7)
    Peft(options={"r": 4}).attach(view)
    assert torch.equal(torch.rand(1), expected)


def test_peft_lora_is_our_lora():
    """The same start gives the same losses, so wrapping costs no meaning."""
    from luthier.tuners import Lora

    view, trainable, losses = trained(Peft(type="LORA", options={"r": 4, "lora_alpha": 8}))
    other = view_of()
    ours = Lora(rank=4, alpha=8).attach(other)
    started = view_of()
    Peft(type="LORA", options={"r": 4, "lora_alpha": 8}).attach(started)
    theirs = dict(started.module.named_parameters())
    with torch.no_grad():
        for module, a in ours.a.items():
            a.copy_(theirs[f"{module.removesuffix('.weight')}.lora_A.default.weight"])
    loop = Loop(other, rows_of(), ours, Sft(), TrainSettings(max_steps=4, batch_size=4, learning_rate=1e-2))
    assert [loop.step()["loss"] for _ in range(4)] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("together", [False, True])
def test_a_copy_of_a_tied_weight_is_refused(module, together):
    """peft#2777, LlamaFactory#10832: the merged model would lose the copy."""
    options = {"modules_to_save": [module], "ensure_weight_tying": together}
    view = view_of(tie_word_embeddings=True)
    with pytest.raises(RecipeError, match="modules_to_save: peft would train a copy of (model.embed_tokens|lm_head)"):
        Peft(options=options).attach(view)
    is_the_base(view, tiny(tie_word_embeddings=True), [True] * len(list(view.module.parameters())))
    assert Peft(options={"modules_to_save": ["norm"]}).attach(view).parameters()
    assert Peft(options=options).attach(view_of()).parameters()


def test_wrong_options_are_named():
    view = view_of()
    for options, words in (
        ({"rang": 4}, "options.rang: peft's LORA has no such option"),
        ({"init_lora_weights": "pissa"}, "'pissa' rewrites the base"),
        ({"target_modules": ["q_proj"]}, "options.target_modules"),
    ):
        with pytest.raises(RecipeError, match=words):
            Peft(options=options).attach(view_of())
    assert [p.key for p in Peft(options={"rang": 4}).check(Facts())] == ["options.rang"]
    with pytest.raises(RecipeError, match=r"tuner\.peft\.options"):
        Peft(options={"r": 0}).attach(view)
    assert not view.attached and all(p.requires_grad for p in view.module.parameters())
    assert [n for n, _ in view.module.named_parameters()] == [n for n, _ in tiny().named_parameters()]


@pytest.mark.parametrize(
    "type_, options, words",
    [
        (
            "LORA",
            {"layers_pattern": "layers"},
            "When `layers_pattern` is specified, `layers_to_transform` must also be",
        ),
        ("OFT", {"r": 8, "oft_block_size": 4}, "You can only specify either r (8) or oft_block_size (4)"),
    ],
)
def test_options_that_peft_refuses_are_seen_before_a_model_is_loaded(type_, options, words):
    (problem,) = Peft(type=type_, options=options).check(Facts())
    assert problem.key == "options" and problem.what.startswith(words) and "\n" not in problem.what
    assert problem.remedy == "see peft's documentation"


def test_of_what_peft_says_the_first_line_is_told(monkeypatch):
    def config(self, **found):
        raise TypeError("no such option\nUsage: many lines")

    monkeypatch.setattr(Peft, "config", config)
    assert [p.what for p in Peft().check(Facts())] == ["no such option"]


def test_options_that_choose_among_the_targets_are_those_of_a_list():
    view = view_of()
    trainable = Peft(options={"r": 2, "layers_to_transform": 1, "layers_pattern": "layers"}).attach(view)
    assert len(trainable.named) == 14 and all("layers.1." in n for n in trainable.named)
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    scaled = Peft(type="IA3", targets="down_proj", options={"feedforward_modules": down}).attach(view_of())
    assert {tuple(p.shape) for p in scaled.named.values()} == {(1, 64)}


def test_a_hostile_adapter_is_refused_by_name():
    view, trainable, _ = trained(KINDS["dora"])
    (part,) = trainable.update().parts
    trainable.detach()
    name = next(iter(part.state))
    for broken, words in (
        (PeftPart({**part.config, "peft_type": "EVIL"}, part.state), "cannot be put on the base"),
        (PeftPart({**part.config, "target_modules": ["no.such"]}, part.state), "layers that the base has not"),
        (PeftPart({**part.config, "surprise": 1}, part.state), "cannot be put on the base"),
        (PeftPart(part.config, {**part.state, name: part.state[name] * float("nan")}), "not finite"),
        (PeftPart(part.config, {**part.state, name: part.state[name][:1]}), "cannot be put on the base"),
        (PeftPart(part.config, {**part.state, "base_model.model.extra.lora_A.weight": torch.zeros(2)}), "no place for"),
    ):
        with pytest.raises(LuthierError, match=words), Update(view.base, (broken,)).bind(view):
            pass
        is_the_base(view, tiny(), [True] * len(list(tiny().parameters())))


def test_a_state_is_numbers_and_gives_parameters_back():
    first, second = (Peft(options={"r": 2}, seed=s).attach(view_of()) for s in (0, 1))
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.5)
    state = {k: t.clone() for k, t in first.state_dict().items()}
    second.load_state_dict(state)
    assert len(state) == len(second.named) == 2 * 21, "A and B of seven matrices in three blocks"
    assert all(torch.equal(p, state[n]) for n, p in second.named.items())
