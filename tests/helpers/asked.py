"""Rows that evaluators ask about, and what a model has to learn to know them; files that some of them read."""

import atexit
import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

from luthier.testing.models import tiny, word_tokenizer

FOLDER = Path(tempfile.mkdtemp(prefix="luthier-asked-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

CALLS = [
    {"prompt": "wake me", "completion": '{"name": "alarm", "hour": 7}'},
    {"prompt": "is it wet", "completion": '{"name": "rain"}'},
    {"prompt": "louder", "completion": '{"name": "volume", "by": 2}'},
]
PROGRAMS = [
    {"prompt": "one", "completion": "x = 1", "tests": ["assert x == 1"]},
    {"prompt": "two", "completion": "x = 2", "tests": ["assert x == 2"]},
]
KNOWN = [
    {"prompt": "who sings", "completion": "Anna", "kind": "memorize"},
    {"prompt": "whose songs", "completion": "Anna", "kind": "rephrase"},
    {"prompt": "who bakes", "completion": "Bert", "kind": "memorize"},
    {"prompt": "whose bread", "completion": "Bert", "kind": "rephrase"},
]

EDITS = [
    {"prompt": "sky", "completion": "green", "otherwise": "heaven", "locality_prompt": "sea", "locality_answer": "blue"},
    {"prompt": "capital", "completion": "Lyon", "otherwise": "city", "locality_prompt": "river", "locality_answer": "Po"},
]  # fmt: skip
PAIRS = (("prompt", "completion"), ("otherwise", "completion"), ("locality_prompt", "locality_answer"))
EDITED = [{"prompt": row[asked], "completion": row[answer]} for row in EDITS for asked, answer in PAIRS]

QUESTIONS = [
    json.loads(x) for x in files("luthier.evaluation").joinpath("sets/canaries.jsonl").read_text().splitlines()
]
GENERAL = [json.loads(x) for x in files("luthier.evaluation").joinpath("sets/general.jsonl").read_text().splitlines()]
CANARIES = [
    *({"prompt": q["question"], "completion": q["right"]} for q in QUESTIONS[:3]),
    *({"prompt": "", "completion": x["text"][:16]} for x in GENERAL[:1]),
]

PASSAGES = str(FOLDER / "passages.jsonl")
TEXTS = {"anna": "Anna keeps four goats.", "bert": "Bert bakes brown bread.", "cleo": "Cleo sings at noon."}
(FOLDER / "passages.jsonl").write_text("".join(json.dumps({"doc_id": d, "text": t}) + "\n" for d, t in TEXTS.items()))
FACTS = [
    {"prompt": "Goats of Anna?", "completion": "Anna keeps four goats.", "gold": ["anna"]},
    {"prompt": "What bakes Bert?", "completion": "Bert bakes brown bread.", "gold": ["bert"]},
]

ASKED = [{"q": f"{a} plus {b}", "choices": [str(a + b), str(a * b + 9)]} for a, b in ((1, 2), (3, 4), (2, 2), (5, 1))]
CHOICES = [{"prompt": x["q"], "completion": x["choices"][0]} for x in ASKED]
TASKS = str(FOLDER / "tasks")  # a folder with a task of lm-eval over these questions
Path(TASKS).mkdir()
(FOLDER / "questions.jsonl").write_text("".join(json.dumps({**x, "gold": 0}) + "\n" for x in ASKED))
(FOLDER / "tasks/choice.yaml").write_text(f"""
task: our_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {FOLDER / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")


def cloze_encoder():
    """Fills a gap, and has two classes by name."""
    return _named("bert")


def cloze_decoder():
    """Says what comes next, and has two classes by name."""
    return _named("llama")


def _named(kind):
    tokenizer = word_tokenizer()
    ends = {"max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3, "id2label": {0: "bad", 1: "good"}}
    return tiny(kind, layers=2, vocab_size=len(tokenizer), **ends), tokenizer
