"""`fewbit plan` and `quantize --dry-run` as a user meets them."""

import json

import pytest
from typer.testing import CliRunner

from fewbit.cli.main import app
from models import TEXT, save_tiny

SMALL = ["--group-size", "16", "--seq-len", "32", "--num-samples", "4"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "text.txt").write_text(TEXT * 8)
    return save_tiny(folder / "model"), folder / "text.txt"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_what_a_person_sees(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model, text = inputs
    result = invoke("plan", model, *SMALL, "--dataset", text, "-o", tmp_path / "out", "--ignore", "v_proj")
    said = " ".join(result.stdout.split())
    assert result.exit_code == 0
    assert "2 × mlp.down_proj 48 × 80 4 16 gptq, symmetric" in said
    assert "2 × model.layers.N.self_attn.v_proj 2.30 k asked to stay as it is" in said
    assert "12 layers" in said
    for row in ("bits per weight", "result", "disk", "peak memory", "libraries", "time about"):
        assert row in said


def test_several_processes_are_named(inputs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = " ".join(invoke("plan", inputs[0], *SMALL, "--processes", "2").stdout.split())
    assert said.count("in each of 2 processes") == 2


def test_a_dry_run_under_torchrun_plans_for_its_processes_and_rank_0_speaks(inputs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, times in ((0, 2), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        said = " ".join(invoke("quantize", inputs[0], *SMALL, "--dry-run").stdout.split())
        assert said.count("in each of 3 processes") == times


def test_every_module_on_request(inputs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = invoke("plan", inputs[0], *SMALL, "-v").stdout
    assert "model.layers.1.mlp.down_proj" in said


def test_json_has_the_contract_keys(inputs):
    model, text = inputs
    result = invoke("plan", model, *SMALL, "--dataset", text, "--json")
    answer = json.loads(result.stdout)
    assert set(answer) == {"modules", "peak_memory_bytes", "output_bytes", "seconds", "problems"}
    assert answer["problems"] == []
    assert answer["seconds"] > 0
    kinds = [module["reason"] is None for module in answer["modules"]]
    assert (kinds.count(True), kinds.count(False)) == (14, 1)
    assert {"name", "shape", "bits", "group_size", "reason"} <= set(answer["modules"][0])


def test_json_with_details(inputs):
    answer = json.loads(invoke("plan", inputs[0], *SMALL, "--json", "-v").stdout)
    assert sum(answer["seconds_by_phase"].values()) == pytest.approx(answer["seconds"])
    parts = {name: size for name, size in answer["memory"].items() if name != "moment"}
    assert sum(parts.values()) == answer["peak_memory_bytes"]


def test_dry_run_is_the_same_and_writes_nothing(inputs, tmp_path):
    model, text = inputs
    out = tmp_path / "out"
    dry = invoke("quantize", model, *SMALL, "--dataset", text, "-o", out, "--dry-run", "--json")
    plan = invoke("plan", model, *SMALL, "--dataset", text, "-o", out, "--json")
    assert dry.exit_code == plan.exit_code == 0
    assert json.loads(dry.stdout)["modules"] == json.loads(plan.stdout)["modules"]
    assert json.loads(dry.stdout)["output_bytes"] == json.loads(plan.stdout)["output_bytes"]
    assert not out.exists()


@pytest.mark.parametrize("command", [["plan"], ["quantize", "--dry-run"]])
def test_what_cannot_work_has_exit_code_1_and_says_why(inputs, command):
    model, text = inputs
    result = invoke(*command, model, *SMALL, "--dataset", text, "--ignore", "q_prj")
    assert result.exit_code == 1
    assert "problem: the pattern 'q_prj' matches no layer" in " ".join(result.stderr.split())


def test_problems_in_json(inputs):
    result = invoke("plan", inputs[0], "--target-bits", "2.01", "--json")
    assert result.exit_code == 1
    [problem] = json.loads(result.stdout)["problems"]
    assert "cannot be met" in problem


def test_quiet(inputs):
    result = invoke("plan", inputs[0], *SMALL, "-q")
    assert (result.exit_code, result.stdout) == (0, "")


def test_quantize_without_an_output_folder_is_bad_usage(inputs):
    result = invoke("quantize", inputs[0], *SMALL)
    assert result.exit_code == 2
    assert "the folder to write is missing" in " ".join(result.stderr.split())
