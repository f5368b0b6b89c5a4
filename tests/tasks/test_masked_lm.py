"""Masked language modelling: which tokens are hidden, how they are scored, and that every sort of tuner learns them."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig

from luthier import recipe as recipes
from luthier.data.batch import IGNORE, collate, predicted
from luthier.data.prepare import prepare
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.evaluation import Loss, MaskedAccuracy
from luthier.evaluation.base import Exam
from luthier.inference.services import lab_with
from luthier.method import Facts
from luthier.objectives.sft import Sft
from luthier.step.forward import Forward
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.tasks.base import refuse_unknown_head
from luthier.tasks.masked_lm import MaskedLm, TextRows, hidden, num_hidden, ordinary
from luthier.testing.models import byte_tokenizer, tiny, view_of, word_tokenizer
from luthier.training.loop import Interrupted, Loop
from luthier.tuners import Adapter, FedKSeed, Full, Hft, Layerwise, Lift, Lora, Spiel
from luthier.update.files import load, save_update

MASK = 4  # in word_tokenizer
TEXTS = [
    f"the {thing} was {how} . {who} {how} {thing} {tail}"
    for thing in ("film", "book", "day")
    for how in ("good", "bad", "great", "poor")
    for who, tail in (("a very", "is liked ."), ("not a", "was long on the day ."))
]


def rows_of(texts=TEXTS, tokenizer=None):
    sources = [Row(f"f.jsonl:{i}", {"text": t}) for i, t in enumerate(texts, 1)]
    renderer = Renderer(tokenizer or word_tokenizer())
    config = BertConfig(vocab_size=max(renderer.tokenizer.get_vocab().values()) + 1)
    maker = MaskedLm().maker(renderer, config, {})
    return list(prepare(sources, renderer, max_length=64, maker=maker).rows)


def words_view(kind="bert", **more):
    """Weights drawn wider than usual: a head tied to tiny embeddings could say little else than what it starts with."""
    return view_of(kind, vocab_size=len(word_tokenizer()), layers=2, initializer_range=0.1, **more)


def loop_of(tuner, kind="bert", view=None, rows=None, folder=None, stop=lambda: False, **changes):
    view = view or words_view(kind)
    more = {"lr_scheduler_type": "constant", "warmup_fraction": 0.0} if "closure" in tuner.traits.needs else {}
    settings = TrainSettings(**{"max_steps": 8, "batch_size": 8, "learning_rate": 1e-2, **more, **changes})
    trainable = tuner.attach(view, total_steps=settings.max_steps)
    draw = MaskedLm().draw(word_tokenizer(), settings.seed)
    rows = rows or rows_of()
    return Loop(view, rows, trainable, Sft(), settings, folder=folder, stop=stop, data_hash="texts", draw=draw)


# --- which tokens are hidden ---


def test_the_number_hidden_worked_by_hand():
    assert [num_hidden(n, 0.15) for n in (0, 1, 3, 9, 11, 20, 100)] == [0, 1, 1, 1, 2, 3, 15]
    assert num_hidden(4, 1.0) == 4


def test_of_the_chosen_80_percent_become_the_mask_10_another_word_and_10_stay():
    words, rows, n, count = np.arange(1000, 2000), 500, 40, 6
    fates = {"mask": 0, "other": 0, "same": 0}
    places = list(range(5, 35))
    seen = np.zeros(n)
    for k in range(rows):
        ids = list(range(100, 100 + n))
        out, targets = hidden(ids, places, count, 7, words, np.random.default_rng(k))
        chosen = [i for i, y in enumerate(targets) if y != IGNORE]
        assert len(chosen) == count and set(chosen) <= set(places)
        assert all(targets[i] == ids[i] for i in chosen) and all(out[i] == ids[i] for i in range(n) if i not in chosen)
        for i in chosen:
            seen[i] += 1
            fates["mask" if out[i] == 7 else "same" if out[i] == ids[i] else "other"] += 1
            assert out[i] in (7, ids[i]) or 1000 <= out[i] < 2000
    total = rows * count
    for name, share in (("mask", 0.8), ("other", 0.1), ("same", 0.1)):
        assert abs(fates[name] / total - share) < 4 * math.sqrt(share * (1 - share) / total), fates
    expected = total / len(places)  # every place alike
    assert abs(seen[5:35] - expected).max() < 5 * math.sqrt(expected)


def test_special_tokens_are_never_hidden_whatever_stands_in_the_text():
    tokenizer = word_tokenizer()
    special = set(tokenizer.all_special_ids)
    rows = rows_of(["the film [SEP] was [MASK] zebra good", "good", "[MASK] zebra bad"])
    assert [r["ids"][0] for r in rows] == [2] * 3 and [r["ids"][-1] for r in rows] == [3] * 3
    draw = MaskedLm(mask_fraction=1.0).draw(tokenizer, 0)
    for row in rows:
        for epoch in (None, 0, 1, 2):
            drawn = draw(row, epoch)
            for before, after, target in zip(row["ids"], drawn["ids"], drawn["targets"], strict=True):
                if before in special:
                    assert after == before and target == IGNORE
                else:
                    assert target == before  # all of the rest are asked for
                    assert after == MASK or after not in special


def test_random_words_are_ordinary_tokens():
    tokenizer = word_tokenizer()
    words = ordinary(tokenizer)
    assert len(words) == len(tokenizer) - 5 and not set(words.tolist()) & set(tokenizer.all_special_ids)


def test_masks_are_drawn_from_seed_epoch_and_row_and_held_out_ones_from_the_row_alone():
    tokenizer = word_tokenizer()
    rows = rows_of([" ".join(["the film was good"] * 8)] * 3)
    draw, again, other = (MaskedLm().draw(tokenizer, seed) for seed in (0, 0, 1))

    def at(draw, row, epoch):
        found = draw(row, epoch)
        return tuple(found["ids"]), tuple(found["targets"])

    assert at(draw, rows[0], 1) == at(again, rows[0], 1)
    different = [at(draw, rows[0], 1), at(draw, rows[0], 2), at(draw, rows[1], 1), at(other, rows[0], 1)]
    different.append(at(draw, rows[0], None))
    assert len(set(different)) == 5
    assert (
        at(draw, rows[0], None) == at(other, rows[0], None) == at(draw, {**rows[0], "key": "elsewhere/f.jsonl:1"}, None)
    )


def masks_of(loop, step, ranks=1):
    """Each row's ids and labels in a step, over all forwards of all ranks."""
    out = {}
    for rank in range(ranks):
        loop.accelerator = SimpleNamespace(num_processes=ranks, process_index=rank, gather=None)
        for batch in loop.window(step).micro:
            parts = zip(batch.keys, batch.ids.split(batch.lengths), batch.labels.split(batch.lengths), strict=True)
            out |= {key: (ids.tolist(), labels.tolist()) for key, ids, labels in parts}
    return out


