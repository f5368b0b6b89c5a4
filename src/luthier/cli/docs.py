"""The generated pages and the recipe's schema: `python -m luthier.cli.docs` writes them."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from luthier.claims import claim as claims
from luthier.cli import matrix
from luthier.cli.listing import examples_of, starter
from luthier.method import registry as manifest
from luthier.method.kinds import KINDS
from luthier.model import refusals
from luthier.recipe import schema

FOLDER = Path(__file__).parents[3] / "docs" / "methods"
TUNER = """```python
from {package} import {cls}
from luthier.integrations import Tuning

tuned = {cls}({required}).attach(model{steps})  # a transformers model, nothing else
optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-3))
Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[Tuning(tuned)]).train()
```

In your own loop, call in each step: `tuned.before_window(None, None)`, backward, `tuned.after_backward()`, the optimiser's
step, `tuned.after_step(None)`. At the end, `tuned.update()` returns the update, and `tuned.detach()` restores the base bit for
bit."""
PROBING = """```python
from {package} import {cls}
from luthier.objectives import Sft
from luthier.integrations import Loss

loss, tuned = Loss(Sft(), model), {cls}({required}).attach(model{steps})
optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.SGD([p for x in g for p in x.params], lr=1e-3))
```

{turn}"""
GRADIENT = """Each step: `tuned.before_window(loss.window(batch), loss.probe)`, `loss(batch).backward()`,
`tuned.after_backward()`, the optimiser's step, `tuned.after_step(None)`."""
CLOSURE = """Each step: `optimizer.step(lambda: float(loss(batch)))` under `torch.no_grad()`, then `tuned.after_step(None)`."""
OBJECTIVE = """```python
from {package} import {cls}
from luthier.integrations import Loss

loss = Loss({cls}({required}), model, total_steps=100)  # a transformers model, nothing else
for batch in batches:  # as transformers collates them: input_ids, labels, attention_mask
    loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()
```

With transformers' Trainer, let `compute_loss(self, model, inputs, **_)` of a subclass return `loss(inputs)`."""
COMPUTE = """```python
from {package} import {cls}
from luthier.objectives import Sft
from luthier.integrations import Loss

loss = Loss(Sft(), model, compute={cls}({required}))  # a transformers model, nothing else
for batch in batches:
    with loss.thinned():
        loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()
```"""
CURATOR = """```python
from {package} import {cls}

rows = [{{"prompt": "bread in French", "completion": "pain"}}, {{"prompt": "milk in French", "completion": "lait"}}]
table = {cls}({required}).curated(rows{asked})
print([row.values for row in table.rows])  # table.line(number) says what became of an entry, and why
```"""

