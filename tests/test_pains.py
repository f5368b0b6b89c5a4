"""Twenty common complaints about fine-tuning libraries, by number: a test for each that concerns luthier."""

import itertools
import json
import socket

import pytest
import torch

from luthier import recipe
from luthier.data.batch import IGNORE
from luthier.data.prepare import prepare
from luthier.data.reading import ANSWERED, read
from luthier.data.rendering import Renderer
from luthier.data.store import Row
from luthier.inference.generation import generate
from luthier.objectives.sft import Sft
from luthier.step.settings import TrainSettings
from luthier.support.errors import LuthierError, RecipeError
from luthier.testing.models import byte_tokenizer, rows_of, tiny, view_of
from luthier.training.loop import Loop
from luthier.tuners.lora import Lora


def row(prompt="say it", completion="it", key="f.jsonl:1"):
    return Row(key, {"prompt": prompt, "completion": completion})


def renderer(**more):
    return Renderer(byte_tokenizer(), **more)


def test_pain_01_training_on_nothing_is_refused_with_the_row():
    bare = Row("f.jsonl:3", {"messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(RecipeError, match=r"f\.jsonl:3: has no supervised token \(it has no assistant turn\)"):
        prepare([bare], renderer(), max_length=100)
    done = prepare([bare, row()], renderer(), max_length=100, on_unsupervised="drop")
    assert done.census.dropped == done.census.unsupervised == 1 and len(done.rows) == 1
    view = view_of()
    silent = [{**r, "labels": [IGNORE] * len(r["ids"])} for r in rows_of()]
    with pytest.raises(LuthierError, match="step 1: no row has a supervised token"):
        Loop(view, silent, Lora().attach(view), Sft(), TrainSettings(max_steps=1)).step()


def test_pain_02_the_end_token_is_supervised_though_pad_is_eos():
    r = renderer()
    assert r.tokenizer.pad_token == r.tokenizer.eos_token
    item = r.render(row().values, "k")
    supervised = [y for y in item["labels"] if y != IGNORE]
    assert r.tokenizer.decode(supervised) == "it<|im_end|>"
    assert prepare([row()], r, max_length=100).census.without_stop == 0
    endless = Renderer(byte_tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}"))
    with pytest.raises(RecipeError, match="no answer ends in a stop token"):
        prepare([row()], endless, max_length=100)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "hi", "completion": "there"},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
    ],
)
@pytest.mark.parametrize("plain", [None, True])
def test_pain_03_the_text_trained_is_the_text_served(values, plain):
    r = renderer(plain="messages" not in values if plain else None, system=None)
    item = r.render(values, "k")
    last = len(item["ids"]) - next(i for i, y in enumerate(reversed(item["labels"])) if y == IGNORE)
    assert item["ids"][:last] == r.prompt_ids(values)


