"""The numbers of published models' configurations are never taken for hostile ones.

`published_configs.json` has the integer settings of model configurations found in public repositories and packages: the
config.json of checkpoints, and the configurations that other projects ship or quote, under the name given there (a
model's, or else its architecture's). Only names of settings and numbers are kept. Token ids, generation settings, and
numbers 0 and 1 are left out; of lists longer than four, the smallest and the largest number stand for the rest; of
configurations that differ in nothing else than the vocabulary's size, one is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.errors import CheckpointError
from fewbit.hf.model_check import check_numbers

ENTRIES = json.loads((Path(__file__).parent / "published_configs.json").read_text())


def nested(numbers: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for dotted, value in numbers.items():
        *groups, key = dotted.split(".")
        inner = config
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[key] = value
    return config


def test_every_published_configuration_is_accepted() -> None:
    refused = []
    for entry in ENTRIES:
        try:
            check_numbers(nested(entry["numbers"]))
        except CheckpointError as error:
            refused.append(f"{entry['model']}: {error}")
    assert refused == []
    assert len(ENTRIES) > 400