EVALUATOR = """```python
from {package} import {cls}

rows = [{row}]
evaluator = {cls}({required})
print(evaluator.score(model, tokenizer, rows))  # a transformers model and its tokenizer, nothing else
```"""
DECODER = """```python
from {package} import {cls}

answers = {cls}({required}).answer(model, tokenizer, ["bread in French"], max_new_tokens=8)  # texts
```"""
MERGER = """```python
import luthier
from {package} import {cls}

merged = {cls}({required}).merge([luthier.load(run) for run in runs])  # an Update; `merged.bind(view)` puts it on a model
```"""
INSPECTOR = """```python
import luthier
from {package} import {cls}
from luthier.inspection.base import Case
from luthier.model.view import ModelView

finding = {cls}({required}).inspect(Case(ModelView(model), {{"mine": luthier.load(run)}}))
print(finding.says)  # and finding.columns, finding.rows, finding.picture
```"""
PROTOCOL = """```python
from luthier.collaboration import {imports}
from luthier.collaboration.parties import in_process
from luthier.model.view import ModelView
from luthier.step.settings import TrainSettings
{more}
views = [ModelView(m) for m in ({models})]  # transformers models, nothing else
protocol, settings = {cls}({fields}), TrainSettings(max_steps=2{settings})
contract = protocol.agree(views, {tuner}, settings)
clients = [protocol.client(name, contract, views[0], rows) for name in ("north", "south")]
{server}
in_process([server, *clients], server.begin(), gate=lambda sent, disclosure: print(disclosure))  # before sending
print({result})
```

`rows` are mappings of `ids` and `labels`, as `luthier.data.rendering.Renderer` makes them."""
TRANSLATE = """```python
from luthier.collaboration.translators import Pairs, {cls}

# [N, layers, numbers a layer] of both models, tuned on the same N sets of rows; kinds from `luthier.update.packing.kinds`
pairs = Pairs(small, large, torch.arange(len(small)), small_kinds, large_kinds)
translated = {cls}({fields}).fit(pairs)(clients)  # [clients, layers, numbers a layer]
```"""
# Fields that make the example code run: caft's first stage, a task in a folder beside the script.
FIELDS = {"caft": 'stage="heads"', "lm-eval": 'tasks=["capitals"], folder="tasks"'}
LAB = "from luthier.step.lab import Lab\n"
SERVER = 'server = protocol.server(contract, ["north", "south"], None, Lab())  # no journal, and it asks no model'
CONSTANT = ', lr_scheduler_type="constant", warmup_fraction=0.0'
LORA = {
    "imports": "OneShot",
    "more": f"{LAB}from luthier.tuners import Lora\n",
    "models": "model,",
    "fields": "",
    "settings": "",
}
PROTOCOLS = {
    "one-shot": {**LORA, "tuner": "Lora(rank=2)", "server": SERVER, "result": 'server.outcome("north")'},
    "seed-rounds": {
        **LORA, "imports": "SeedRounds", "more": f"{LAB}from luthier.tuners import FedKSeed\n", "fields": "rounds=2",
        "settings": CONSTANT,
        "tuner": "FedKSeed(num_seeds=64)", "server": SERVER, "result": 'server.outcome("north")',
    },
    "grad-transformer": {
        **LORA, "imports": "GradTransformer", "models": "model, large_model", "fields": "sets=3",
        "more": "from luthier.collaboration.grad_transformer import Provider, shadow_pairs\nfrom luthier.tuners import Lora\n",
        "tuner": 'Lora(rank=2, targets=("q_proj", "v_proj"))', "result": 'server.outcome("north")',
        "server": 'pairs = shadow_pairs(contract, views, [rows] * 3)\n'
        'server = Provider.fitted(protocol, contract, views, pairs, ["north", "south"])',
    },
}  # fmt: skip
ROWS = {
    "retrieval": '{"prompt": "Who mends violins in Porto?", "completion": "Ines does.", "gold": ["p1"]}',
    "classification": '{"text": "a fine film", "label": "good"}, {"text": "a poor one", "label": "bad"}',
    "tagging": '{"tokens": ["Ada", "slept"], "tags": ["B-PER", "O"]}',
    "masked-accuracy": '{"text": "The cat sat on the mat."}',
    "editing": """
    {
        "prompt": "Where is Bo?",
        "completion": "Oslo",
        "rephrase": "The place of Bo is",
        "locality_prompt": "Where is Al?",
        "locality_answer": "Rome",
    }
""",
    "knowledge": '{"prompt": "How old is Bo?", "completion": "31", "kind": "memorize"}',
    "function-calls": '{"prompt": "Stop it", "completion": \'{"name": "stop", "arguments": {}}\'}',
    "pass-at-k": '{"prompt": "Add a to b: def add(a, b)", "completion": ": return a + b", "tests": ["assert add(1, 2) == 3"]}',
}


def use(entry: dict[str, Any]) -> str | None:
    """The example code that uses a method in your own loop."""
    needs = set(entry["traits"]["needs"])
    steps = ", total_steps=100" if needs & {"total_steps", "closure", "grad"} else ""
    required = ", ".join(f"{n}={json.dumps(x)}" for n, x in examples_of(entry).items())
    required = FIELDS.get(entry["name"], required)
    words = {"package": entry["module"].rpartition(".")[0], "cls": entry["class"], "required": required, "steps": steps}
    if entry["name"] == "frozen" or entry["kind"] in ("pipeline", "task"):
        return None
    if entry["kind"] == "tuner":
        turn = CLOSURE if "closure" in needs else GRADIENT
        return PROBING.format(**words, turn=turn) if needs & {"closure", "grad"} else TUNER.format(**words)
    if entry["kind"] == "curate":
        return CURATOR.format(**words, asked=", model=model, tokenizer=tokenizer" if "base_view" in needs else "")
    words["row"] = ROWS.get(entry["name"], '{"prompt": "bread in French", "completion": "pain"}')
    if entry["kind"] == "translate":
        return TRANSLATE.format(cls=entry["class"], fields="epochs=2" if entry["name"] == "transformer" else "")
    if entry["kind"] == "collaborate":
        return PROTOCOL.format(cls=entry["class"], **PROTOCOLS[entry["name"]])
    texts = {
        "objective": OBJECTIVE, "compute": COMPUTE, "evaluate": EVALUATOR, "decode": DECODER,
        "merge": MERGER, "inspect": INSPECTOR,
    }  # fmt: skip
    return texts[entry["kind"]].format(**words)


