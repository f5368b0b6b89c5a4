"""The algebra of updates, their files, and what refuses."""

import json
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.model.fingerprint import Fingerprint
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError
from luthier.testing.models import batch_of, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora
from luthier.update import Chart, Dense, LowRank, Seeds, Sparse, Update, add
from luthier.update.files import adapter_base, load, save_update, verify_update

NAME = "model.layers.0.self_attn.q_proj.weight"


def parts(seed):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    k = torch.randperm(32 * 32, generator=g)[:50].sort().values
    return {
        "dense": Dense({NAME: rand(32, 32)}),
        "sparse": Sparse({NAME: k}, {NAME: rand(50)}, {NAME: (32, 32)}),
        "lowrank": LowRank({NAME: rand(2, 32)}, {NAME: rand(32, 2)}, {NAME: 0.5}),
        "seeds": Seeds(torch.tensor([seed + 3, 8]), torch.tensor([0.1, -0.2], dtype=torch.float64), {NAME: (32, 32)}),
    }


@pytest.fixture(scope="module")
def base():
    return view_of().base


def test_factors_stored_the_other_way_round_add_too(base):
    square = parts(0)["lowrank"]
    turned = LowRank({NAME: square.b[NAME].T}, {NAME: square.a[NAME].T}, square.scale, frozenset([NAME]))
    for one, other in ((square, turned), (turned, square)):
        both = Update(base, (one,)) + Update(base, (other,))
        expected = Update(base, (one,)).dense()[NAME] + Update(base, (other,)).dense()[NAME]
        torch.testing.assert_close(both.dense()[NAME], expected)
        assert both.parts[0].transposed == one.transposed


def test_a_multiple_from_either_side_and_the_sum_of_a_list(base):
    several = [Update(base, (Dense({NAME: torch.full((32, 32), c)}),)) for c in (1.0, 4.0, 16.0)]
    assert torch.equal((several[0] * 3.0).dense()[NAME], torch.full((32, 32), 3.0))
    assert torch.equal((3.0 * several[0]).dense()[NAME], torch.full((32, 32), 3.0))
    assert torch.equal(add(several).dense()[NAME], torch.full((32, 32), 21.0))


def test_factors_are_never_multiplied_out_for_an_inner_product_or_a_lower_rank(base, monkeypatch):
    """B A is b a^T, of entries b_i a_j: <b a^T, b' a'^T> is (b . b') (a . a')."""
    lines = torch.arange(32.0), torch.ones(32), torch.full((32,), 2.0)
    one, other = (LowRank({NAME: a[None]}, {NAME: b[:, None]}, {NAME: 0.5}) for a, b in (lines[:2], lines[1:]))
    with monkeypatch.context() as patched:
        patched.setattr(LowRank, "deltas", None)
        assert Update(base, (one,)).inner(Update(base, (other,))) == 0.25 * (64 * 496)
        same, error = Update(base, (one,)).to("lowrank", rank=1)
    assert error < 1e-6
    torch.testing.assert_close(same.dense()[NAME], 0.5 * lines[1][:, None] * lines[0][None])


def test_every_part_counts_in_an_inner_product_and_in_another_form(base):
    ones, at = (
        Dense({NAME: torch.ones(32, 32)}),
        Sparse({NAME: torch.tensor([5])}, {NAME: torch.tensor([7.0])}, {NAME: (32, 32)}),
    )
    both, alone = Update(base, (ones, at)), Update(base, (ones,))
    assert both.inner(alone) == alone.inner(both) == 1024 + 7 and both.inner(both) == 1024 + 2 * 7 + 49
    whole, error = both.to("dense")
    assert error == 0.0 and whole.dense()[NAME].view(-1)[4:7].tolist() == [1.0, 8.0, 1.0]


def test_coordinates_need_factors_and_a_chart(base):
    chart, factors = Chart({f"a.{NAME}": torch.zeros(2, 32)}), parts(0)["lowrank"]
    for update in (Update(base, (parts(0)["dense"],), chart), Update(base, (factors,))):
        with pytest.raises(TypeError, match="coordinates need one low-rank part and the chart"):
            update.coordinates()
    (row,) = Update(base, (factors,), chart).coordinates()
    assert torch.equal(row, torch.cat([factors.a[NAME].reshape(-1), factors.b[NAME].reshape(-1)]))


