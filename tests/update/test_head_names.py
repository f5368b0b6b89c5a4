"""Which module of a task head an adapter's folder keeps whole, by the name of a parameter."""

import pytest

from luthier.update.base import head_module


@pytest.mark.parametrize(
    "parameter, module",
    [
        ("score.weight", "score"),
        ("classifier.dense.bias", "classifier"),
        ("bert.pooler.dense.weight", "pooler"),
        ("pooler.dense.weight", "pooler"),
        ("bert.encoder.pooler.weight", None),
        ("model.layers.0.mlp.up_proj.weight", None),
        ("weight", None),
    ],
)
def test_the_module_that_is_kept_for_a_parameter(parameter, module):
    assert head_module(parameter) == module