def test_masks_do_not_depend_on_forwards_or_ranks_and_differ_by_epoch():
    one, many = loop_of(Lora(rank=2)), loop_of(Lora(rank=2), tokens_per_forward=16)
    for step in (0, 2, 4):
        first = masks_of(one, step)
        assert len(first) == 8 and first == masks_of(many, step) == masks_of(one, step, 2) == masks_of(many, step, 3)
    epochs = [
        masks_of(one, 0) | masks_of(one, 1) | masks_of(one, 2),
        masks_of(one, 3) | masks_of(one, 4) | masks_of(one, 5),
    ]
    assert len(epochs[0]) == len(epochs[1]) == 24
    changed = sum(epochs[0][k] != epochs[1][k] for k in epochs[0])
    assert changed > 20, "tokens hidden in the second epoch are others"


def test_a_targets_place_is_its_own_and_a_labels_the_one_before():
    row = {"ids": [2, MASK, 8, 3], "labels": [IGNORE, 5, 8, IGNORE], "targets": [IGNORE, 5, IGNORE, IGNORE]}
    assert collate([row, row]).labels.tolist() == [IGNORE, 5, IGNORE, IGNORE] * 2
    assert predicted(row) == [False, True, False, False]
    plain = {"ids": [6, 7, 8], "labels": [6, 7, 8]}
    assert collate([plain]).labels.tolist() == [7, 8, IGNORE] and predicted(plain) == [False, True, True]


def test_longer_texts_lose_their_end_and_keep_their_marks():
    item = {"ids": [2, 11, 12, 13, 14, 3], "labels": [IGNORE, 11, 12, 13, 14, IGNORE], "key": "1",
            "span": {"m": [(1, 2, 0), (2, 4, 1), (4, 5, 2)]}}  # fmt: skip
    for how in ("trim_end", "trim_prompt"):
        cut = TextRows(0.15).shortened(item, 4, how)
        assert cut["ids"] == [2, 11, 12, 3] and cut["labels"] == [IGNORE, 11, 12, IGNORE]
        assert cut["span"] == {"m": [(1, 2, 0), (2, 3, 1)]}


