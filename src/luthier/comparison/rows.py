"""The rows of a comparison, written once, so that every arm and every command trains and is scored on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from luthier.comparison.plan import Comparison, Foreign
from luthier.data.held_out import likeness
from luthier.data.mixture import Mix
from luthier.data.reading import read
from luthier.data.store import Rows
from luthier.recipe import Recipe
from luthier.recipe.settings import DataSettings, RowSource
from luthier.run.rows import given_rows, training_rows, write_rows
from luthier.support.cache import key_of
from luthier.support.errors import RecipeError
from luthier.support.rng import Streams

# Settings of `data` that were used when the files were written, and must not be used again.
DROPPED: dict[str, Any] = {"columns": {}, "limit": None, "train_split": "train", "eval_split": "test", "eval_by": None}


class Files(NamedTuple):
    """The row files of one arm: training rows (one file, or one for each source), rows that choose the learning rate (None
    without a search), and held-out rows."""

    train: str | tuple[RowSource, ...]
    valid: Path | None
    eval: Path

    def put_into(self, recipe: Recipe, held_out: Path) -> Recipe:
        """The recipe with these files."""
        data = recipe.data.model_copy(update={**DROPPED, "train": self.train, "eval": str(held_out)})
        return recipe.model_copy(update={"data": data})


def written(plan: Comparison, recipes: dict[str, Recipe], base: Path, folder: Path) -> dict[str, Files]:
    """Write the files of every arm. Raises RecipeError if an arm has no held-out rows, or others than the baseline."""
    made: dict[str, tuple[list[int], Files]] = {}
    out: dict[str, Files] = {}
    judged: list[int] = []
    for arm, recipe in recipes.items():
        d = recipe.data
        if d.eval is None:
            raise RecipeError(f"arm {arm}: data.eval", "is missing, so nothing can be compared", "name held-out rows")
        if isinstance(plan.arms[arm], Foreign) and not isinstance(d.train, str):
            raise RecipeError(f"arm {arm}: data.train", "holds several sources, which a command cannot mix", "name one")
        held = given_rows(d, base, recipe.task.shapes).held
        assert held is not None
        key = key_of(d.sources, d.on_bad_row, d.carried.content, recipe.task.shapes, d.eval, d.eval_by)
        if key not in made:
            likenesses = [likeness(row) for row in held]  # the digest also depends on what else was read of the rows
            made[key] = (likenesses, _files(plan, recipe, base, folder / "data", held, key[:8]))
        judged = judged or made[key][0]
        if made[key][0] != judged:
            raise RecipeError(
                f"arm {arm}: data.eval", "holds other rows than another arm's", "judge all on the same rows"
            )
        out[arm] = made[key][1]
    return out


def _files(plan: Comparison, recipe: Recipe, base: Path, folder: Path, held: Rows, key: str) -> Files:
    d, search = recipe.data, plan.search
    rows, _, mix = training_rows(d, base, recipe.task.shapes)
    place = np.arange(len(rows))
    valid = None
    if search is not None and search.data is not None:
        chosen, _ = read(search.data, d.columns, base, "eval", shapes=recipe.task.shapes, on_bad=d.on_bad_row)
        valid = write_rows(folder / f"valid-{key}.jsonl", chosen, d.carried)
    elif search is not None:
        if len(rows) < 2 * search.rows:
            what = f"{search.rows} of {len(rows)} rows to choose a learning rate would leave fewer rows to train on"
            raise RecipeError(
                "search.rows",
                what,
                "use --search-rows (search: {rows: ...} in a file of arms), --no-search, or name other rows in search.data",
            )
        drawn = np.sort(Streams(0).at("search").permutation(len(rows))[: search.rows])
        valid = write_rows(folder / f"valid-{key}.jsonl", rows.take(drawn), d.carried)
        place = np.setdiff1d(place, drawn)
    return Files(
        _train(d, rows.take(place), mix, folder, key), valid, write_rows(folder / "eval.jsonl", held, d.carried)
    )


def _train(data: DataSettings, rows: Rows, mix: Mix | None, folder: Path, key: str) -> str | tuple[RowSource, ...]:
    """Write these rows to a file, or to one file for each source."""
    if mix is None:
        return str(write_rows(folder / f"train-{key}.jsonl", rows, data.carried))
    source_of, out = mix.sources_of(rows.key(i) for i in range(len(rows))), []
    for i, source in enumerate(mix.origins):
        mine = rows.take(np.flatnonzero(source_of == i))
        file = write_rows(folder / f"train-{key}-{i}.jsonl", mine, data.carried)
        out.append(RowSource(path=str(file), weight=source.weight))
    return tuple(out)
