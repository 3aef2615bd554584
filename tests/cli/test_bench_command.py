import json

import pytest
from typer.testing import CliRunner

from fewbit.bench.models import Result
from fewbit.bench.timing import Times
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
    """Settings of the measurement, which is replaced: twice as fast as the original in decoding."""
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


def test_unknown_device(folder):
    result = run(folder, "--device", "tpu")
    assert isinstance(result.exception, ConfigError)
    assert "device 'tpu' cannot be used here" in str(result.exception)
