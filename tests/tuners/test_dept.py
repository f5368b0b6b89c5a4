"""The exact checks of the sheet; numbers in names are the sheet's."""

import pytest
import torch

from luthier.data.batch import collate
from luthier.model.view import ModelView
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import RecipeError
from luthier.testing.models import batch_of, byte_tokenizer, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.dept import Dept, budget_rank, scale

SMALL = {"budget_length": 12, "length": 4, "max_length": 16}


def moved(view, **fields):
    trainable = Dept(**{**SMALL, **fields}).attach(view)
    with torch.no_grad():
        trainable.b.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return trainable


def states(view, batch):
    with torch.no_grad():
        return view.trace(batch).hidden[-1]


def test_1_zero_offset_is_plain_prompt_tuning():
    view, batch = view_of(), batch_of()
    dept = Dept(**SMALL).attach(view)
    with_zero = states(view, batch)
    vectors = dept.vectors.detach().clone()
    dept.detach()
    plain = Dept(**SMALL, rank=0).attach(view)
    with torch.no_grad():
        plain.vectors.copy_(vectors)
    assert torch.equal(with_zero, states(view, batch))


def test_2_rank_zero_is_prompt_tuning_and_length_zero_is_the_bare_model():
    view, batch = view_of(), batch_of()
    bare = states(view, batch)
    plain = Dept(budget_length=12, length=12, rank=0).attach(view)
    assert [p.numel() for p in plain.parameters()] == [12 * 32]
    plain.detach()
    Dept(budget_length=12, length=0, max_length=16).attach(view)
    assert torch.equal(bare, states(view, batch))


@pytest.mark.parametrize(("s", "m", "r"), [(256, 80, 15), (256, 60, 30), (256, 40, 45), (512, 60, 24)])
def test_3_official_budgets(s, m, r):
    assert budget_rank(100, m, 768, s) == r


