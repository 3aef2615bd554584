import json

import pytest
import torch
from typer.testing import CliRunner

from fewbit.bench import llama as llama_shapes
from fewbit.bench.layers import Measured, Shape
from fewbit.bench.machine import Machine
from fewbit.bench.models import Result
from fewbit.bench.timing import Times
from fewbit.cli.bench_layers import Found
from fewbit.cli.main import app
from fewbit.errors import ConfigError, KernelError
from tiny_gptq import llama, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path, llama())
    return str(path)


def run(*args):
    return CliRunner().invoke(app, ["bench", *args])


@pytest.fixture
def asked(monkeypatch):
    """What was to be measured, in place of measuring it: twice as fast as the original in decoding."""
    seen = {}

    def measure_models(candidates, **settings):
        seen.update(settings, candidates=candidates)
        fast, slow = Times((0.5, 1.0)), Times((1.0, 2.0))
        return {
            name: Result(
                slow, slow if name == "original" else fast, [f"14 layers: {name}"], 1.5, 2**20, 2**21
            )
            for name in candidates
            if name != "cpu_a8"
        }, {name: "not here" for name in candidates if name == "cpu_a8"}

    monkeypatch.setattr("fewbit.bench.models.measure_models", measure_models)
    return seen


def test_ratios_to_the_original(folder, asked):
    result = run(
        folder, "--against", "org/model", "--kernel", "cpu", "--threads", "1", "--rounds", "2", "--json"
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["threads"], facts["dtype"]) == (1, "bfloat16")
    cpu = facts["models"]["cpu"]
    assert cpu["decode_ratio"] == 2.0
    assert cpu["prefill_ratio"] == 1.0
    assert cpu["decode_tokens_per_second"] == 2.0
    assert cpu["decode_tokens_per_second_median"] == pytest.approx(1 / 0.75)
    assert asked["candidates"]["original"].kernel is None
    assert (asked["threads"], asked["rounds"], asked["prefill_tokens"]) == (1, 2, 512)


def test_the_table(folder, asked):
    result = run(
        folder, "--against", "org/model", "--kernel", "auto", "--kernel", "cpu_a8", "--threads", "1", "-q"
    )
    assert "2.00x" in result.stdout
    assert "auto: 14 layers: auto" in result.stdout
    assert "cpu_a8: not here" in result.stderr


def test_options_of_loading_reach_the_workers(folder, asked):
    run(folder, "--fuse", "--lm-head-runtime", "8", "--threads", "1", "-q")
    assert asked["candidates"]["auto"].options == {
        "trust_remote_code": False,
        "fuse": True,
        "lm_head_runtime": 8,
    }


def test_all_kernels_leave_out_the_reference(folder, asked):
    run(folder, "--all-kernels", "--threads", "1", "-q")
    assert {"cpu", "cpu_a8"} <= asked["candidates"].keys()
    assert "reference" not in asked["candidates"]


def test_unknown_kernels_and_nothing_measured(folder, asked):
    unknown = run(folder, "--kernel", "fast")
    assert isinstance(unknown.exception, KernelError)
    assert "there is no kernel 'fast'" in str(unknown.exception)
    nothing = run(folder, "--kernel", "cpu_a8")
    assert str(nothing.exception) == "nothing could be measured: cpu_a8: not here"


def test_layers(folder, monkeypatch):
    monkeypatch.setattr("fewbit.bench.layers.cold_bytes", lambda: 1)
    monkeypatch.setattr("fewbit.bench.machine._BUFFER", 1 << 20)
    options = ("--layers", "--kernel", "cpu", "--rounds", "1", "--threads", "1", "-q")
    facts = json.loads(run(folder, *options, "--json").stdout)
    shapes = [row["shape"] for row in facts["layers"]]
    assert (shapes[0]["out_features"], shapes[0]["in_features"], shapes[0]["count"]) == (192, 96, 4)
    cells = facts["layers"][0]["results"]
    assert {cell["tokens"] for cell in cells} == {1, 16, 512}
    assert {cell["kernel"] for cell in cells} == {"cpu", "Linear", "torch int4"}
    one = next(cell for cell in cells if cell["kernel"] == "cpu" and cell["tokens"] == 1)
    machine = facts["machine"]
    of_memory = one["gigabytes_per_second"] * 1e9 / machine["read_bandwidth"]
    of_arithmetic = one["gigaflops"] * 1e9 / machine["peaks"]["bfloat16"]
    assert one["share"] == pytest.approx(max(of_memory, of_arithmetic))
    assert one["limit"] == ("memory" if of_memory >= of_arithmetic else "arithmetic")
    table = run(folder, *options)
    assert "4 layers of 192 x 96, 4 bits, groups of 32" in table.stdout
    assert "GB/s from memory" in table.stdout


