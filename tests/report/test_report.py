"""What a real run leaves behind: report, page and card, and in which order."""

import dataclasses
import html
import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import fewbit
from fewbit import formatting
from fewbit.cli.main import app
from fewbit.errors import ModelError, OutputError
from fewbit.report.page import page
from fewbit.verification import verify
from models import TEXT, random_sequences, save_tiny, tiny_model

SMALL = {"group_size": 16, "seq_len": 32, "num_samples": 6}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(TEXT * 8)
    return save_tiny(folder / "model"), folder / "text.txt"


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """One run with an evaluation: its folder and its report."""
    model, text = inputs
    out = tmp_path_factory.mktemp("run") / "out"
    return out, fewbit.quantize(
        model, fewbit.QuantConfig(**SMALL), dataset=text, output=out, evaluate_on=text
    )


def test_the_report_is_written(run):
    out, report = run
    written = json.loads((out / "fewbit_report.json").read_text())
    assert written == json.loads(json.dumps(report.published()))
    assert report.summary()["report"] == str(out / "fewbit_report.json")
    assert written["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert written["calibration"] == {"source": "text.txt", "sequences": 6, "tokens": 192}
    assert written["skipped"][0]["name"] == "lm_head"
    # 4-bit codes, a 16-bit scale and a 4-bit zero per 16 weights, 32 bits of g_idx per input
    assert 5.25 < report.bits_per_weight < 6.0


def test_the_page_is_made_of_the_report(run):
    out, report = run
    assert (out / "fewbit_report.html").read_text(encoding="utf-8") == page(report.published())


def test_the_report_is_short_in_a_console_and_the_page_in_a_notebook(run):
    out, report = run
    kl = report.evaluation["quantized"]["kl"]
    assert repr(report).startswith(f"<Report model → {out}: 14 layers, ")
    assert f"KL {kl:.4f} ({formatting.verdict(kl)})" in repr(report)
    assert "KL not measured" in repr(dataclasses.replace(report, evaluation=None))
    (inside,) = re.findall(r'^<iframe srcdoc="([^"]*)"', report._repr_html_())
    assert html.unescape(inside) == page(report.published())


def test_no_file_tells_where_it_was_made(run, inputs):
    out, _ = run
    private = [str(folder).encode() for folder in (out.parent, inputs[0].parent, Path.home(), Path.cwd())]
    for path in out.rglob("*"):
        content = path.read_bytes()
        assert not [folder for folder in private if folder in content], path


def test_a_verdict_and_the_engines(run):
    out, report = run
    html = (out / "fewbit_report.html").read_text(encoding="utf-8")
    kl = report.evaluation["quantized"]["kl"]
    assert formatting.verdict(kl)[1:] in html
    assert report.engines["gptqmodel"] == []
    assert report.engines["onnxruntime"] == []
    assert report.evaluation["quantized"]["base_perplexity"] == pytest.approx(
        report.evaluation["base"]["perplexity"]
    )


def test_what_the_model_was(run, inputs):
    _, report = run
    weights = inputs[0] / "model.safetensors"
    original = tiny_model("llama")
    count = sum(parameter.numel() for parameter in original.parameters())
    assert report.model == {
        "name": "model",
        "license": None,
        "hub_id": None,
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "parameters": count,
        "bytes": 4 * count,
        "file_bytes": weights.stat().st_size,
    }


def test_sizes_are_those_on_disk(run):
    out, report = run
    assert report.result_bytes == (out / "model.safetensors").stat().st_size
    assert report.quantized_bytes == sum(layer["stored_bytes"] for layer in report.layers)


def test_phases_have_time_and_memory(run):
    _, report = run
    phases = {phase["name"]: phase for phase in report.phases}
    assert {"calibration", "load", "walk", "hessian", "solve", "pack", "write", "evaluate"} <= set(phases)
    assert phases["solve"]["parent"] == "walk"
    assert phases["load"]["parent"] is None  # it goes on inside the walk, where blocks are read
    inner = sum(phase["seconds"] for phase in phases.values() if phase["parent"] == "walk")
    before = inner + phases["load"]["seconds"]
    walk = phases["walk"]
    assert walk["seconds"] - before <= walk["own_seconds"] <= walk["seconds"] - inner
    own = sum(phase["own_seconds"] for name, phase in phases.items() if name != "evaluate")
    assert 0.5 * report.seconds < own <= report.seconds
    assert phases["load"]["memory"]["bytes"] > 50e6


def test_card_has_the_evaluation(run):
    out, report = run
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{report.evaluation['quantized']['perplexity']:.2f}" in card
    assert str(out) not in card
    assert report.evaluation["dataset"] == "text.txt"
    assert verify(out).ok


def test_the_command_gives_the_same_bytes(run, tmp_path):
    out, report = run
    words = shlex.split(report.command)
    again = tmp_path / "again"
    arguments = [str(again) if word == str(out) else word for word in words[1:]]
    assert CliRunner().invoke(app, [*arguments, "-q"]).exit_code == 0
    for path in out.iterdir():
        if not path.name.startswith("fewbit_report"):
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_interrupted_evaluation_is_resumed(run, inputs, tmp_path, monkeypatch):
    model, text = inputs
    whole, _ = run
    options = {"dataset": text, "output": tmp_path / "out", "evaluate_on": text}

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fewbit.quantization.evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            fewbit.quantize(model, fewbit.QuantConfig(**SMALL), **options)
    assert (tmp_path / "out" / "config.json").exists()
    assert "Evaluation" not in (tmp_path / "out" / "README.md").read_text()
    report = fewbit.quantize(model, fewbit.QuantConfig(**SMALL), **options)
    assert report.resumed_layers == 14
    assert "14 layers of 14 come from an interrupted run" in " ".join(page(report.to_dict()).split())
    for path in whole.iterdir():
        if not path.name.startswith("fewbit_report"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "out" / ".fewbit").exists()


def test_interrupt_in_the_evaluation(inputs, tmp_path, monkeypatch):
    model, text = inputs

    def stopped(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fewbit.quantization.evaluate", stopped)
    arguments = [
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--method",
        "rtn",
        "--group-size",
        16,
        "--eval",
        text,
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 130
    said = " ".join(result.output.split())
    assert "is complete; run the same command again for its evaluation" in said


def test_failed_evaluation_keeps_checkpoint_report_and_card(inputs, tmp_path, monkeypatch):
    model, text = inputs

    def fails(*_args, **_options):
        raise ModelError("the model gives logits that are not finite")

    monkeypatch.setattr("fewbit.quantization.evaluate", fails)
    with pytest.raises(ModelError, match="not finite"):
        fewbit.quantize(
            model, fewbit.QuantConfig(**SMALL), dataset=text, output=tmp_path / "out", evaluate_on=text
        )
    assert {"config.json", "fewbit_report.json", "fewbit_report.html", "README.md"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }


@pytest.mark.parametrize("name", ["fewbit_report.json", "fewbit_report.html", "README.md"])
def test_report_that_cannot_be_written(inputs, tmp_path, monkeypatch, name):
    model, text = inputs
    replace = os.replace

    def full(source, target, **options):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        replace(source, target, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(
            OutputError, match=rf"cannot write .*{name}: No space left.*make room and run the same"
        ):
            fewbit.quantize(model, fewbit.QuantConfig(**SMALL), dataset=text, output=out)
    assert (out / "config.json").exists()
    fewbit.quantize(model, fewbit.QuantConfig(**SMALL), dataset=text, output=out)
    assert (out / name).exists()
    assert not [*out.glob(".*"), *out.glob("*.tmp")]


def test_report_of_a_model_in_memory(tmp_path):
    model = tiny_model("llama")
    before = sum(parameter.nbytes for parameter in model.parameters())
    sequences = random_sequences()
    report = fewbit.quantize(model, fewbit.QuantConfig(bits=8, **SMALL), dataset=sequences).fewbit_report
    assert report.output is None
    assert report.model["bytes"] == before
    assert report.model["file_bytes"] is None
    kept = before - 4 * sum(layer["out_features"] * layer["in_features"] for layer in report.layers)
    assert report.result_bytes == kept + report.quantized_bytes
    assert "fewbit.quantize(model, config, dataset=dataset)" in report.command
    assert report.write(tmp_path) == tmp_path / "fewbit_report.json"
    assert "# dataset: list of 6 items" in (tmp_path / "fewbit_report.html").read_text(encoding="utf-8")


def test_upload_names_the_hub_id_and_excludes_the_report(inputs, tmp_path, monkeypatch):
    model, text = inputs
    uploaded = {}
    monkeypatch.setattr("fewbit.modeling.source.download", lambda name, error, allow_pickle: model)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo, **k: SimpleNamespace(repo_id=repo)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: uploaded.update(k))
    report = fewbit.quantize(
        "ann/tiny",
        fewbit.QuantConfig(**SMALL),
        dataset=text,
        output=tmp_path / "out",
        push_to_hub="ann/tiny-4bit",
    )
    assert (report.model["name"], report.model["hub_id"]) == ("ann/tiny", "ann/tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"^base_model: ann/tiny$", card, re.MULTILINE)
    assert 'from_pretrained("ann/tiny-4bit")' in card
    assert (uploaded["folder_path"], uploaded["repo_id"]) == (tmp_path / "out", "ann/tiny-4bit")
    assert "ignore_patterns" not in uploaded  # the reports name no folder of this machine


def test_folder_is_named_without_its_path(tmp_path, inputs):
    _, text = inputs
    folder = save_tiny(tmp_path / "deep" / "my-model")
    report = fewbit.quantize(
        str(folder) + "/", fewbit.QuantConfig(method="rtn", **SMALL), dataset=text, output=tmp_path / "out"
    )
    assert report.model["name"] == "my-model"
