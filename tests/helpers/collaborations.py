"""Sizes of made-up organisations, and a provider's recipe with rows of its own and of two clients."""

import json
from functools import cache

from ruamel.yaml import YAML

from luthier.demos.local import LARGE, SMALL, Pretraining, pretrained
from luthier.demos.private import NAMES, Size, all_rows

SIZE = Size(Pretraining(steps=3, batch=4), sets=12, rows=8, steps=2, public=120, held=6, styles=24)
TINY = SIZE._replace(canaries=3, others=7)


@cache
def rows_of_all():
    """The rows of all parties, drawn once."""
    return all_rows(SIZE)


def lines(rows):
    return "".join(json.dumps(r) + "\n" for r in rows)


def recipe(folder, **changes):
    """Rows of a provider and of two clients, and the provider's recipe."""
    rows = rows_of_all()
    small, large = (pretrained(rows.read, shape, SIZE.pretraining) for shape in (SMALL, LARGE))
    (folder / "public.jsonl").write_text(lines(rows.public))
    for name in NAMES:
        (folder / f"{name}.jsonl").write_text(lines(rows.private[name]))
        (folder / f"{name}-held.jsonl").write_text(lines(rows.held[name]))
    values = {
        "model": str(small), "data": {"train": "public.jsonl", "template": "plain"}, "max_steps": 2, "batch_size": 4,
        "tuner": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}, "learning_rate": 0.01,
        "collaborate": {"grad-transformer": {"large": str(large), "by": "style", "sets": 12, "rows": 8}}, **changes,
    }  # fmt: skip
    with (folder / "r.yaml").open("w") as file:
        YAML().dump(values, file)
    return folder / "r.yaml"
