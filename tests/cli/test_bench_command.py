import json

import pytest
from typer.testing import CliRunner

from fewbit.bench.models import Result
from fewbit.bench.rounds import Times
from fewbit.cli.main import app
from fewbit.errors import KernelError
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
            if name != "torch_int4"
        }, {name: "not here" for name in candidates if name == "torch_int4"}

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
        folder, "--against", "org/model", "--kernel", "auto", "--kernel", "torch_int4", "--threads", "1", "-q"
    )
    assert "2.00x" in result.stdout
    assert "auto: 14 layers: auto" in result.stdout
    assert "torch_int4: not here" in result.stderr


def test_options_of_loading_reach_the_workers(folder, asked):
    run(folder, "--fuse", "--lm-head-runtime", "8", "--threads", "1", "-q")
    assert asked["candidates"]["auto"].options == {
        "trust_remote_code": False,
        "fuse": True,
        "lm_head_runtime": 8,
    }


def test_all_kernels_leave_out_the_reference(folder, asked):
    run(folder, "--all-kernels", "--threads", "1", "-q")
    assert {"cpu", "torch_int4"} <= asked["candidates"].keys()
    assert "reference" not in asked["candidates"]


def test_unknown_kernels_and_nothing_measured(folder, asked):
    unknown = run(folder, "--kernel", "fast")
    assert isinstance(unknown.exception, KernelError)
    assert "there is no kernel 'fast'" in str(unknown.exception)
    nothing = run(folder, "--kernel", "torch_int4")
    assert str(nothing.exception) == "nothing could be measured: torch_int4: not here"


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
    assert one["share"] == pytest.approx(
        one["gigabytes_per_second"] * 1e9 / facts["machine"]["read_bandwidth"]
    )
    table = run(folder, *options)
    assert "4 layers of 192 x 96, 4 bits, groups of 32" in table.stdout
    assert "GB/s from memory" in table.stdout