def test_other_bases_do_not_add(base):
    other = Fingerprint(name="other", weights="0", tokenizer="0")
    with pytest.raises(TypeError, match="different bases"):
        Update(base, (parts(0)["dense"],)) + Update(other, (parts(0)["dense"],))


def test_forms_convert_with_their_error(base):
    u = Update(base, (parts(0)["lowrank"],))
    same, error = u.to("lowrank", rank=2)
    assert error < 1e-5
    torch.testing.assert_close(same.dense()[NAME], u.dense()[NAME], atol=1e-4, rtol=0)
    less, error = u.to("lowrank", rank=1)
    singular = torch.linalg.svdvals(u.dense()[NAME].double())
    assert error == pytest.approx(float(singular[1] / singular.square().sum().sqrt()), rel=1e-4)
    few, error = u.to("sparse", density=0.1)
    assert 0 < error < 1 and len(few.parts[0].indices[NAME]) == 102
    assert u.to("sparse", density=1.0)[1] == 0.0
    with pytest.raises(ValueError, match="form 'sparse'"):
        u.to("sparse")


@pytest.mark.parametrize("way", ["bind", "in_place"])
def test_a_strangers_update_is_refused_in_a_sentence(way):
    view = view_of()
    stranger = Update(view_of(seed=1).base, (parts(0)["dense"],))
    with pytest.raises(LuthierError, match=r"was trained on .* load that base"), getattr(stranger, way)(view):
        pass


def test_an_update_is_not_taken_off_below_another_on_the_same_weights():
    view, other = view_of(), Dense({"model.norm.weight": torch.ones(32)})
    with ExitStack() as first:
        first.enter_context(Update(view.base, (parts(0)["dense"],)).bind(view))
        with Update(view.base, (other,)).bind(view):
            pass  # in turn
        words = f"Bound came later and changed {NAME} too; take it off before Bound"
        with Update(view.base, (parts(1)["dense"],)).bind(view), pytest.raises(LuthierError, match=words):
            first.close()
    fresh = view_of()
    with ExitStack() as first:
        first.enter_context(Update(fresh.base, (parts(0)["dense"],)).bind(fresh))
        with Update(fresh.base, (other,)).bind(fresh):
            first.close()  # other weights


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (Dense({NAME: torch.zeros(3, 3)}), "has shape"),
        (Dense({"nowhere": torch.zeros(3)}), "no such tensor"),
        (Dense({NAME: torch.full((32, 32), float("nan"))}), "not finite"),
        (Dense({NAME: torch.zeros(32, 32, dtype=torch.int64)}), "real numbers are wanted"),
        (Sparse({NAME: torch.tensor([5])}, {NAME: torch.ones(1).half()}, {NAME: (32, 32)}), "float32 is wanted"),
        (Sparse({NAME: torch.tensor([5])}, {NAME: torch.ones(1)}, {NAME: (32, 32), "more": (1,)}), "names of indices"),
        (Sparse({NAME: torch.tensor([5, 5])}, {NAME: torch.ones(2)}, {NAME: (32, 32)}), "occurs twice"),
        (Sparse({NAME: torch.tensor([-1])}, {NAME: torch.ones(1)}, {NAME: (32, 32)}), "outside"),
        (Sparse({NAME: torch.tensor([1 << 40])}, {NAME: torch.ones(1)}, {NAME: (32, 32)}), "outside"),
        (Sparse({NAME: torch.tensor([1])}, {NAME: torch.ones(2)}, {NAME: (32, 32)}), "do not pair"),
        (LowRank({NAME: torch.zeros(2, 31)}, {NAME: torch.zeros(32, 2)}, {NAME: 1.0}), "the base"),
        (LowRank({NAME: torch.zeros(2, 32)}, {}, {NAME: 1.0}), "names of A, B"),
        (LowRank({NAME: torch.zeros(2, 32)}, {NAME: torch.zeros(32, 2)}, {NAME: float("nan")}), "not finite"),
        (LowRank({NAME: torch.zeros(2, 32).int()}, {NAME: torch.zeros(32, 2)}, {NAME: 1.0}), "real numbers are wanted"),
        (Seeds(torch.tensor([1]), torch.zeros(1), {}), "float64 is wanted"),
        (Seeds(torch.tensor([1, 1]), torch.zeros(2, dtype=torch.float64), {}), "seed occurs twice"),
        (Seeds(torch.tensor([1]), torch.tensor([float("inf")], dtype=torch.float64), {}), "not finite"),
    ],
)
def test_values_are_checked_before_anything_is_touched(part, match):
    view = view_of()
    with pytest.raises(LuthierError, match=match), Update(view.base, (part,)).bind(view):
        pass


