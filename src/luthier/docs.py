"""The documentation pages that are generated: one a method, from its class. `python -m luthier.docs` writes docs/methods/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier import manifest
from luthier.cli.listing import starter

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
USE = """```python
from {package} import {cls}

tuned = {cls}({required}).attach(model{steps})  # a transformers model, nothing else
optimizer = tuned.optimizer(tuned.groups(), lambda g: torch.optim.AdamW([p for x in g for p in x.params], lr=1e-3))
```

Then, each step: `tuned.before_window(None, None)`, backward, `tuned.after_backward()`, the optimiser's step,
`tuned.after_step(None)`; at the end `tuned.update()`, and `tuned.detach()` gives the base back bit for bit."""


def page(entry: dict[str, Any]) -> str:
    """A method's page as Markdown."""
    lines = [f"# {entry['name']}", "", f"`{entry['kind']}: {entry['name']}`", "", entry["doc"], ""]
    if entry["source"]:
        s = entry["source"]
        equation = f", {s['equation']}" if s["equation"] else ""
        lines += [f"Source: {s['title']} ({s['year']}), {s['reference']}{equation}.", ""]
    lines += ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{n}` | {_shown(f['default'])} | {f['about']} |" for n, f in entry["fields"].items()]
    traits = entry["traits"]
    lines += ["", f"Tasks: {', '.join(traits['tasks'])}. Layouts: {', '.join(traits['layouts'])}."]
    if traits["claims"]:
        lines.append(f"Owns alone: {', '.join(traits['claims'])}.")
    if entry["kind"] in ("tuner", "objective", "compute"):
        lines += ["", "## In a recipe", "", "```yaml", starter(entry), "```"]
    if entry["kind"] == "tuner" and not {"closure", "grad"} & set(traits["needs"]) and entry["name"] != "frozen":
        steps = ", total_steps=100" if "total_steps" in traits["needs"] else ""
        package = entry["module"].rpartition(".")[0]
        lines += [
            "",
            "## Without the house",
            "",
            USE.format(package=package, cls=entry["class"], required="", steps=steps),
        ]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return "required" if value is None else f"`{value}`"


def pages() -> dict[str, str]:
    """File name to text, with an index of all."""
    entries = manifest.read()
    index = ["# Methods", "", "| key | name | what it does |", "|---|---|---|"]
    index += [f"| {e['kind']} | [{e['name']}]({e['name']}.md) | {e['summary']} |" for e in entries]
    return {f"{e['name']}.md": page(e) for e in entries} | {"index.md": "\n".join(index) + "\n"}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
