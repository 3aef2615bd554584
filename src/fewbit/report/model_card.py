"""The model card: README.md of the output folder, with the main facts and how to load the model.

It is a pure function of the report and contains no times and no paths: the same inputs give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .. import formatting
from ..config import WITHOUT_CALIBRATION
from .layer_stats import error_measure, mean, setting

CARD_NAME = "README.md"
_PLACEHOLDER = "path/to/this/folder"

# Engines of `engines.ENGINES` that are started with one command.
_SERVERS = {"vllm": "vllm serve {}", "sglang": "python -m sglang.launch_server --model-path {}"}

_METHOD_NAMES = {"gptq": "GPTQ", "rtn": "round-to-nearest"}


def model_card(report: Mapping[str, Any], repository: str | None = None) -> str:
    """The card in Markdown.

    Args:
        report: a `Report` in plain JSON types.
        repository: Hub id of the result; without it the snippets name a folder.
    """
    target = repository or _PLACEHOLDER
    sections = [
        "\n".join(_header(report)),
        f"# {_title(report)}",
        "\n".join(_facts(report)),
        *(["\n".join(_evaluation(report["evaluation"]))] if report["evaluation"] else []),
        "\n".join(_loading(target, report.get("engines", {}))),
        *(["\n".join(_limits(report["plan_notes"]))] if report["plan_notes"] else []),
        "`fewbit verify` checks every byte of these files. The run that made them left `fewbit_report.html` beside "
        "them, with the figures of every layer.",
    ]
    return "\n\n".join(sections) + "\n"


def _header(report: Mapping[str, Any]) -> Iterator[str]:
    yield from ("---", "library_name: transformers")
    if report["model"].get("license"):
        yield f"license: {report['model']['license']}"
    if report["model"]["architecture"].endswith("ForCausalLM"):
        yield "pipeline_tag: text-generation"
    if report["model"]["hub_id"]:
        yield f"base_model: {report['model']['hub_id']}"
        yield "base_model_relation: quantized"
    bits = sorted({layer["bits"] for layer in report["layers"]})
    yield from ("tags:", "- gptq", "- fewbit", *(f"- {number}-bit" for number in bits), "---")


def _title(report: Mapping[str, Any]) -> str:
    base = report["model"]["hub_id"] or f"A {report['model']['architecture']}"
    return f"{base}, quantized with fewbit {report['versions']['fewbit']}"


def _facts(report: Mapping[str, Any]) -> Iterator[str]:
    config, model, layers = report["config"], report["model"], report["layers"]
    grid = "symmetric" if config["sym"] else "asymmetric"
    whole = 8 * report["result_bytes"] / model["parameters"]
    left = formatting.plural(len(report["skipped"]), "weight matrix", "weight matrices")
    facts = {
        "model": f"{model['architecture']}, {formatting.parameters(model['parameters'])} parameters",
        "bits": f"{_settings(layers)}; {grid}",
        "bits per weight": f"{report['bits_per_weight']:.3f} in the quantized layers, {whole:.3f} over the whole model",
        "size": (
            f"{formatting.size(report['result_bytes'])}, from {formatting.size(model['bytes'])} in {model['dtype']}"
        ),
        "method": ", ".join([_method(config, layers), *_options(config)]),
        "quantized": f"{formatting.plural(len(layers), 'layer')}; {left} left as they are",
        "calibration": _calibration(report["calibration"]),
        "output error of a layer": _error(layers),
        "layers that needed a fallback": str(sum(bool(layer["fallbacks"]) for layer in layers)),
        **dict(_distillation(report.get("distillation"))),
    }
    yield from _table(("", ""), facts.items())


def _options(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("loss_aware"):
        yield "loss-aware"
    if config.get("rotate"):
        yield "residual stream rotated"


def _settings(layers: Iterable[Mapping[str, Any]]) -> str:
    found = list(dict.fromkeys(setting(layer) for layer in layers))
    return "; ".join(found) if len(found) < 4 else f"{len(found)} settings, see `config.json`"


def _method(config: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    calibrated = [layer for layer in layers if layer["method"] not in WITHOUT_CALIBRATION]
    others = Counter(layer["method"] for layer in layers if layer["method"] in WITHOUT_CALIBRATION)
    if not calibrated:
        return ", ".join(_METHOD_NAMES.get(name, name) for name in others)
    counted = [
        f"{formatting.plural(n, 'layer')} {_METHOD_NAMES.get(name, name)}" for name, n in others.items()
    ]
    return "; ".join([_calibrated(config, calibrated), *counted])


def _calibrated(config: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    method = " and ".join(dict.fromkeys(_METHOD_NAMES.get(x["method"], x["method"]) for x in layers))
    correction = mean(layer["correction"] for layer in layers)
    corrected = "" if correction is None else f", correction α = {formatting.alpha(correction)} on average"
    tuned = f", tuned for {config['tune_steps']} steps per block" if config["tune"] else ""
    return f"{method}, act-order {config['act_order']}, damp {config['damp']:g}{corrected}{tuned}"


def _calibration(calibration: Mapping[str, Any]) -> str:
    tokens, sequences = calibration["tokens"], calibration["sequences"]
    return (
        f"{formatting.plural(tokens, 'token')} in {formatting.plural(sequences, 'sequence')}"
        if sequences
        else "none"
    )


def _distillation(distillation: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    if distillation and distillation["kept"]:
        before, after = formatting.number(distillation["before"]), formatting.number(distillation["after"])
        yield "distilled", f"KL on held-out text {before} before, {after} after, nats per token"


def _error(layers: Sequence[Mapping[str, Any]]) -> str:
    measure = error_measure(layers)
    average = mean(layer[measure] for layer in layers)
    against = "against full precision" if measure == "true_error" else "added by the layer itself"
    against += ", before tuning" if any(layer.get("tuned") for layer in layers) else ""
    return f"{formatting.percent(average)} on average, {against}" if average is not None else "not measured"


def _evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    base, after = evaluation["base"], evaluation["quantized"]
    yield from ("## Evaluation", "")
    yield f"On {formatting.plural(after['tokens'], 'token')} in windows of {after['seq_len']}, with standard errors:"
    yield ""
    rows = {
        "perplexity": (_spread(base, "perplexity", "stderr"), _spread(after, "perplexity", "stderr")),
        "KL divergence from the original, nats per token": ("0", _spread(after, "kl", "kl_stderr")),
        "same first choice as the original": ("", formatting.percent(after["top1_agreement"])),
    }
    yield from _table(("", "original", "this model"), ((name, *values) for name, values in rows.items()))
    yield ""
    yield f"In words: {formatting.verdict(after['kl'])}."


def _spread(values: Mapping[str, Any], name: str, error: str) -> str:
    return formatting.number(values[name]) + formatting.spread(values[name], values[error])


def _loading(target: str, engines: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield f"""## Use

These are standard GPTQ files. With fewbit:

```python
import fewbit

model = fewbit.load("{target}")
```

With transformers, on any CPU:

```python
import fewbit
from transformers import AutoModelForCausalLM

fewbit.register()
model = AutoModelForCausalLM.from_pretrained("{target}")
```
"""
    commands = [command.format(target) for name, command in _SERVERS.items() if engines.get(name) == []]
    if commands:
        yield from ("", "On an NVIDIA GPU also:", "", "```bash", *commands, "```")


def _limits(notes: Iterable[str]) -> Iterator[str]:
    yield from ("## To know", "")
    yield from (f"- {note}" for note in notes)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