# --- how they are scored ---


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_the_loss_is_the_models_own_over_hidden_tokens_alone(kind):
    view, draw = words_view(kind), MaskedLm().draw(word_tokenizer(), 3)
    with torch.no_grad():  # at its start a head's bias is 0, which would hide its being left out
        for n, p in view.module.named_parameters():
            if n.endswith("bias"):
                p.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    rows = [draw(r, 1) for r in rows_of()[:5]]
    batch = collate(rows)
    ours = Forward(batch, view).nll()
    theirs = [
        view.module(input_ids=torch.tensor([r["ids"]]), labels=torch.tensor([r["targets"]])).loss * asked
        for r in rows
        for asked in [sum(y != IGNORE for y in r["targets"])]
    ]
    assert len(ours) == sum(y != IGNORE for r in rows for y in r["targets"]) < sum(len(r["ids"]) for r in rows) / 4
    torch.testing.assert_close(ours.sum(), sum(theirs), atol=1e-4, rtol=1e-5)
    refuse_unknown_head(view)


def test_a_head_that_is_not_known_is_refused():
    view = words_view()
    own = view.module.forward

    def call(*args, **kwargs):  # something outside of the model's own code
        out = own(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    view.module.forward = call
    with pytest.raises(RecipeError, match="BertForMaskedLM has a head that luthier does not know"):
        refuse_unknown_head(view)


def test_loss_and_masked_accuracy_of_an_exam_against_the_models_own_logits():
    view, tokenizer, task = words_view(), word_tokenizer(), MaskedLm()
    view.tokenizer = tokenizer
    lab, rows = lab_with(Renderer(tokenizer), {}, task=task, seed=5), rows_of()
    sources = [Row(r["key"], {"text": t}) for r, t in zip(rows, TEXTS, strict=True)]
    exam = Exam(view, lab, task, rows, sources)
    (loss,), (accuracy,) = Loss().evaluate(exam), MaskedAccuracy().evaluate(exam)
    nats, hits, asked = 0.0, 0, 0
    for row in rows:
        drawn = task.draw(tokenizer, 0)(row, None)
        logits = view.module(input_ids=torch.tensor([drawn["ids"]])).logits[0]
        for at, target in enumerate(drawn["targets"]):
            if target != IGNORE:
                nats -= logits[at].log_softmax(-1)[target].item()
                hits += int(logits[at].argmax()) == target
                asked += 1
    assert asked == sum(num_hidden(len(r["ids"]) - 2, 0.15) for r in rows)
    assert loss.value == pytest.approx(nats / asked, rel=1e-5) and loss.unit == "nats a masked token"
    assert accuracy.value == pytest.approx(hits / asked)


def test_accuracy_counts_tokens_not_rows():
    class Known(Exam):
        scored = [  # noqa: RUF012
            SimpleNamespace(best=(5, 6, 7), wanted=(5, 6, 8), over=3.0),
            SimpleNamespace(best=(9,), wanted=(1,), over=1.0),
        ]
        row_keys = ("1", "2")

    (found,) = MaskedAccuracy().evaluate(Known(None, None, MaskedLm(), [{}, {}]))
    assert found.value == 0.5  # 2 of 4; by rows it would be a third


# --- every sort of tuner learns them ---

TUNERS = [
    Lora(rank=4), Full(), Spiel(density=0.05, reselect_every=4, window=2), Hft(fraction=0.4), Adapter(rank=4, init_std=0.05),
    Lift(density=0.1, reselect_every=10), Layerwise(decay=0.9),
]  # fmt: skip
BOTH = [*(("bert", t) for t in TUNERS), ("roberta", TUNERS[0])]


def mean_loss(view, rows=None):
    lab = lab_with(Renderer(word_tokenizer()), {}, task=MaskedLm())
    scored = list(lab.scorer.losses(view, rows or rows_of()))
    return sum(s.total for s in scored) / sum(s.over for s in scored)


@pytest.mark.parametrize(("kind", "tuner"), BOTH, ids=lambda x: x if isinstance(x, str) else x.key())
def test_a_tuner_learns_to_fill_gaps_and_gives_the_base_back(tuner, kind, tmp_path):
    view = words_view(kind)
    before = {n: p.detach().clone() for n, p in view.module.named_parameters()}
    first = mean_loss(view)
    loop = loop_of(tuner, view=view, max_steps=45, learning_rate=0.02)
    loop.run()
    with loop.trainable.phase("score"):
        tuned = mean_loss(view)
    assert tuned < first - 0.1, (first, tuned)
    update = loop.trainable.update()
    save_update(update, tmp_path, view)
    loop.trainable.detach()
    assert all(torch.equal(before[n], p) for n, p in view.module.named_parameters())
    fresh = words_view(kind)
    with load(tmp_path).bind(fresh):
        assert mean_loss(fresh) == pytest.approx(tuned, abs=1e-4)


def test_a_closure_fills_gaps_too():
    loop = loop_of(FedKSeed(num_seeds=8), max_steps=3)
    assert all(math.isfinite(loop.step()["loss"]) for _ in range(3))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_one_forward_and_eight_give_the_same_losses(kind):
    losses = []
    for limit in (10_000, 1):
        loop = loop_of(Full(), kind, tokens_per_forward=limit, adam_eps=1e-5, max_steps=8)
        losses.append([loop.step()["loss"] for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_resumed_in_a_later_epoch_it_ends_where_an_uninterrupted_run_does(tmp_path):
    whole = loop_of(Lora(rank=4))
    whole.run()
    asked = iter(range(100))
    with pytest.raises(Interrupted):  # within the second epoch of three steps
        loop_of(Lora(rank=4), folder=tmp_path, stop=lambda: next(asked) >= 4).run()
    again = loop_of(Lora(rank=4), folder=tmp_path)
    again.run()
    assert [e["loss"] for e in again.progress.log] == [e["loss"] for e in whole.progress.log]
    mine, theirs = again.trainable.state_dict(), whole.trainable.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


# --- what is refused ---


def test_decoders_and_tokenizers_without_a_mask_are_refused_by_name():
    (problem,) = MaskedLm().check(Facts(task="masked-lm", model_config=tiny("llama").config))
    assert problem.key == "model" and problem.what == "llama models read from left to right, so they cannot fill gaps"
    assert not MaskedLm().check(Facts(task="masked-lm", model_config=tiny("bert").config))
    with pytest.raises(RecipeError, match="masked-lm needs a mask token, and this model's tokenizer has none"):
        MaskedLm().maker(Renderer(byte_tokenizer()), BertConfig(), {})


def test_a_token_that_may_be_drawn_and_has_no_embedding_is_refused():
    tokenizer = word_tokenizer()
    size = max(tokenizer.get_vocab().values()) + 1
    assert MaskedLm().maker(Renderer(tokenizer), tiny("bert", vocab_size=size).config, {})
    with pytest.raises(RecipeError, match=rf"has id {size - 1}, and the model embeds {size - 1} tokens"):
        MaskedLm().maker(Renderer(tokenizer), tiny("bert", vocab_size=size - 1).config, {})
    tokenizer.add_tokens(["word"])  # no row needs to hold it
    with pytest.raises(RecipeError, match=rf"token 'word' has id {size}, and the model embeds {size} tokens"):
        MaskedLm().maker(Renderer(tokenizer), tiny("bert", vocab_size=size).config, {})


def test_a_cache_of_features_is_refused_where_rows_change():
    tree = {"model": "a/b", "data": {"train": "x.jsonl"}, "task": "masked-lm",
            "tuner": {"layerwise": {"freeze_blocks": 1, "cache_features": True}}}  # fmt: skip
    with pytest.raises(RecipeError, match="cache_features: masked-lm hides other tokens in every epoch"):
        recipes.load(json.dumps(tree))


def test_rows_without_text_are_named():
    tokenizer = word_tokenizer()
    with pytest.raises(RecipeError, match=r"f.jsonl:2: has no supervised token \(its text is empty\)"):
        rows_of(["the film", ""], tokenizer)


# --- a whole run ---


@pytest.fixture(scope="module")
def finished(encoder_folder, tmp_path_factory):
    from luthier.run.execute import run

    folder = tmp_path_factory.mktemp("run")
    for name, part in (("train", TEXTS), ("eval", TEXTS[::3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    tree = {
        "model": encoder_folder, "task": "masked-lm", "data": {"train": "train.jsonl", "eval": "eval.jsonl"}, "epochs": 24,
        "tuner": {"lora": {"rank": 8}}, "learning_rate": 0.02, "eval_steps": 9, "evaluate": ["calibration"],
    }  # fmt: skip
    (folder / "r.yaml").write_text(json.dumps(tree))
    said: list[str] = []
    done = run(recipes.load_file(folder / "r.yaml"), folder / "out", folder, say=said.append)
    return folder, done, said


def test_a_run_learns_and_reports(finished):
    folder, done, said = finished
    before, after = done["before"], done["after"]
    assert after["loss"]["value"] < 0.85 * before["loss"]["value"]
    assert after["masked_accuracy"]["value"] > before["masked_accuracy"]["value"] + 0.1
    assert after["loss"]["unit"] == "nats a masked token" and 0 <= after["calibration_error"]["value"] <= 1
    assert done["census"]["supervised"] == sum(num_hidden(len(t.split()), 0.15) for t in TEXTS)
    assert any(line.startswith("expect  ") and "no forecast" not in line for line in said), said
    page = (folder / "out/report.html").read_text()
    assert ">nats a masked token<" in page and "masked accuracy" in page
    samples = [json.loads(x) for x in (folder / "out/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8 and any("[MASK]" in s["prompt"] for s in samples)
    assert all(s["wanted"] and len(s["wanted"].split(", ")) == len(s["after"].split(", ")) for s in samples)
    tokens = json.loads((folder / "out/tokens.json").read_text())
    asked = [t for row in tokens for t in row if t["on"]]
    assert asked and all({"before", "after", "kept"} <= t.keys() and t["text"] != "[MASK]" for t in asked)
    assert [t["weight"] for t in asked if "weight" in t] == pytest.approx([1.0] * len(asked), abs=0.01)


def test_a_run_is_checked_asked_scored_and_exported(finished, command, monkeypatch, tmp_path):
    folder, done, _ = finished
    checked = json.loads(command("check", folder / "r.yaml", "--json", cwd=folder).out)
    assert checked["forecast"] and checked["train"]["rows"] == len(TEXTS)
    assert [on for _, on in checked["rows"][0]].count(True) == num_hidden(len(TEXTS[0].split()), 0.15) and not checked[
        "rows"
    ][0][0][1]
    out = folder / "out"
    (said,) = json.loads(command("generate", out, "the [MASK] was good .", "--base", "--json", cwd=folder).out)
    assert said["answer"].startswith("the ") and "[MASK]" not in said["answer"] and "[MASK]" not in said["base"]
    assert said["words"][0] in ("film", "book", "day") and 0 < said["shares"][0] <= 1
    refused = command("generate", out, "the film", cwd=folder)
    assert refused.code and "has no gap to fill; write [MASK]" in refused.err
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))  # measured anew
    (out / "evaluations.json").unlink()
    scored = json.loads(command("evaluate", out, "--json", cwd=folder).out)
    assert scored["loss"]["value"] == pytest.approx(done["after"]["loss"]["value"], abs=1e-4)
    refused = command("export", out, tmp_path / "g", "--to", "gguf", cwd=folder)
    assert refused.code and "--to gguf: cannot hold a model tuned for masked-lm; use hf or peft" in refused.err
    ids = torch.tensor([[2, 5, MASK, 8, 3]])
    found = {}
    for form in ("hf", "peft"):
        told = json.loads(command("export", out, tmp_path / form, "--to", form, "--json", cwd=folder).out)
        assert told["difference"] < 1e-4
    found["hf"] = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")(input_ids=ids).logits
    from peft import PeftModel

    base = AutoModelForMaskedLM.from_pretrained(recipes.load_file(folder / "r.yaml").model)
    found["peft"] = PeftModel.from_pretrained(base, str(tmp_path / "peft"))(input_ids=ids).logits
    torch.testing.assert_close(found["hf"], found["peft"], atol=1e-4, rtol=1e-4)


def test_the_evaluator_asks_a_plain_encoder():
    found = MaskedAccuracy().score(
        tiny("bert", vocab_size=len(word_tokenizer())), word_tokenizer(), [{"text": TEXTS[0]}]
    )
    assert set(found) == {"masked_accuracy"}


def test_a_decoder_is_refused_before_its_weights_are_loaded(decoder_folder, write, command):
    path = write(decoder_folder, {"train": [{"text": t} for t in TEXTS]}, task="masked-lm")
    refused = command("run", path, cwd=path.parent)
    assert refused.code and "task.masked-lm.model: llama models read from left to right" in refused.err
    with pytest.raises(LuthierError):
        recipes.load("model: a/b\ntask: masked-lm\ndata: {train: x.jsonl}\nevaluate: [rouge]\n")
