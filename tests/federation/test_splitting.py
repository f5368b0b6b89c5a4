"""Rows divided among made-up clients: shares by Dirichlet, every row once, enough rows for all."""

import json

import numpy as np
import pytest

from helpers.commands import luthier
from luthier.data.reading import read
from luthier.federation.splitting import LEAST, dirichlet_split, enough_for_all, split_rows
from luthier.support.errors import LuthierError
from luthier.support.rng import Streams

KINDS = ["a", "b", "c"] * 100


def test_every_row_goes_to_one_client():
    found = dirichlet_split(KINDS, 4, 0.3, np.random.default_rng(0))
    assert len(found) == 4 and sorted(i for mine in found for i in mine) == list(range(300))
    assert all(mine == sorted(mine) for mine in found)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_shares_have_the_mean_and_the_variance_of_the_dirichlet(alpha):
    """Var = (1/n) (1 - 1/n) / (n alpha + 1), for each kind of its own."""
    clients, draws, generator = 4, 400, np.random.default_rng(1)
    kinds = ["a"] * 500 + ["b"] * 1000
    found = [dirichlet_split(kinds, clients, alpha, generator) for _ in range(draws)]
    of_a = np.array([[sum(i < 500 for i in mine) / 500 for mine in split] for split in found])  # [draws, clients]
    of_b = np.array([[sum(i >= 500 for i in mine) / 1000 for mine in split] for split in found])
    wanted = 1 / clients * (1 - 1 / clients) / (clients * alpha + 1)
    for shares in (of_a, of_b):
        assert shares.mean(0) == pytest.approx([1 / clients] * clients, abs=0.06)
        assert shares.var() == pytest.approx(wanted, rel=0.12)
    assert abs(np.corrcoef(of_a[:, 0], of_b[:, 0])[0, 1]) < 0.15, "kinds are drawn independently"


def test_a_kinds_rows_are_drawn_at_random():
    first = dirichlet_split(["a"] * 1000, 2, 1e6, np.random.default_rng(2))[0]
    assert len(first) == pytest.approx(500, abs=2) and np.mean(first) == pytest.approx(500, abs=40)


def test_all_clients_have_enough_or_it_is_said():
    found = enough_for_all(KINDS, 4, 0.2, Streams(0))
    assert min(map(len, found)) >= LEAST
    assert any(min(map(len, dirichlet_split(KINDS, 4, 0.2, Streams(s).at("split", 0)))) < LEAST for s in range(9)), (
        "the first draw is not always enough"
    )
    with pytest.raises(
        LuthierError, match="--alpha 0.2: none of 100 splits of 12 rows gives each of 3 clients 10 rows"
    ):
        enough_for_all(["a"] * 12, 3, 0.2, Streams(0))


@pytest.fixture
def rows(tmp_path):
    made = [{"prompt": f"p{i}", "completion": "c", "topic": "xyz"[i % 3], "more": {"n": i}} for i in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    return made


def test_the_command_writes_rows_that_are_read_again(rows, tmp_path):
    words = ("collaborate", "split", "rows.jsonl", "made", "--clients", 3, "--alpha", 0.5, "--by", "topic", "--json")
    told = json.loads(luthier(*words, cwd=tmp_path).stdout)
    assert told["files"] == {f"client-{i}": f"made/client-{i}.jsonl" for i in (1, 2, 3)}
    written = {n: [json.loads(x) for x in (tmp_path / f).read_text().splitlines()] for n, f in told["files"].items()}
    key = lambda row: row["more"]["n"]  # noqa: E731
    assert sorted((r for found in written.values() for r in found), key=key) == rows
    for name, found in written.items():
        counts = {kind: sum(r["topic"] == kind for r in found) for kind in "xyz"}
        assert told["clients"][name] == {k: n for k, n in counts.items() if n}
    assert len(read("made/client-1.jsonl", {}, tmp_path)[0]) == len(written["client-1"])
    said = luthier("collaborate", "split", "rows.jsonl", "sizes", "--seed", 3, cwd=tmp_path).stdout.splitlines()
    assert said[0].split() == ["rows", "rows"] and len(said) == 6
    assert said[-1].startswith("luthier collaborate simulate CONTRACT client-1=sizes/client-1.jsonl ")
    again = luthier(*words, cwd=tmp_path)
    assert again.returncode == 2 and "made: exists already" in again.stderr


def test_another_seed_gives_another_split_and_the_same_one_the_same(rows, tmp_path):
    def of(folder, seed):
        split_rows(str(tmp_path / "rows.jsonl"), tmp_path / folder, 3, 0.5, "topic", seed)
        return [(tmp_path / folder / f"client-{i}.jsonl").read_text() for i in (1, 2, 3)]

    assert of("a", 0) == of("b", 0) != of("c", 1)


@pytest.mark.parametrize(
    ("alpha", "by", "says"),
    [(0.0, None, "--alpha 0: is not above 0"), (1.0, "nosuch", r"--by nosuch: .*rows\.jsonl:1 has no such field")],
)
def test_what_cannot_be_divided_is_refused(alpha, by, says, rows, tmp_path):
    with pytest.raises(LuthierError, match=says):
        split_rows(str(tmp_path / "rows.jsonl"), tmp_path / "made", 3, alpha, by, 0)
    assert not (tmp_path / "made").exists()
