"""Several processes from a model folder to a checkpoint, with killed and resumed runs."""

import os
import signal

import pytest

import fewbit
from fewbit.errors import ConfigError, OutputError, RankError, SolverError
from fewbit.pipeline.layer_quantizer import LayerQuantizer
from fewbit.verification import verify
from models import TEXT, random_sequences, save_tiny, tiny_model, tiny_tokenizer
from moe_models import save_tiny_moe
from rank_processes import run_ranks

TEXTS = [TEXT[start : start + 60] for start in range(0, 300, 30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("ranks") / "model", "llama", num_hidden_layers=4)


def quantize(comm, model, output, dataset=TEXTS, **options):
    config = fewbit.QuantConfig(group_size=16, seq_len=32, **options)
    return fewbit.quantize(model, config, dataset=dataset, output=output)


def contents(folder):
    reports = ("fewbit_report.json", "fewbit_report.html")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in reports}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("whole")
    reports = run_ranks(2, quantize, model, folder / "out")
    return reports, folder / "out"


def test_every_rank_gets_the_report(whole):
    (first, second), folder = whole
    assert first == second
    assert first.ranks == 2
    assert first.peak_memory_bytes > 0
    assert {layer["tokens"] for layer in first.layers} == {9 * 32}
    assert verify(folder).ok


@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_processes_writes_the_same_bytes(model, whole, tmp_path, world):
    run_ranks(world, quantize, model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole[1])


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "mixtral"])
def test_ranks_without_batches_load_weights(tmp_path, family):
    save = save_tiny_moe if family == "mixtral" else save_tiny
    model = save(tmp_path / "model", family)
    quantize(None, model, tmp_path / "alone", dataset=TEXTS[:2])
    run_ranks(3, quantize, model, tmp_path / "out", TEXTS[:2])
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def killed(comm, model, output, blocks):
    """Kill rank 1 while a layer is quantized, after this many blocks are finished."""
    quantize_layer = LayerQuantizer.quantize_layer

    def quantize_or_die(self, name, inputs):
        if len(self.sink.records) == 7 * blocks and self.comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        quantize_layer(self, name, inputs)

    LayerQuantizer.quantize_layer = quantize_or_die
    return quantize(comm, model, output)


@pytest.mark.parametrize("blocks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_run_resumes_after_a_killed_rank(model, whole, tmp_path, blocks):
    output = tmp_path / "out"
    left, dead = run_ranks(2, killed, model, output, blocks)
    assert dead is None
    assert isinstance(left, RankError)
    assert "rank 1 of 2 did not answer" in str(left)
    assert "finished blocks are safe" in str(left)
    assert not (output / "config.json").exists()
    again, _ = run_ranks(2, quantize, model, output)
    assert again.resumed_layers == 7 * blocks
    assert contents(output) == contents(whole[1])


def test_run_of_two_processes_resumes_in_one(model, whole, tmp_path):
    output = tmp_path / "out"
    run_ranks(2, killed, model, output, 2)
    report = quantize(None, model, output)
    assert (report.resumed_layers, report.ranks) == (14, 1)
    assert contents(output) == contents(whole[1])


def refused(comm, model, output, options):
    return quantize(comm, model, output, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dataset": "-"}, ConfigError, "standard input cannot be read by all 2 processes"),
        ({"strict": True, "damp": 1e-9, "num_samples": 2}, SolverError, "needed a fallback"),
    ],
)
def test_errors_are_raised_on_all_ranks(model, tmp_path, options, kind, message):
    for result in run_ranks(2, refused, model, tmp_path / "out", options):
        assert isinstance(result, kind)
        assert message in str(result)


def test_wrong_output_folder_is_refused_on_all_ranks(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for result in run_ranks(2, quantize, model, tmp_path):
        assert isinstance(result, OutputError)
        assert "already holds something else (notes.txt)" in str(result)


def with_other_text(comm, model, output):
    import torch.distributed as dist

    return quantize(comm, model, output, dataset=TEXTS[dist.get_rank() :])


def test_processes_with_different_text_are_refused(model, tmp_path):
    for result in run_ranks(2, with_other_text, model, tmp_path / "out"):
        assert isinstance(result, RankError)
        assert "another calibration data" in str(result)


def in_memory(comm):
    import torch.distributed as dist

    model = tiny_model("llama", seed=dist.get_rank())
    return fewbit.quantize(model, dataset=random_sequences(4), tokenizer=tiny_tokenizer())


def test_different_models_in_memory_are_refused():
    for result in run_ranks(2, in_memory):
        assert isinstance(result, RankError)
        assert "another model" in str(result)


def test_target_bits_of_a_rotated_model_match_one_process(model, tmp_path):
    options = {"target_bits": 4.5, "rotate": True}
    quantize(None, model, tmp_path / "alone", **options)
    divided, _ = run_ranks(2, lambda comm: quantize(comm, model, tmp_path / "out", **options))
    assert divided.config["rotate"]
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert len({layer["bits"] for layer in divided.layers}) > 1
