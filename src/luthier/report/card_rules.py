"""The Hub's rules for the front matter of a model card, tested here, because huggingface_hub asks its server."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# huggingface.co/docs/hub/repositories-licenses
_LICENCES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
    cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
    epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc
    h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other"""
LICENCES = frozenset(_LICENCES.split())
RELATIONS = ("adapter", "finetune", "merge", "quantized")


def faults(card: str) -> list[str]:
    """What the Hub would refuse in a model card, each as a few words; empty if it takes the card."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    parts = re.match(r"\A---\r?\n(.*?)\r?\n---(\r?\n|\Z)", card, re.DOTALL)
    if parts is None:
        return ["it has no front matter between two lines ---"]
    try:
        data = YAML(typ="safe", pure=True).load(parts[1])
    except YAMLError as error:
        return [f"its front matter is no YAML ({str(error).splitlines()[0]})"]
    if not isinstance(data, dict):
        return ["its front matter holds no keys"]
    return [*_about_keys(data), *_about_results(data)]


def _about_keys(data: Mapping[str, Any]) -> Iterator[str]:
    licence = data.get("license")
    if licence is not None and not (isinstance(licence, str) and licence in LICENCES):
        yield f"license {licence!r} is not one of the Hub's; write other, with license_name"
    if licence == "other" and not data.get("license_name"):
        yield "license other needs license_name"
    if data.get("base_model_relation", "adapter") not in RELATIONS:
        yield f"base_model_relation {data['base_model_relation']!r} is none of {', '.join(RELATIONS)}"
    for key in ("base_model", "datasets"):
        for name in _listed(data.get(key)):
            if not _is_id(name):
                yield f"{key} {name!r} is no id of the Hub (org/name)"
    for key in ("tags", "language", "metrics"):
        for value in _listed(data.get(key)):
            if not isinstance(value, str):
                yield f"{key} {value!r} is no text"


def _about_results(data: Mapping[str, Any]) -> Iterator[str]:
    for model in _listed(data.get("model-index")):
        if not isinstance(model, Mapping) or not model.get("name"):
            yield "model-index needs the name of the model"
            continue
        for result in _listed(model.get("results")):
            dataset, task = result.get("dataset") or {}, result.get("task") or {}
            if not (task.get("type") and dataset.get("type") and dataset.get("name")):
                yield "a result in model-index needs task.type, dataset.type and dataset.name"
            for metric in _listed(result.get("metrics")):
                value = metric.get("value")
                if not metric.get("type") or (isinstance(value, float) and not math.isfinite(value)) or value is None:
                    yield f"a metric in model-index needs a type and a number, not {value!r}"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_id(name: Any) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
