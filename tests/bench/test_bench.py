import sys

import pytest

from fewbit.bench.models import Candidate, WorkerProcess, measure_models
from fewbit.bench.timing import Times, in_turns, seconds_per_call
from fewbit.errors import KernelError
from tiny_gptq import llama, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_checkpoint(path / "quantized", llama())
    llama().save_pretrained(path / "original")
    return path


def test_turns_end_with_the_budget():
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


def test_short_work_is_averaged():
    calls = []
    measure = seconds_per_call(lambda: calls.append(0), at_least=0.001)
    before = len(calls)
    assert 0 < measure() < 0.001
    assert len(calls) - before > 10


@pytest.mark.slow
def test_each_model_has_its_own_process(folder):
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


def test_dead_worker():
    with (
        WorkerProcess((sys.executable, "-c", "input(); raise SystemExit(3)"), threads=1) as worker,
        pytest.raises(KernelError, match="was to load a model ended with code 3"),
    ):
        worker.ask(do="load")


def test_library_output_is_not_an_answer():
    program = (
        "import fewbit.bench.worker as w; w.Worker.answer = lambda *_: print('noise') or {'a': 1}; w.main()"
    )
    with WorkerProcess((sys.executable, "-c", program), threads=1) as worker:
        assert worker.ask(do="memory") == {"a": 1}
