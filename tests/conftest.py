"""What the whole suite shares: a quiet environment, and the tiny models of luthier.testing as fixtures."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core a worker: tiny models gain nothing from a second
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LUTHIER_CACHE"] = tempfile.mkdtemp(prefix="luthier-tests-")  # the user's own cache is left alone
atexit.register(shutil.rmtree, os.environ["LUTHIER_CACHE"], ignore_errors=True)

import pytest  # noqa: E402

from luthier.data.batch import Batch  # noqa: E402
from luthier.model.view import ModelView  # noqa: E402
from luthier.support import machine  # noqa: E402
from luthier.testing.models import batch_of, byte_tokenizer, tiny, view_of  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """Keep what earlier modules loaded out of the garbage collections of this module's tests: a run makes three."""
    machine.settle()


@pytest.fixture
def view() -> ModelView:
    return view_of()


@pytest.fixture
def batch() -> Batch:
    return batch_of()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer, saved as users have them."""
    folder = tmp_path_factory.mktemp("model")
    tiny(
        "llama", vocab_size=260, layers=2, max_position_embeddings=512, eos_token_id=2, bos_token_id=0
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


# Files with the longest tests. Of the two processes of `make test` none should begin one of them at the end, alone.
SLOW = (
    "federation/test_network.py", "run/test_run.py", "run/test_two_processes.py", "cli/test_collaborate.py",
    "testing/test_contract.py", "cli/test_compare.py", "training/test_equalities.py", "demos/test_private.py",
    "evaluation/test_lm_eval.py", "test_docs.py", "tasks/test_cloze.py", "report/test_pages.py", "run/test_nested.py",
    "run/test_forecast.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the longest tests first; pyproject asks xdist to keep this order."""
    here = Path(__file__).parent
    place = {str(here / name): i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(str(item.path), len(SLOW)))
