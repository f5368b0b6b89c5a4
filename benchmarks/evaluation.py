"""Scoring against lm-eval's own Hugging Face model on the same task, and the memory of scoring more and more rows.

    python benchmarks/evaluation.py

Bars: not slower than lm-eval at its best of two batch sizes, the same accuracy within one question (they tokenise prompt
and answer together, we apart); peak memory at 3,600 rows within 5% of that at 600. Arms are processes of their own, one
after the other, twice over; the smaller time of each counts.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine_note import machine_note

HERE = Path(__file__).parent
DATA = Path(os.environ.get("LUTHIER_DATA", HERE.parents[1] / "shared/data"))
QUESTIONS = 60
TASK = """
task: abstracts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: ["yes", "no", "maybe"]
metric_list: [{{metric: acc}}]
"""
ARMS = ("luthier", "lm-eval 1", "lm-eval 8")
ROWS = (600, 1200, 3600)


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    """Rows of one of the sets."""
    with gzip.open(DATA / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def task_in(folder: Path) -> None:
    """Biomedical questions with their abstracts: about 350 tokens, three short answers."""
    answers, lines = ("yes", "no", "maybe"), []
    for r in rows_of("pubmedqa", "test")[:QUESTIONS]:
        context = " ".join(r["context"]) if isinstance(r["context"], list) else r["context"]
        lines.append(
            {"text": f"{context}\n{r['question']}\nAnswer yes, no or maybe.", "gold": answers.index(r["label"])}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    (folder / "abstracts.yaml").write_text(TASK.format(file=folder / "rows.jsonl"), encoding="utf-8")


def model() -> Any:
    """SmolLM2-135M-Instruct and how it is asked."""
    from luthier.data.rendering import Renderer
    from luthier.model.loading import BUILTIN, load_model, load_tokenizer, locate

    located = locate(BUILTIN)
    return load_model(located), Renderer(load_tokenizer(located))


def scored(arm: str, folder: Path) -> dict[str, float]:
    """Seconds of the examination without loading, accuracy, peak memory."""
    from lm_eval import simple_evaluate  # both arms need it: seconds that are nobody's
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from luthier.evaluation import LmEval
    from luthier.evaluation.base import Exam
    from luthier.inference.services import lab_with
    from luthier.tasks.causal_lm import CausalLm

    view, renderer = model()
    started = time.perf_counter()
    if arm == "luthier":
        (acc,) = LmEval(tasks=("abstracts",), metrics=("acc",), folder=str(folder)).evaluate(
            Exam(view, lab_with(renderer, {"base": lambda: view}), CausalLm())
        )
        value = acc.value
    else:
        theirs = HFLM(pretrained=view.module, tokenizer=renderer.tokenizer, batch_size=int(arm.split()[1]))
        found = simple_evaluate(theirs, tasks=["abstracts"], task_manager=TaskManager(include_path=str(folder)),
                                apply_chat_template=True, bootstrap_iters=0)  # fmt: skip
        value = found["results"]["abstracts"]["acc,none"]
    return {"seconds": time.perf_counter() - started, "accuracy": value, "peak_mb": peak_mb()}


def many(count: int) -> dict[str, float]:
    """Loss of so many rows, from a file, as a run scores them."""
    from luthier.data.prepare import prepare
    from luthier.data.reading import read
    from luthier.evaluation import Loss
    from luthier.evaluation.base import Exam
    from luthier.inference.services import lab_with
    from luthier.tasks.causal_lm import CausalLm

    view, renderer = model()
    with tempfile.TemporaryDirectory() as folder:
        rows = (rows_of("snips", "train"))[:count]
        lines = [{"prompt": r["text"], "completion": r["call"]} for r in rows]
        (Path(folder) / "r.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
        sources, _ = read("r.jsonl", {}, Path(folder), "eval")
        held = prepare(sources, renderer, max_length=512)
        exam = Exam(view, lab_with(renderer, {"base": lambda: view}), CausalLm(), held.rows, sources)
        started = time.perf_counter()
        values = {m.name: m.value for m in Loss().evaluate(exam)}
    return {"rows": len(rows), "seconds": time.perf_counter() - started, "loss": values["loss"], "peak_mb": peak_mb()}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(*words: str) -> dict[str, float]:
    """One arm in a process of its own."""
    command = [sys.executable, __file__, *words]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Entry point."""
    out: dict[str, Any] = {**machine_note(), "questions": QUESTIONS, "arms": {}, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        task_in(Path(name))
        for _ in range(2):
            for arm in ARMS:
                found = child("arm", arm, name)
                known = out["arms"].setdefault(arm, found)
                known["seconds"] = min(known["seconds"], found["seconds"])
                print(arm, {k: round(v, 3) for k, v in found.items()}, flush=True)
    best = min(out["arms"][a]["seconds"] for a in ARMS if a != "luthier")
    out["times faster than the best of lm-eval"] = round(best / out["arms"]["luthier"]["seconds"], 2)
    for count in ROWS:
        out["rows"].append(child("rows", str(count)))
        print({k: round(v, 3) for k, v in out["rows"][-1].items()}, flush=True)
    out["memory at the most rows over that at the fewest"] = round(
        out["rows"][-1]["peak_mb"] / out["rows"][0]["peak_mb"], 3
    )
    print({k: v for k, v in out.items() if "over" in k or "faster" in k})
    (HERE / "results" / "evaluation.json").write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:  # a child: as the command line sets the machine up
        from luthier.support import machine

        machine.prepare()
    if sys.argv[1:2] == ["arm"]:
        print(json.dumps(scored(sys.argv[2], Path(sys.argv[3]))))
    elif sys.argv[1:2] == ["rows"]:
        print(json.dumps(many(int(sys.argv[2]))))
    else:
        main()
