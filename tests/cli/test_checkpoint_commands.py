"""`inspect`, `verify` and `convert` as typed: output, JSON and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from checkpoint_samples import random_codes, rewrite, write_autogptq, write_base, write_fewbit
from fewbit.checkpoint.layout import pack
from fewbit.cli.convert import convert
from fewbit.cli.inspect import inspect
from fewbit.cli.verify import verify
from fewbit.config import QuantConfig
from tiny_gptq import llama, write_checkpoint

app = typer.Typer()
for command in (inspect, verify, convert):
    app.command()(command)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout


def test_verify_says_ok_and_exits_0_or_lists_problems_and_exits_1(tmp_path: Path) -> None:
    written = write_fewbit(tmp_path / "out")
    write_base(tmp_path / "base", written)
    assert "ok: 2 quantized layers" in run("verify", tmp_path / "out")
    answer = json.loads(run("verify", tmp_path / "out", "--against", tmp_path / "base", "--json"))
    assert answer == {"ok": True, "problems": [], "layers": 2, "errors": dict.fromkeys(written, 0.0)}
    assert "relative error" in run("verify", tmp_path / "out", "--against", tmp_path / "base")
    rewrite(tmp_path / "out", lambda t: t["model.layers.1.mlp.down_proj.g_idx"].fill_(7))
    shown = run("verify", tmp_path / "out", code=1)
    assert "model.layers.1.mlp.down_proj.g_idx: holds group 7, but there are only 3" in shown
    answer = json.loads(run("verify", tmp_path / "out", "--json", code=1))
    assert answer["ok"] is False
    assert answer["problems"][0].keys() == {"where", "what"}
    assert run("verify", tmp_path / "out", "-q", code=1) == ""


def test_convert_writes_the_other_format(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "v1")
    shown = run("convert", tmp_path / "v1", "-o", tmp_path / "v2", "--format", "gptq_v2")
    assert "2 layers written as gptq_v2" in shown
    answer = json.loads(
        run("convert", tmp_path / "v2", "-o", tmp_path / "back", "--format", "gptq", "--json")
    )
    assert answer == {"output": str(tmp_path / "back"), "format": "gptq", "modules": 2, "turned_groups": 0}
    run("convert", tmp_path / "v1", "-o", tmp_path / "x", "--format", "marlin", code=2)


def test_inspect_shows_what_a_checkpoint_is_and_which_kernels_can_run_it(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out", QuantConfig(bits=3, group_size=32))
    shown = run("inspect", tmp_path / "out", "-v")
    for part in (
        "sample",
        "gptq",
        "fewbit:",
        "3 bits, groups of 32, symmetric",
        "bits per weight",
        "marlin",
        "q_proj",
    ):
        assert part in shown, part
    facts = json.loads(run("inspect", tmp_path / "out", "--json"))
    assert facts["modules"] == 2
    # 3 bits + per group of 32: a 16-bit scale and a 3-bit zero point + an int32 g_idx per input and layer.
    weights = 32 * 64 + 64 * 96
    expected = 3 + 19 / 32 + 32 * (64 + 96) / weights
    assert facts["bits_per_weight"] == pytest.approx(expected)
    kernels = {row["kernel"]: row for row in facts["kernels"]}
    assert kernels["reference"]["modules"] == 2
    assert kernels["marlin"]["why_not"]
    assert sum(row["used"] for row in facts["kernels"]) == 2
    assert "runs 2 of them with kernel=auto" in shown


def test_inspect_names_the_original_from_the_report_or_the_card(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_fewbit(out)
    assert json.loads(run("inspect", out, "--json"))["base_model"] is None
    (out / "README.md").write_text(
        "---\nlicense: mit\nbase_model:\n- org/one\ntags: [a]\n---\nbase_model: no\n"
    )
    assert json.loads(run("inspect", out, "--json"))["base_model"] == "org/one"
    (out / "README.md").write_text("---\nbase_model: org/two\n---\n")
    assert "org/two" in run("inspect", out)
    model = {
        "name": "org/three",
        "bytes": 10 * sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }
    (out / "fewbit_report.json").write_text(json.dumps({"model": model}))
    shown = run("inspect", out)
    assert "org/three" in shown
    assert "× smaller" in shown
    for damaged in ("{", "[]", '{"model": 3}', '{"model": {"name": [1], "bytes": "many"}}'):
        (out / "fewbit_report.json").write_text(damaged)
        assert "× smaller" not in run("inspect", out)


def test_quiet_and_verbose(tmp_path: Path) -> None:
    write_fewbit(tmp_path / "out")
    assert run("inspect", tmp_path / "out", "-q") == ""
    shown = run("convert", tmp_path / "out", "-o", tmp_path / "v2", "--format", "gptq_v2", "-v")
    assert "model.safetensors" in shown
    assert run("convert", tmp_path / "out", "-o", tmp_path / "v3", "--format", "gptq_v2", "-q") == ""


def test_inspect_knows_convolutions_only_where_transformers_knows_the_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "llama", llama())
    assert "kernels on" in run("inspect", tmp_path / "llama")
    assert "if all layers are linear" not in run("inspect", tmp_path / "llama")
    write_fewbit(tmp_path / "unknown")
    assert json.loads(run("inspect", tmp_path / "unknown", "--json"))["kinds"] == {
        "linear": 2
    }  # by the class's name
    path = tmp_path / "unknown" / "config.json"
    config = json.loads(path.read_text())
    for changed in ({**config, "vision_config": {}}, {**config, "architectures": ["SampleModel"]}):
        path.write_text(json.dumps(changed))
        assert json.loads(run("inspect", tmp_path / "unknown", "--json"))["kinds"] == {"unknown": 2}
    assert "if all layers are linear" in run("inspect", tmp_path / "unknown")

    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, patch_size=8
    )
    name = "vit.embeddings.patch_embeddings.projection"
    codes = random_codes(32, 3 * 8 * 8)
    codes.zeros.fill_(8)
    write_autogptq(
        tmp_path / "vit", {f"{name}.{p}": t for p, t in pack(codes, "gptq").items()}, {"sym": True}
    )
    config.architectures = [ViTForImageClassification.__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path / "vit")
    facts = json.loads(run("inspect", tmp_path / "vit", "--json"))
    kernels = {row["kernel"]: row for row in facts["kernels"]}
    assert facts["kinds"] == {"conv2d": 1}
    assert kernels["reference"]["modules"] == 1
    assert kernels["cpu"]["modules"] == 0
    assert "conv" in kernels["cpu"]["why_not"]


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_help_has_examples(command: str) -> None:
    assert f"fewbit {command} out" in run(command, "--help")