def test_pain_03_a_doubled_bos_is_counted():
    tokenizer = byte_tokenizer(
        "<|endoftext|><|endoftext|>{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer.bos_token = "<|endoftext|>"
    assert prepare([row()], Renderer(tokenizer), max_length=100).census.doubled_bos == 1


def test_pain_04_truncation_is_refused_with_the_lengths_that_would_fit():
    rows = [row(prompt="x" * n, key=f"f:{n}") for n in (5, 6, 200)]
    with pytest.raises(
        RecipeError, match=r"1 of 3 rows are longer than 100 tokens, the longest has \d+.*would keep 99% whole"
    ):
        prepare(rows, renderer(), max_length=100)
    assert prepare(rows, renderer(), max_length=100, on_long="drop").census.dropped == 1
    trimmed = prepare(rows, renderer(), max_length=100, on_long="trim_prompt")
    long = trimmed.rows[2]
    assert len(long["ids"]) == len(long["labels"]) == len(long["token"]["prompt"]) == 100 and trimmed.census.cut == 1
    assert byte_tokenizer().decode([y for y in long["labels"] if y != IGNORE]) == "it<|im_end|>"
    cut = prepare([row(prompt="ab", completion="y" * 200), row()], renderer(), max_length=100, on_long="trim_end")
    assert len(cut.rows[0]["ids"]) == 100 and cut.census.without_stop == 1


def test_pain_06_an_option_that_nothing_reads_is_refused():
    text = "model: a/b\ndata: {train: x}\nobjective: {sft: {alpha: 1}}\n"
    with pytest.raises(RecipeError, match=r"r\.yaml:3: objective\.sft\.alpha: there is no such key"):
        recipe.load(text, "r.yaml")
    with pytest.raises(
        RecipeError, match=r"r\.yaml:3: learning_rte: there is no such key; did you mean learning_rate\?"
    ):
        recipe.load("model: a/b\ndata: {train: x}\nlearning_rte: 1\n", "r.yaml")
    with pytest.raises(RecipeError, match="its name here is epochs"):
        recipe.load("model: a/b\ndata: {train: x}\nnum_train_epochs: 1\n", "r.yaml")


def test_pain_07_every_target_pattern_must_match():
    view = view_of()
    with pytest.raises(LuthierError, match=r"target 'q_porj' matches 0 of 22 linear layers; they end in .*q_proj"):
        Lora(targets=("v_proj", "q_porj")).attach(view)
    assert len(Lora(targets=("v_proj", "layers.1.mlp.up_proj")).attach(view).targets) == 4


def test_pain_08_data_faults_name_file_line_field_and_remedy(tmp_path):
    def fails(text, match, columns=None, shapes=ANSWERED):
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(RecipeError, match=match):
            read("d.jsonl", columns or {}, tmp_path, shapes=shapes)

    good = '{"prompt": "a", "completion": "b"}\n'
    fails(good + "{oops\n", r"d\.jsonl:2: is not JSON")
    fails(good + "[1]\n", r"d\.jsonl:2: holds a list, not an object")
    fails('{"question": "a"}\n', r"d\.jsonl:1: has the fields question, expected .*data\.columns")
    fails(good + '{"text": "a"}\n', r"d\.jsonl:2: holds text, but .*d\.jsonl:1 holds prompt and completion")
    fails('{"prompt": 1, "completion": "b"}\n', r"d\.jsonl:1: prompt is int 1 in|d\.jsonl:1: prompt is int '1'")
    fails(good, r"has no field 'q'", {"prompt": "q"})
    fails('{"messages": [{"role": "user"}]}\n', r"turn 1 has no role and content")
    fails(
        '{"text": "a", "label": null}\n',
        r"label is null; give it a value",
        shapes=("text and label",),
    )
    fails("", "holds no rows")
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(RecipeError, match="not UTF-8"):
        read("d.jsonl", {}, tmp_path)
    (tmp_path / "d.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert read("d.jsonl", {"prompt": "question", "completion": "answer"}, tmp_path)[0][0].values["completion"] == "b"


def test_pain_08_every_format_reads_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a, b", "completion": 'c "d"'}, {"prompt": "e", "completion": "f"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text('prompt,completion\n"a, b","c ""d"""\ne,f\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.jsonl", "d.json", "d.csv", "d.parquet"):
        assert [r.values for r in read(name, {}, tmp_path)[0]] == rows, name
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RecipeError, match="not a Parquet"):
        read("bad.parquet", {}, tmp_path)


def test_pain_16_nothing_looks_at_the_network(monkeypatch, model_folder, tmp_path):
    from luthier.run.execute import run

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    text = f"model: {model_folder}\ndata: {{train: d.jsonl, eval: d.jsonl}}\nmax_steps: 2\n"
    done = run(recipe.load(text), tmp_path / "out", tmp_path)
    assert done["state"] == "done"


def test_pain_17_the_seed_reaches_the_adapters_start():
    starts = [Lora(seed=s).attach(view_of()).initial for s in (0, 0, 1)]
    assert all(torch.equal(starts[0][k], starts[1][k]) for k in starts[0])
    assert not any(torch.equal(starts[0][k], starts[2][k]) for k in starts[0])
    torch.manual_seed(99)
    again = Lora(seed=0).attach(view_of()).initial
    assert all(torch.equal(starts[0][k], again[k]) for k in again)


def test_pain_12_a_run_that_learnt_nothing_is_an_error(tmp_path):
    from luthier.update.files import save_update, verify_update

    view = view_of()
    trainable = Lora().attach(view)
    save_update(trainable.update(), tmp_path, view)
    with pytest.raises(LuthierError, match="equals the base"):
        verify_update(tmp_path, trainable.detach, view, rows_of()[0])
    trainable = Lora().attach(view)
    save_update(trainable.update(), tmp_path, view)
    with torch.no_grad():
        for b in trainable.b.values():
            b.fill_(0.5)
    with pytest.raises(LuthierError, match="what was saved is not what was trained"):
        verify_update(tmp_path, trainable.detach, view, rows_of()[0])


def test_a_head_that_was_not_saved_as_trained_is_noticed(tmp_path):
    from luthier.tuners import Full
    from luthier.update.files import save_update, verify_update

    view = view_of()
    trainable = Full().attach(view)
    with torch.no_grad():
        view.weight("model.layers.0.mlp.up_proj.weight").add_(0.1)
    save_update(trainable.update(), tmp_path, view)
    with torch.no_grad():
        view.weight("lm_head.weight").add_(0.1)  # no hidden state tells
    with pytest.raises(LuthierError, match="what was saved is not what was trained"):
        verify_update(tmp_path, trainable.detach, view, rows_of()[0])


def test_pain_13_an_update_of_another_base_is_refused(tmp_path):
    from luthier.update.files import load, save_update

    view = view_of()
    save_update(Lora().attach(view).update(), tmp_path, view)
    with pytest.raises(LuthierError, match="load that base instead"), load(tmp_path).bind(view_of(seed=1)):
        pass


def test_generation_equals_one_prompt_at_a_time():
    from luthier.model.view import ModelView

    model = tiny("llama", vocab_size=260, layers=2).eval()
    r = renderer()
    view = ModelView(model, r.tokenizer)
    prompts = [r.prompt_ids({"prompt": "x" * n}) for n in (1, 9, 4, 6)]
    together = generate(view, prompts, r, 8)
    assert together == [generate(view, [p], r, 8)[0] for p in prompts]
    for p, done in zip(prompts, together, strict=True):
        out = model.generate(
            input_ids=torch.tensor([p]), max_new_tokens=8, do_sample=False, eos_token_id=list(r.stop_ids)
        )
        text = r.tokenizer.decode(
            [t for t in out[0, len(p) :].tolist() if t not in r.stop_ids], skip_special_tokens=True
        )
        assert done.text == text


@pytest.mark.parametrize("soft", [False, True])
def test_an_answer_shorter_than_its_prompt_does_not_repeat_it(soft):
    from luthier.model.view import ModelView
    from luthier.tuners import Dept

    model = tiny("llama", vocab_size=260, layers=2).eval()
    r = renderer()
    view = ModelView(model, r.tokenizer)
    trainable = Dept(budget_length=12, length=4, max_length=64).attach(view) if soft else None
    prompts = [r.prompt_ids({"prompt": "x"}), r.prompt_ids({"prompt": "xyz"})]
    first = model.generate(input_ids=torch.tensor([prompts[0]]), max_new_tokens=1, do_sample=False)[0, -1]
    r.stop_ids = (int(first),)
    assert len(prompts[0]) > 4
    done = generate(view, prompts[:1], r, 200)[0]
    assert done.stopped and done.text == ""
    assert trainable is None or trainable.update().parts


def test_pain_05_neighbours_in_a_batch_change_nothing():
    """Packed, alone and accumulated: the same loss and the same step (all models and methods: the contract suite)."""
    results = []
    for limit in (10_000, 40, 1):
        view = view_of()
        settings = TrainSettings(max_steps=3, batch_size=4, tokens_per_forward=limit, learning_rate=1e-2, adam_eps=1e-6)
        loop = Loop(view, rows_of((30, 9, 21, 14)), Lora(rank=4).attach(view), Sft(), settings)
        results.append([loop.step()["loss"] for _ in range(3)])
    assert results[0] == pytest.approx(results[1], abs=1e-5) and results[0] == pytest.approx(results[2], abs=1e-5)


def test_pain_10_memory_that_ends_keeps_the_steps_and_names_the_keys(tmp_path):
    from luthier.training import checkpoint

    class Greedy(Sft):
        def loss(self, fwd):
            if loop.progress.step == 2 and not done:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().loss(fwd)

    done, view = [], view_of()
    settings = TrainSettings(max_steps=4, batch_size=4, tokens_per_forward=64)
    trainable = Lora(rank=4).attach(view)
    loop = Loop(view, rows_of(), trainable, Greedy(), settings, folder=tmp_path)
    with pytest.raises(LuthierError, match=r"out of memory in step 3.* 64 tokens.*lower tokens_per_forward"):
        loop.run()
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint-2"
    done.append(True)
    assert loop.run().step == 4
    broken = Loop(view_of(), rows_of(), Lora().attach(view_of()), Sft(), settings)
    broken.step = lambda: (_ for _ in ()).throw(RuntimeError("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        broken.run()


def test_pain_10_evaluation_keeps_running_sums_only():
    """Peak of live tensors while scoring 160 rows is that of 40."""
    from luthier.inference.scoring import Scoring, mean_loss
    from luthier.run.forecast import live_bytes

    view, most = view_of(), {}
    for count in (40, 160):
        rows, seen, forwards = rows_of(tuple([20] * count)), [], itertools.count()

        def look(*_, seen=seen, forwards=forwards):
            if next(forwards) % 6 == 0:  # a look takes half a second
                seen.append(live_bytes())

        hook = view.block(0).register_forward_hook(look)
        loss = mean_loss(Scoring(64).losses(view, rows))
        hook.remove()
        most[count] = max(seen) - min(seen)
        assert loss > 0
    assert most[160] < most[40] + 50_000


def test_pain_11_resume_walks_back_to_a_whole_checkpoint(tmp_path):
    from luthier.training import checkpoint

    view = view_of()
    settings = TrainSettings(max_steps=6, batch_size=4, save_steps=2, save_limit=3)
    Loop(view, rows_of(), Lora(rank=4).attach(view), Sft(), settings, folder=tmp_path, data_hash="a").run()
    (tmp_path / "checkpoint-6" / "COMPLETE").unlink()  # as a power cut leaves it
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint-4"
    again = view_of()
    loop = Loop(again, rows_of(), Lora(rank=4).attach(again), Sft(), settings, folder=tmp_path, data_hash="a")
    assert loop.resume() and loop.progress.step == 4
    other = Loop(again, rows_of(), loop.trainable, Sft(), settings, folder=tmp_path, data_hash="b")
    with pytest.raises(LuthierError, match="made with other rows"):
        other.resume()


def test_pain_14_and_18_unchanged_logits_are_an_error_everywhere(tmp_path, model_folder):
    """A run that learnt nothing ends in an error (12), and so does the export of one; both use the run's own prompts."""
    from luthier.run.execute import run
    from luthier.tuned.export import export

    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = {
        "model": str(model_folder),
        "data": {"train": "x.jsonl", "eval": "x.jsonl"},
        "max_steps": 1,
        "learning_rate": 1e-2,
    }
    out = tmp_path / "out"
    run(
        recipe.load(json.dumps({**text, "evaluate": [{"exact-match": {"rows": 2, "max_new_tokens": 4}}]})),
        out,
        tmp_path,
    )
    before = json.loads((out / "before.json").read_text())
    samples = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["before"] for s in samples] == [s["answer"] for s in before["samples"]] and [
        s["prompt"] for s in samples
    ] == ["say 0", "say 1"]
    from safetensors.torch import load_file, save_file

    factors = {n: t * 0 if "lora_B" in n else t for n, t in load_file(out / "adapter_model.safetensors").items()}
    save_file(factors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LuthierError, match="equals the base model; nothing was exported"):
        export(out, "hf", tmp_path / "merged")


def test_pain_15_recipe_keys_are_ours_versioned_and_old_names_are_translated():
    base = "model: a/b\ndata: {train: x.jsonl}\n"
    with pytest.raises(RecipeError, match="luthier"):
        recipe.load("luthier: 2\n" + base)
    for old, new in (
        ("num_train_epochs: 3", "epochs"),
        ("lora_r: 8", r"tuner\.lora\.rank"),
        ("warmup_ratio: 0.1", "warmup_fraction"),
    ):
        with pytest.raises(RecipeError, match=f"its name here is {new}"):
            recipe.load(base + old)