def page(entry: dict[str, Any]) -> str:
    """A method's page as Markdown."""
    command, takes = KINDS[entry["kind"]].command, KINDS[entry["kind"]].takes
    use_as = f"{entry['kind']}: {entry['name']}" if command is None else f"{command} {takes} --method {entry['name']}"
    lines = [f"# {entry['name']}", "", f"`{use_as}`", "", entry["doc"], ""]
    if entry["source"]:
        s = entry["source"]
        equation = f", {s['equation']}" if s["equation"] else ""
        lines += [f"Source: {s['title']} ({s['year']}), {s['reference']}{equation}.", ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{n}` | {'required' if f['required'] else _shown(f['default'])} | {f['about']} |"
        for n, f in entry["fields"].items()
    ]
    traits = entry["traits"]
    lines += ["", f"Tasks: {', '.join(traits['tasks'])}. Layouts: {', '.join(traits['layouts'])}."]
    if traits["claims"]:
        lines.append(f"No other method in the recipe may use: {', '.join(traits['claims'])}.")
    if command is not None:
        lines += ["", "## On the command line", "", f"    {starter(entry)}"]
    else:
        lines += ["", "## In a recipe", "", "```yaml", starter(entry), "```"]
    lines_of_use = use(entry)
    if lines_of_use is not None:
        lines += ["", "## In your own loop", "", lines_of_use]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return "" if value is None else f"`{value}`"


# The public names on the API page: module -> names.
API = {
    "luthier": ("load",),
    "luthier.recipe": ("load", "load_file", "Recipe"),
    "luthier.run": ("run",),
    "luthier.tuned": ("open_run", "answers", "scores"),
    "luthier.tuned.export": ("export",),
    "luthier.tuned.merge": ("merge",),
    "luthier.tuned.inspect": ("inspect",),
    "luthier.integrations": ("Loss", "Tuning"),
    "luthier.merging.base": ("Merger",),
    "luthier.inspection.base": ("Inspector", "Case", "Finding"),
    "luthier.update": ("Update", "add", "Part", "Structure"),
    "luthier.model.loading": ("locate", "load_model"),
    "luthier.model.view": ("ModelView",),
    "luthier.data.batch": ("Batch", "collate"),
    "luthier.data.reading": ("read",),
    "luthier.data.prepare": ("prepare",),
    "luthier.data.rendering": ("Renderer",),
    "luthier.method": ("Method", "Traits", "Facts", "Problem", "Source"),
    "luthier.tuners.base": ("Tuner", "Trainable"),
    "luthier.objectives.base": ("Objective", "Window", "Forward", "Term", "Clock"),
    "luthier.compute.base": ("Compute",),
    "luthier.tasks.base": ("Task", "Shown"),
    "luthier.data.table": ("Table",),
    "luthier.data.codec": ("Codec",),
    "luthier.curation.base": ("Curator", "Chooser", "Selection"),
    "luthier.evaluation.base": ("Evaluator", "Answering", "Exam", "Question", "Results"),
    "luthier.evaluation.measures": ("Measure", "mean", "ratio"),
    "luthier.support.statistics": ("Estimate", "estimate", "verdict", "holm", "wilson"),
    "luthier.pipelines.base": ("Pipeline", "Train", "Apply", "Outcome", "run_pipeline"),
    "luthier.training.loop": ("Loop",),
    "luthier.step.probe": ("Probe",),
    "luthier.step.settings": ("TrainSettings",),
    "luthier.support.sandbox": ("execute", "Limits", "Verdict"),
}


def api() -> str:
    """The API page: signatures and docstrings of public names, and the first docstring line of methods."""
    out = [
        "# API",
        "",
        "Methods have pages of their own: [methods](methods/index.md). Recipe keys: `luthier schema`.",
        "",
    ]
    for module, names in API.items():
        out += [f"## {module}", ""]
        for name in names:
            out += _entry(name, getattr(importlib.import_module(module), name))
    return "\n".join(out).rstrip() + "\n"


def _entry(name: str, thing: Any) -> list[str]:
    doc = inspect.getdoc(thing) or ""
    head = [f"### {name}{_signature(thing)}", "", "```text", doc, "```", ""]
    if not inspect.isclass(thing):
        return head
    rows = []
    for n, member in vars(thing).items():
        inner = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        about = inspect.getdoc(inner.fget if isinstance(inner, property) else inner)
        if not n.startswith("_") and about and (inspect.isfunction(inner) or isinstance(inner, property)):
            shown = n if isinstance(inner, property) else f"{n}{_signature(inner)}"
            rows.append(f"- `{shown}`: {about.splitlines()[0]}")
    return [*head, *rows, ""] if rows else head


def _signature(thing: Any) -> str:
    names = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
    return f"({', '.join(names)})" if len(names) < 12 else "(...)"


def pages() -> dict[str, str]:
    """File name -> text of each method's page, and of the index."""
    entries = manifest.read()
    index = ["# Methods", "", "| key | name | what it does |", "|---|---|---|"]
    titles = manifest.titles([(e["kind"], e["name"]) for e in entries])
    index += [
        f"| {e['kind']} | [{e['name']}]({title}.md) | {e['summary']} |"
        for e, title in zip(entries, titles, strict=True)
    ]
    made = {f"{title}.md": page(e) for e, title in zip(entries, titles, strict=True)}
    return made | {"index.md": "\n".join(index) + "\n"}


def main() -> None:
    """Write the pages, and the recipe's schema."""
    schema.main()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER.parent / "api.md").write_text(api(), encoding="utf-8")
    (FOLDER.parent / "evidence.md").write_text(claims.evidence(FOLDER.parents[1] / "claims"), encoding="utf-8")
    (FOLDER.parent / "models.md").write_text(refusals.page(), encoding="utf-8")
    (FOLDER.parent / "combinations.md").write_text(matrix.page(), encoding="utf-8")
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
