"""Twenty labelled sentences and a thousand without: what do two rounds of self-training add?"""

import json
import tempfile
from pathlib import Path

from toys import rows_of, shuffled

from luthier import recipe as recipes
from luthier.model.loading import BUILTIN
from luthier.run.execute import run

LABELLED, POOL, JUDGED, EPOCHS, BATCH, ROUNDS, UNLABELLED = 20, 1000, 400, 20, 4, 2, 150
LABELLED_STEPS = EPOCHS * LABELLED // BATCH  # of the teacher, and of each round's finish


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def measure(arm, seed, say):
    rows, held = rows_of("sst2", "train"), rows_of("sst2", "test")
    order = shuffled(seed, len(rows)).tolist()
    of = {y: [i for i in order if rows[i]["label"] == y][: LABELLED // 2] for y in ("positive", "negative")}
    labelled = [rows[i] for pair in zip(*of.values(), strict=True) for i in pair]
    pool = [{"text": rows[i]["text"]} for i in order if rows[i] not in labelled][:POOL]
    how = {"rate": 3e-4, "rank": 32}
    keys = {
        "rounds": ROUNDS, "unlabelled_steps": UNLABELLED, "labelled_epochs": EPOCHS, "labelled_batch": BATCH,
        "learning_rate": how["rate"], "rank": how["rank"], "reweight": arm == "list", "seed": seed,
    }  # fmt: skip
    steps = LABELLED_STEPS + ROUNDS * (UNLABELLED + LABELLED_STEPS)
    alone = {
        "tuner": {"adapter": {"rank": how["rank"]}},
        "learning_rate": how["rate"],
        "max_steps": steps,
        "batch_size": BATCH,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "train.jsonl", labelled)
        write(folder / "eval.jsonl", held[:JUDGED])
        write(folder / "pool.jsonl", pool)
        recipe = {
            "luthier": 1, "model": BUILTIN, "task": "classification", "seed": seed, "evaluate": ["classification"],
            "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
            **(alone if arm == "labels only" else {"pipeline": {"list": keys}}),
        }  # fmt: skip
        if arm != "labels only":
            recipe["data"]["pool"] = "pool.jsonl"
        done = run(recipes.load(json.dumps(recipe), "claim"), folder / "out", folder, keep=False, forecast=False)
    return {n: done["after"][n]["value"] for n in ("accuracy", "loss")}
