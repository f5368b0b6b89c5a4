"""What an adapter's folder holds in peft's form: plain factors or others, and whole modules of a head."""

import pytest
import torch

from luthier.model.adapter_folder import PEFT_PREFIX
from luthier.update.base import PeftFolder, head_module

LAYER = f"{PEFT_PREFIX}model.layers.0.mlp.up_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@pytest.mark.parametrize(
    "others, config, plain",
    [
        ([], {}, True),
        ([f"{PEFT_PREFIX}score.weight"], {}, True),
        ([f"{LAYER}.lora_magnitude_vector.weight"], {}, False),
        ([f"{LAYER}.bias"], {}, False),
        ([], {"use_dora": True}, False),
        ([], {"peft_type": "LOHA"}, False),
    ],
)
def test_factors_are_plain_where_nothing_but_their_product_and_a_head_was_trained(others, config, plain):
    tensors = {n: torch.zeros(1, 1) for n in (A, B, *others)}
    assert PeftFolder({"peft_type": "LORA", **config}, tensors).is_plain_lora is plain


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
