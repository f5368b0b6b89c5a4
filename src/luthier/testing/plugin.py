"""The pytest plug-in: it runs the tests of luthier.testing.contract on the EXAMPLES of the module that imports them."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.method.kinds import KINDS

CONTRACT = "luthier.testing.contract."  # the modules of this package hold the tests
# Arguments of tests: every example, tuners that work in any loop, or the examples of a kind.
ARGUMENTS = ("example", "plain_tuner", *KINDS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test for each example."""
    wanted = [a for a in ARGUMENTS if a in metafunc.fixturenames]
    if not metafunc.function.__module__.startswith(CONTRACT) or not wanted:
        return
    from luthier.testing.contract import as_examples

    given = getattr(metafunc.module, "EXAMPLES", None)
    if given is None:
        raise pytest.UsageError(f"{metafunc.module.__name__}: write EXAMPLES = [YourMethod(...)] beside the import")
    examples = [e for e in as_examples(given) if e.fits(wanted[0])]
    metafunc.parametrize(wanted[0], examples, ids=[e.name for e in examples])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests of kinds for which a module has no example, so that they are not listed as skipped."""
    items[:] = [i for i in items if not (_of_contract(i) and any(m.name == "skip" for m in i.iter_markers()))]


def _of_contract(item: Any) -> bool:
    return getattr(getattr(item, "function", None), "__module__", "").startswith(CONTRACT)
