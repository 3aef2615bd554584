"""`--for` of `inspect` and `plan` as typed: what is said, JSON and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from checkpoint_samples import write_fewbit
from fewbit.cli.main import app
from fewbit.config import QuantConfig
from fewbit.engines import ENGINES
from models import save_tiny

NAMES = [entry.name for entry in ENGINES]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("for") / "out"
    write_fewbit(folder, QuantConfig(bits=4, group_size=32, sym=False))
    return folder


def test_inspect_names_every_engine(checkpoint: Path) -> None:
    shown = invoke("inspect", checkpoint)
    assert shown.exit_code == 0
    for entry in ENGINES:
        assert entry.title in shown.stdout
    assert "asymmetric grids; it takes symmetric ones (--sym)" in shown.stdout


def test_inspect_for_an_engine_that_cannot_load_it_exits_with_1(checkpoint: Path) -> None:
    shown = invoke("inspect", checkpoint, "--for", "vllm")
    assert shown.exit_code == 1
    assert "vLLM 0.32 on NVIDIA GPUs" in shown.stdout
    assert "2 layers: asymmetric grids; it takes symmetric ones (--sym)" in shown.stdout
    assert "ONNX" not in shown.stdout
    assert invoke("inspect", checkpoint, "--for", "onnxruntime").exit_code == 0
    assert invoke("inspect", checkpoint, "--for", "onnxruntime", "--for", "vllm").exit_code == 1
    quiet = invoke("inspect", checkpoint, "--for", "vllm", "-q")
    assert (quiet.exit_code, quiet.stdout) == (1, "")


def test_inspect_json_has_the_reasons_for_every_engine(checkpoint: Path) -> None:
    shown = invoke("inspect", checkpoint, "--json", "--for", "vllm")
    assert shown.exit_code == 1
    found = json.loads(shown.stdout)["readers"]
    assert list(found) == NAMES
    assert found["vllm"] == ["2 layers: asymmetric grids; it takes symmetric ones (--sym)"]
    assert found["onnxruntime"] == []


def test_an_unknown_engine_is_bad_usage(checkpoint: Path) -> None:
    shown = invoke("inspect", checkpoint, "--for", "exllama")
    assert shown.exit_code == 2
    assert "is none of vllm, vllm-cpu, vllm-fewbit, sglang" in " ".join(shown.output.split())


def test_plan_says_whether_the_result_could_be_loaded(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    small = ["plan", model, "--seq-len", "32", "--num-samples", "2", "--group-size", "16"]
    refused = invoke(*small, "--for", "vllm", "--for", "gptqmodel")
    assert refused.exit_code == 1
    said = " ".join(refused.output.split())
    assert "problem: vLLM 0.32 on NVIDIA GPUs could not load the result: 14 layers: group size 16" in said
    assert "GPTQModel 7.7 can load the result" in said
    found = json.loads(invoke(*small, "--json", "--for", "vllm", "--for", "gptqmodel").stdout)["readers"]
    assert list(found) == ["vllm", "gptqmodel"]
    assert found["vllm"][0] == "14 layers: group size 16; it takes -1, 32, 64 and 128"
    assert found["gptqmodel"] == []
