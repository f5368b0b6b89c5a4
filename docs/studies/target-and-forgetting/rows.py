"""Meaning representations and what a restaurant guide says of them: E2E, from shared/data (or $LUTHIER_DATA)."""

import gzip
import json
import os
from pathlib import Path

from luthier.support.rng import Streams

DATA = Path(os.environ.get("LUTHIER_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def write(folder: Path) -> None:
    """600 rows to train on, 100 to choose rates on, 100 to judge on: meanings of the three do not overlap."""
    folder.mkdir(parents=True)
    for name, split, count in (("train", "train", 600), ("valid", "valid", 100), ("eval", "test", 100)):
        with gzip.open(DATA / "e2e_nlg" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        drawn = Streams(0).at("rows", split).permutation(len(rows))[:count]
        lines = (json.dumps({"prompt": rows[i]["mr"], "completion": rows[i]["text"]}) for i in drawn)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
