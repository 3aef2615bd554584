"""The model card: README.md of the output folder, with the facts in brief and how to load it.

It holds no times and no paths, so that the same inputs give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..config import QuantConfig
from ..plan import Plan

CARD_NAME = "README.md"


def model_card(
    config: QuantConfig, plan: Plan, records: Mapping[str, Mapping[str, Any]], calibration_tokens: int
) -> bytes:
    """The card as UTF-8."""
    stored = 8 * sum(records[layer.name]["stored_bytes"] for layer in plan.layers)
    errors = [records[layer.name]["output_error"] for layer in plan.layers]
    known = [error for error in errors if error is not None]
    fallbacks = sum(bool(records[layer.name]["fallbacks"]) for layer in plan.layers)
    group = "one group per row" if config.group_size == -1 else f"groups of {config.group_size}"
    rows = {
        "bits": f"{config.bits}, {group}, {'symmetric' if config.sym else 'asymmetric'}",
        "method": f"{config.method}, act-order {config.act_order}, damp {config.damp}",
        "quantized layers": f"{len(plan.layers)} ({plan.weights:,} weights, {stored / plan.weights:.3f} bits each)",
        "left as they are": f"{len(plan.skipped)} weight matrices",
        "calibration": f"{calibration_tokens:,} tokens" if calibration_tokens else "none",
        "mean output error of a layer": f"{sum(known) / len(known):.2%}" if known else "not measured",
        "layers that needed a fallback": str(fallbacks),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: transformers
tags:
- gptq
- fewbit
- {config.bits}-bit
---

# Quantized with fewbit {__version__}

| | |
|---|---|
{table}

This is a standard GPTQ checkpoint (`{config.format}`). With fewbit:

```python
import fewbit

model = fewbit.load("this/folder")
```

With transformers, on the CPU and without other packages:

```python
import fewbit
from transformers import AutoModelForCausalLM

fewbit.register()
model = AutoModelForCausalLM.from_pretrained("this/folder")
```

`fewbit_report.json` has every layer; `fewbit verify` checks every byte.
""".encode()