def test_3_budget_is_kept_and_tight():
    for d in (32, 576, 768):
        for length in (20, 100):
            for s in (16, 64, 256):
                for m in range(1, length, 7):
                    r = budget_rank(length, m, d, s)
                    assert m * d + (s + d) * r <= length * d < m * d + (s + d) * (r + 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_4_padding_changes_nothing(kind):
    view = view_of(kind)
    moved(view)
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
    reference = view.module(
        input_ids=ids, attention_mask=torch.ones_like(ids), prompt_mask=torch.ones_like(ids)
    ).logits[0, -1]
    for left, right in ((3, 0), (17, 0), (0, 5), (3, 5)):
        padded = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        logits = view.module(input_ids=padded, attention_mask=mask, prompt_mask=mask).logits[0, left + 8]
        torch.testing.assert_close(logits, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_4_our_layouts_equal_the_plain_model_call(layout):
    view, rows = view_of(), rows_of()
    view.layout = layout
    moved(view)
    together = states(view, collate(rows))
    start = 0
    for row in rows:
        ids = torch.tensor([row["ids"]])
        prompt = torch.tensor([row["token"]["prompt"]])
        logits = view.module(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_mask=prompt).logits[0]
        ours = together[start : start + ids.shape[1]] @ view.head_weight.T
        torch.testing.assert_close(ours, logits, atol=1e-5, rtol=0)
        start += ids.shape[1]


def test_5_gradients_and_rates():
    view = view_of()
    trainable = Dept(**SMALL, prompt_learning_rate=0.02, offset_learning_rate=0.003).attach(view)
    settings = TrainSettings(max_steps=3, batch_size=4, warmup_fraction=0, lr_scheduler_type="constant")
    loop = Loop(view, rows_of(), trainable, Sft(), settings)
    assert [g["lr"] for g in loop.optimizer.param_groups] == [0.02, 0.003]

    def backward():
        window = loop.window(loop.progress.step)
        loss = loop._losses(window, loop.objective.plan(window, loop.probe)[1], backward=True)
        assert loss[0] > 0
        grads = trainable.a.grad.abs().sum(), trainable.b.grad.abs().sum()
        loop.optimizer.zero_grad()
        return [float(g) for g in grads]

    at_zero = backward()
    loop.step()
    later = backward()
    assert at_zero[0] == 0 and at_zero[1] > 0 and later[0] > 0
    assert all(p.grad is None for n, p in view.module.named_parameters() if "luthier_" not in n)


def test_6_exported_offsets_equal_the_factors_and_the_cache_changes_nothing():
    view, batch = view_of(), batch_of()
    trainable = moved(view)
    live = states(view, batch)
    update = trainable.update()
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    texts = [
        view.module.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            use_cache=cache,
            eos_token_id=None,
        )
        for cache in (True, False)
    ]
    assert torch.equal(texts[0], texts[1])
    trainable.detach()
    with update.bind(view):
        torch.testing.assert_close(states(view, batch), live, atol=1e-6, rtol=0)
    assert not view.input_hooks


def test_7_training_and_generation_see_the_same_inputs():
    view = view_of()
    moved(view)
    row = rows_of((11,), answer=4)[0]
    forced = states(view, collate([row])) @ view.head_weight.T
    prompt = torch.tensor([row["ids"][:7]])
    out = view.module.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(out.logits[0][0], forced[6], atol=1e-5, rtol=0)


# --- golden: logits by a formula of its own (the published code's differ by 0.0) ---


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("reach", [3, 16], ids=["prompt longer than the offsets", "shorter"])
def test_logits_equal_the_formula(kind, reach):
    """E' = E + c (A B)[position] on the prompt, c = alpha / sqrt(r); the plain model on [P; E'], less its first m rows."""
    view, row, rank = view_of(kind), rows_of((11,), answer=4)[0], 3
    trainable = moved(view, max_length=reach, rank=rank, alpha=5.0)
    p, a, b = (x.detach() for x in (trainable.vectors, trainable.a, trainable.b))
    assert a.shape == (reach, rank) and b.shape == (rank, 32) and p.shape == (4, 32)
    table, ids = view.embedding.weight.detach(), torch.tensor(row["ids"])
    embeds = table[ids].clone()
    for t in range(7):  # of 11 tokens 4 are the answer
        if t < reach:
            embeds[t] += 5.0 / rank**0.5 * (a[t] @ b)
    plain = tiny(kind).eval()
    with torch.no_grad():
        wanted = plain(inputs_embeds=torch.cat([p, embeds])[None]).logits[0, 4:]
        prompt = torch.tensor([row["token"]["prompt"]])
        called = view.module(input_ids=ids[None], prompt_mask=prompt).logits[0]
        ours = states(view, collate([row])) @ view.head_weight.T
        bare = plain(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(called, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=0)
    assert float((bare - wanted).abs().max()) > 0.05


def test_the_prompt_side_of_a_plain_call_ends_at_the_first_label():
    """Tokens without a label after the answer, of a second turn or of padding, get no offset."""
    view = view_of()
    moved(view)
    ids = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    labels[0, 4:6] = ids[0, 4:6]
    labels[0, 8:] = ids[0, 8:]
    by_labels = view.module(input_ids=ids, labels=labels)
    by_mask = view.module(input_ids=ids, labels=labels, prompt_mask=(torch.arange(10) < 4).long()[None])
    assert torch.equal(by_labels.logits, by_mask.logits) and torch.equal(by_labels.loss, by_mask.loss)
    own = torch.nn.functional.cross_entropy(by_mask.logits[0, :-1], labels[0, 1:])  # the vectors carry no label
    torch.testing.assert_close(by_mask.loss, own)


def test_the_official_scales():
    """c = 8 / sqrt(r) at the ranks of the released checkpoints: not alpha / r."""
    assert [round(scale(8.0, r), 2) for r in (15, 24, 30, 45)] == [2.07, 1.63, 1.46, 1.19]
    assert scale(8.0, 1) == 8.0 and scale(8.0, 0) == 0.0


def test_a_starts_kaiming_uniform_and_b_at_zero():
    """U(-1/sqrt(r), 1/sqrt(r)): fan-in of the official nn.Parameter [s, r] is r."""
    trainable = Dept(budget_length=12, length=4, max_length=400, rank=4).attach(view_of())
    a = trainable.a.detach()
    assert 0.49 < float(a.max()) <= 0.5 and -0.5 <= float(a.min()) < -0.49
    assert float(a.std()) == pytest.approx(0.5 / 3**0.5, rel=0.05)
    assert not trainable.b.any()
    other = Dept(budget_length=12, length=4, max_length=400, rank=4, seed=1).attach(view_of())
    assert not torch.equal(a, other.a)


@pytest.mark.parametrize("length", [2, 5, 13], ids=["cut", "whole", "repeated"])
def test_vectors_start_from_the_text(length):
    view = ModelView(tiny(vocab_size=260).eval(), byte_tokenizer(), "flat")
    trainable = Dept(budget_length=20, length=length, max_length=8, init_text="a fly").attach(view)
    text = view.tokenizer("a fly", add_special_tokens=False)["input_ids"]
    assert len(text) == 5 and len(set(text)) == 5
    for i in range(length):
        assert torch.equal(trainable.vectors[i], view.embedding.weight[text[i % 5]])


def test_what_trains_is_found_among_the_models_parameters_until_it_is_taken_off():
    view = view_of()
    before = [n for n, _ in view.module.named_parameters()]
    trainable = moved(view)
    found = {n: p for n, p in view.module.named_parameters() if n not in before}
    assert {id(p) for p in found.values()} == {id(p) for p in (trainable.vectors, trainable.a, trainable.b)}
    trainable.detach()
    assert [n for n, _ in view.module.named_parameters()] == before


def test_the_marks_that_a_tokenizer_adds_are_no_text():
    class Marking:
        chat_template = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [0] * add_special_tokens + [5, 6]}

        def get_vocab(self):
            return {}

    view = view_of()
    view.tokenizer = Marking()
    vectors = Dept(**SMALL).attach(view).vectors
    assert torch.equal(vectors[0], view.embedding.weight[5]) and torch.equal(vectors[1], view.embedding.weight[6])


def test_a_rank_of_one_is_a_rank():
    trainable = Dept(budget_length=6, length=4, max_length=16).attach(view_of())
    assert trainable.rank == 2 * 32 // (16 + 32) == 1
    assert not trainable.update().parts[0].vectors.requires_grad


def test_vectors_start_from_rows_of_the_table_where_there_is_no_tokenizer():
    view = view_of()
    vectors = Dept(**SMALL).attach(view).vectors.detach()
    rows = [int((view.embedding.weight == v).all(1).nonzero()) for v in vectors]
    assert len(set(rows)) > 1
    assert not torch.equal(vectors, Dept(**SMALL, seed=5).attach(view_of()).vectors)


def test_bad_input():
    with pytest.raises(RecipeError, match="leaves no rank: l = 12, m = 12"):
        Dept(budget_length=12, length=12).attach(view_of())
    view = view_of()
    moved(view)
    ids = torch.ones(1, 4, dtype=torch.long)
    empty = ModelView(tiny(vocab_size=260).eval(), byte_tokenizer(), "flat")
    with pytest.raises(RecipeError, match=r"dept.init_text: '' holds no token; write some words"):
        Dept(**SMALL, init_text="").attach(empty)
    with pytest.raises(ValueError, match="prompt_mask"):
        view.module(input_ids=ids)
    with pytest.raises(ValueError, match="column 'prompt'"):
        view.trace(collate([{"ids": [3, 4], "labels": [3, 4]}]))


def test_base_is_untouched():
    view, reference = view_of(), tiny()
    trainable = moved(view)
    trainable.detach()
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in view.module.named_parameters())
    assert "forward" not in vars(view.module) and "generate" not in vars(view.module)