def test_shapes_of_models_need_no_checkpoint(monkeypatch):
    monkeypatch.setattr("fewbit.bench.layers.cold_bytes", lambda: 1)
    monkeypatch.setattr("fewbit.bench.machine.measure_machine", lambda: Machine(1, 1e10, {"bfloat16": 1e11}))
    monkeypatch.setitem(llama_shapes._MODELS, "1b", (64, 128, 32, 2))
    options = (
        "--shapes",
        "1b",
        "--bits",
        "3",
        "--group-size",
        "32",
        "--kernel",
        "reference",
        "--rounds",
        "1",
    )
    facts = json.loads(run(*options, "--threads", "1", "--json").stdout)
    assert [
        (r["shape"]["out_features"], r["shape"]["count"], r["shape"]["bits"]) for r in facts["layers"]
    ] == [
        (128, 4, 3),
        (64, 2, 3),
        (64, 4, 3),
        (32, 4, 3),
    ]
    assert (
        "torch's int4 operator cannot run this layer: 3 bits" in facts["layers"][0]["refused"]["torch int4"]
    )
    table = run(*options, "--threads", "1", "-q")
    assert "4 layers of 128 x 64, 3 bits, groups of 32" in table.stdout


def test_the_table_of_a_gpu():
    found = Found(
        Machine(1, 4e12, {"float16": 8e14}, "NVIDIA H200"),
        torch.float16,
        [
            (
                Shape(4096, 14336, 4, 128, count=32),
                {
                    1: {"auto": Measured(Times((9e-6,)), 1e-4), "Linear": Measured(Times((36e-6,)), 1e-4)},
                    2048: {
                        "auto": Measured(Times((4e-4,)), 1e-4),
                        "Linear": Measured(Times((3.5e-4,)), 1e-4),
                    },
                },
                {},
            )
        ],
    )
    one, _, many, _ = found.facts(rounds=False)["layers"][0]["results"]
    assert one["limit"] == "memory"
    assert one["share"] == pytest.approx(Shape(4096, 14336, 4, 128).nbytes / 9e-6 / 4e12)
    assert one["times_linear"] == pytest.approx(4.0)
    assert many["limit"] == "arithmetic"
    assert many["share"] == pytest.approx(2 * 2048 * 4096 * 14336 / 4e-4 / 8e14)


def test_what_cannot_be_measured_is_said_before_anything_is(folder):
    nothing = run()
    assert isinstance(nothing.exception, ConfigError)
    assert (
        str(nothing.exception) == "nothing to measure: give a checkpoint's folder, or --shapes 1b, 8b or 70b"
    )
    unknown = run("--shapes", "9b")
    assert str(unknown.exception) == "there are no shapes called '9b'; there are 1b, 8b, 70b"
    wrong = run("--shapes", "1b", "--device", "mps")
    assert str(wrong.exception) == "device mps cannot be measured: use --device cpu, cuda or cuda:1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu():
    absent = run("--shapes", "8b", "--device", "cuda")
    assert isinstance(
        absent.exception, KernelError
    )  # which the command ends with 2 for, as test_demo_command shows
    assert "sees no CUDA device. Run this on a machine with a GPU" in str(absent.exception)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_this_gpu():
    facts = json.loads(run("--shapes", "1b", "--device", "cuda", "--rounds", "1", "--json").stdout)
    assert facts["machine"]["read_bandwidth"] > 1e11
    for row in facts["layers"]:
        assert {cell["kernel"] for cell in row["results"]} == {"auto", "Linear", "torch int4"}
        assert all(cell["error"] < 0.02 for cell in row["results"])


def test_rivals_are_candidates_beside_the_kernels(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fewbit.bench.layers.measure_shape", lambda *a, **_: asked.append({*a[2]}) or ({}, {})
    )
    monkeypatch.setattr("fewbit.bench.machine.measure_machine", lambda: Machine(1, 1e9, {}))
    plainly, beside = run(folder, "--layers", "--json"), run(folder, "--layers", "--rivals", "--json")
    assert (plainly.exit_code, beside.exit_code) == (0, 0), beside.output
    assert asked[0] == {"auto", "Linear", "torch int4"}
    assert asked[-1] - asked[0] >= {"onnxruntime", "ggml q4_0", "ggml q8_0", "torch_aten"}


def test_rivals_need_layers(folder):
    result = run(folder, "--rivals")
    assert isinstance(result.exception, ConfigError)
    assert "add --layers" in str(result.exception)
