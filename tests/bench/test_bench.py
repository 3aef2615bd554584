import sys

import pytest
import torch

from fewbit.bench import layers, machine
from fewbit.bench.models import Candidate, WorkerProcess, measure_models
from fewbit.bench.timing import Times, in_turns, seconds_per_call
from fewbit.checkpoint.reader import open_checkpoint
from fewbit.errors import KernelError
from tiny_gptq import llama, write_checkpoint

SHAPE = layers.Shape(64, 128, 4, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path / "quantized", llama())
    llama().save_pretrained(path / "original")
    return path


def test_candidates_take_turns_until_the_budget_is_spent():
    order = []

    def candidate(name, seconds):
        def measure():
            order.append(name)
            return seconds

        return measure

    found = in_turns({"a": candidate("a", 2.0), "b": candidate("b", 1.0)}, rounds=3)
    assert order == ["a", "b"] * 3
    assert found["a"] == Times((2.0, 2.0, 2.0))
    assert len(in_turns({"a": candidate("a", 1.0)}, rounds=5, budget=0.0)["a"].seconds) == 1


def test_minimum_and_median():
    times = Times((3.0, 1.0, 2.0, 9.0))
    assert (times.minimum, times.median) == (1.0, 2.5)


def test_short_work_is_averaged_over_many_calls():
    calls = []
    measure = seconds_per_call(lambda: calls.append(0), at_least=0.001)
    before = len(calls)
    assert 0 < measure() < 0.001
    assert len(calls) - before > 10


def test_bytes_and_operations_of_a_shape():
    assert SHAPE.nbytes == 64 * 128 // 2 + 64 * 4 // 2 + 64 * 4 * 2
    assert layers.Shape(64, 128, 3, -1).nbytes == (64 * 128 + 64) * 3 // 8 + 2 * 64
    assert SHAPE.operations(5) == 2 * 5 * 64 * 128


def test_shapes_of_a_checkpoint(folder):
    shapes = layers.shapes_of(open_checkpoint(folder / "quantized").layers.values())
    assert [(s.out_features, s.in_features, s.count) for s in shapes] == [
        (192, 96, 4),
        (96, 192, 2),
        (96, 96, 4),
        (48, 96, 4),
    ]
    assert {s.bits for s in shapes} == {4}
    able = layers.able_kernels(shapes, torch.bfloat16)
    assert "cpu" in able
    assert "reference" not in able
    assert "cpu" not in layers.able_kernels(shapes, torch.float64)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_every_candidate_multiplies_with_the_same_weight(kernel):
    candidates = {
        "kernel": layers.registered(kernel),
        "Linear": layers.dense(torch.bfloat16),
        "float32": layers.dense(torch.float32),
        "operator": layers.torch_operator,
    }
    results, refused = layers.measure_shape(SHAPE, (1, 3), candidates, rounds=2, rotate=1)
    assert not refused
    assert results.keys() == {1, 3}
    for row in results.values():
        assert row.keys() == candidates.keys()
        assert all(measured.error < 0.02 for measured in row.values())
        assert row["float32"].error < 1e-5
        assert all(len(measured.times.seconds) == 2 for measured in row.values())


def test_what_cannot_run_is_said():
    candidates = {"triton": layers.registered("triton"), "operator": layers.torch_operator}
    shape = layers.Shape(20, 40, 3, 8)
    results, refused = layers.measure_shape(shape, (1,), candidates, rounds=1, rotate=1)
    assert results == {1: {}}
    assert "device is cpu, not cuda or xpu" in refused["triton"]
    assert refused["operator"] == "torch's int4 operator cannot run this layer: 3 bits"


def test_copies_have_memory_of_their_own():
    layer = layers.registered("cpu")(layers.random_weight(SHAPE), torch.bfloat16)
    rotation = layers.Rotation(layer, 20_000)
    x = torch.randn(2, 128).bfloat16()
    assert torch.equal(rotation(x), rotation(x))
    first, second = (next(rotation._next) for _ in range(2))
    assert first is not second
    assert first.tiles.data_ptr() != second.tiles.data_ptr()


def test_a_machine_has_a_bandwidth_and_peaks():
    found = machine.measure_machine(rounds=1)
    assert found.threads == torch.get_num_threads()
    assert 1e8 < found.read_bandwidth < 1e13
    assert set(found.peaks) == {"float32", "bfloat16"}
    assert machine.last_level_cache() >= 1 << 18


def test_models_in_processes_of_their_own(folder):
    quantized = Candidate(str(folder / "quantized"), "float32", "cpu")
    candidates = {
        "original": Candidate(str(folder / "original"), "float32"),
        "cpu": quantized,
        "none": Candidate(str(folder / "quantized"), "float32", "triton"),
    }
    results, refused = measure_models(candidates, threads=1, prefill_tokens=8, decode_tokens=3, rounds=2)
    assert results.keys() == {"original", "cpu"}
    assert "device is cpu" in refused["none"]
    assert results["cpu"].kernels == ["14 layers: cpu"]
    assert len(results["cpu"].decode.seconds) == len(results["original"].prefill.seconds) == 2
    assert all(result.peak_bytes > 0 and result.load_seconds > 0 for result in results.values())


def test_a_worker_that_dies_is_reported():
    with (
        WorkerProcess((sys.executable, "-c", "input(); raise SystemExit(3)"), threads=1) as worker,
        pytest.raises(KernelError, match="was to load a model ended with code 3"),
    ):
        worker.ask(do="load")


def test_what_libraries_print_is_not_taken_for_an_answer():
    program = (
        "import fewbit.bench.worker as w; w.Worker.answer = lambda *_: print('noise') or {'a': 1}; w.main()"
    )
    with WorkerProcess((sys.executable, "-c", program), threads=1) as worker:
        assert worker.ask(do="memory") == {"a": 1}