def tuned(tuner, steps=3):
    view = view_of()
    trainable = tuner.attach(view)
    loop = Loop(view, rows_of(), trainable, Sft(), TrainSettings(max_steps=steps, batch_size=4, learning_rate=1e-2))
    for _ in range(steps):
        loop.step()
    return view, trainable


def test_a_lora_folder_opens_with_peft_and_keeps_its_chart(tmp_path):
    from peft import PeftModel

    view, trainable = tuned(Lora(rank=4, targets=("q_proj", "down_proj")))
    batch = batch_of((9,))
    live = view.trace(batch).hidden[-1].detach()
    update = trainable.update()
    save_update(update, tmp_path, view)
    trainable.detach()
    model = PeftModel.from_pretrained(tiny().eval(), str(tmp_path))
    theirs = model.base_model.model.model(input_ids=batch.ids.unsqueeze(0)).last_hidden_state[0]
    torch.testing.assert_close(theirs, live, atol=1e-5, rtol=1e-4)
    again = load(tmp_path)
    assert again.chart.digest == update.chart.digest
    assert torch.equal(again.coordinates(), update.coordinates())
    with again.bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], live, atol=1e-6, rtol=0)


def test_stacked_updates_open_with_peft_too(tmp_path):
    from peft import PeftModel

    a, b = (
        tuned(Lora(rank=r, targets=t, seed=r))[1].update() for r, t in ((4, ("q_proj",)), (2, ("q_proj", "v_proj")))
    )
    total = 0.3 * a + 0.7 * b
    save_update(total, tmp_path)
    model = PeftModel.from_pretrained(tiny().eval(), str(tmp_path))
    view, batch = view_of(), batch_of((9,))
    theirs = model.base_model.model.model(input_ids=batch.ids.unsqueeze(0)).last_hidden_state[0]
    with total.bind(view):
        torch.testing.assert_close(view.trace(batch).hidden[-1], theirs, atol=1e-5, rtol=1e-4)


def test_damaged_files_are_named(tmp_path, base):
    save_update(Update(base, (parts(0)["sparse"],)), tmp_path)
    header = tmp_path / "update.json"
    good = header.read_text()
    for text in (
        "",
        "[]",
        "{",
        json.dumps({"base": {}}),
        good.replace("sparse", "spares"),
        good.replace("shapes", "x"),
    ):
        header.write_text(text)
        with pytest.raises(LuthierError, match=r"update\.json"):
            load(tmp_path)
    header.write_text(good)
    tensors = load_file(tmp_path / "update.safetensors")
    save_file({k: v for k, v in tensors.items() if "values" not in k}, tmp_path / "update.safetensors")
    with pytest.raises(LuthierError, match="the names of indices, values and shapes differ"):
        load(tmp_path).validate(view_of().anatomy.parameters)
    (tmp_path / "update.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(LuthierError, match=r"update\.safetensors: is no safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("name", [None, "", 3])
def test_a_peft_folder_without_a_base_says_so(name, tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": name, "revision": "main"}))
    with pytest.raises(LuthierError, match="names no base model"):
        adapter_base(tmp_path)
    config.write_text(json.dumps({"base_model_name_or_path": "some/model", "revision": 7}))
    assert adapter_base(tmp_path) == ("some/model", None)


@pytest.mark.parametrize(("kind", "task"), [("llama", "CAUSAL_LM"), ("bert", None)])
def test_the_folder_for_peft_names_the_base_and_a_task_that_the_model_has(kind, task, tmp_path):
    view = view_of(kind)
    update = Lora(rank=2).attach(view).update()
    for place, wanted in (("", update.base.name), ("here/it/is", "here/it/is")):
        view.module.config._name_or_path = place
        save_update(update, tmp_path, view)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == (wanted, task)


def test_an_update_that_changes_nothing_is_no_result(tmp_path):
    view = view_of()
    trainable = Lora(rank=2).attach(view)
    save_update(trainable.update(), tmp_path, view)
    with pytest.raises(LuthierError, match="nothing was learnt"):
        verify_update(tmp_path, trainable.detach, view, {**rows_of()[0], "key": "0"})
