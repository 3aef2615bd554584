"""Which tiles are taken: the rule, the measured choice, its file, and the self-check before "auto" takes the kernel."""

import json
import logging
import threading
from dataclasses import asdict

import pytest
import torch

from fewbit.kernels import registry
from fewbit.kernels.spec import KernelSpec
from fewbit.kernels.triton.kernel import TritonKernel

pytest.importorskip("triton", reason="pip install triton")

from fewbit.kernels.triton import autotune as triton_choice
from fewbit.kernels.triton import kernels as triton_products
from fewbit.kernels.triton import self_check as triton_check
from fewbit.kernels.triton.autotune import Job, Tuner, candidates, job, rule

JOB = job(1, 4096, 14336, 4, 128, torch.float16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def tuner(folder, machine="H200, fewbit 1, triton 3", usable=True):
    return Tuner(folder, lambda: machine, lambda: usable)


def fastest(wanted, measured=None):
    """Seconds by which `wanted` is best; the tiles that were asked for go into `measured`."""

    def seconds(tiles):
        if measured is not None:
            measured.append(tiles)
        return 1.0 if tiles == wanted else 2.0

    return seconds


def never(tiles):
    raise AssertionError(f"{tiles} was measured")


def test_tokens_are_rounded_up_to_powers_of_two():
    assert [job(n, 1, 1, 4, 0, torch.float16).tokens for n in (1, 2, 3, 16, 17, 2048, 9999)] == [
        1,
        2,
        4,
        16,
        32,
        2048,
        4096,
    ]
    assert JOB.dtype == "float16"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("outputs", [1, 1024, 4096, 14336, 28672])
def test_the_rule_fills_a_gpu_and_is_among_the_candidates(outputs, dtype):
    for tokens in (1, 2, 8, 16, 32, 64, 128, 512, 4096):
        found = job(tokens, outputs, 4096, 4, 128, dtype)
        tiles = rule(found)
        assert tiles in candidates(found)
        assert len(set(candidates(found))) == len(candidates(found))
        if tiles.path == "few" and tokens <= 16 and outputs >= 1024:
            programs = -(-outputs // 32 // tiles.tiles) * tiles.split
            assert programs * tiles.warps >= 512  # four warps a multiprocessor at least
        assert tiles.path != "many" or dtype != torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_rule_fits_into_the_shared_memory_of_any_gpu(bits):
    for tokens in (1, 2, 8, 16, 32, 64, 128, 512):
        for outputs in (32, 1024, 4096, 28672):
            for dtype in (torch.float16, torch.float32):
                tiles = rule(job(tokens, outputs, 4096, bits, 128, dtype))
                assert triton_choice.shared_bytes(tiles, bits) <= 80 << 10
                assert min(tiles.tokens, tiles.tiles, tiles.warps, tiles.split) >= 1
                assert tiles.stages >= 2


def test_a_candidate_that_computes_other_numbers_is_refused():
    expected = torch.randn(4, 8)
    triton_choice.check_same(expected * 1.001, expected)
    triton_choice.check_same(torch.zeros(2), torch.zeros(2))
    broken = torch.full((2,), float("nan"))
    triton_choice.check_same(broken, broken)  # the activations' fault
    for wrong in (expected * 1.1, expected.flip(0), expected * float("nan")):
        with pytest.raises(ValueError, match="it computes other numbers: they differ by"):
            triton_choice.check_same(wrong, expected)


def test_the_fastest_is_taken_measured_once_and_found_by_later_processes(tmp_path):
    wanted, measured = candidates(JOB)[2], []
    first = tuner(tmp_path)
    assert first.choose(JOB, fastest(wanted, measured)) == wanted
    assert tuple(measured) == candidates(JOB)
    assert first.choose(JOB, never) == wanted
    assert tuner(tmp_path).choose(JOB, never) == wanted
    other = job(16, 4096, 14336, 4, 128, torch.float16)
    tuner(tmp_path).choose(other, fastest(candidates(other)[1]))
    assert tuner(tmp_path).choose(JOB, never) == wanted
    assert tuner(tmp_path).choose(other, never) == candidates(other)[1]


def test_another_machine_or_version_measures_anew(tmp_path):
    tuner(tmp_path).choose(JOB, fastest(candidates(JOB)[1]))
    measured = []
    tuner(tmp_path, "H200, fewbit 2, triton 3").choose(JOB, fastest(rule(JOB), measured))
    assert measured
    assert tuner(tmp_path).choose(JOB, never) == candidates(JOB)[1]


def test_a_candidate_that_cannot_run_is_passed_over_and_kept_with_its_reason():
    def seconds(tiles):
        if tiles != candidates(JOB)[1]:
            raise RuntimeError("out of resource: shared memory\nmore")
        return 1.0

    found = tuner(None)
    assert found.choose(JOB, seconds) == candidates(JOB)[1]
    assert set(found.refused.values()) == {"out of resource: shared memory"}

    def fails(tiles):
        raise RuntimeError("no device")

    assert tuner(None).choose(JOB, fails) == rule(JOB)


@pytest.mark.parametrize(
    "content",
    [
        b"{ not json",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'{"H200, fewbit 1, triton 3": 5}',
        b'{"H200, fewbit 1, triton 3": [{"job": {}, "tiles": {"path": "few"}}]}',
        b'{"H200, fewbit 1, triton 3": [{"job": 1, "tiles": null}, null]}',
        json.dumps(
            {
                "H200, fewbit 1, triton 3": [
                    {"job": asdict(JOB) | {"tokens": "many"}, "tiles": asdict(rule(JOB))},
                    {"job": asdict(JOB) | {"outputs": 0}, "tiles": asdict(rule(JOB))},
                    # Right in form, but nothing that fewbit would ever have measured.
                    {"job": asdict(JOB), "tiles": asdict(rule(JOB)) | {"tokens": 1 << 20}},
                ]
            }
        ).encode(),
    ],
)
def test_a_damaged_file_is_said_once_counted_and_replaced(tmp_path, content, caplog):
    (tmp_path / "triton.json").write_bytes(content)
    found = tuner(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert found.choose(JOB, fastest(candidates(JOB)[1])) == candidates(JOB)[1]
    assert found.unreadable >= 1
    assert sum("cannot be read and is chosen anew" in record.message for record in caplog.records) == 1
    healed = tuner(tmp_path)
    assert healed.choose(JOB, never) == candidates(JOB)[1]
    assert healed.unreadable == 0


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = tuner(tmp_path / "file" / "folder")
    assert found.choose(JOB, fastest(candidates(JOB)[1])) == candidates(JOB)[1]
    assert found.choose(JOB, never) == candidates(JOB)[1]
    assert "a choice of tiles is not kept for later" in caplog.text


def test_nothing_is_measured_where_it_cannot_be(tmp_path):
    recording = tuner(tmp_path, usable=False)
    assert recording.choose(JOB, never) == rule(JOB)
    assert not list(tmp_path.iterdir())
    # What was measured before is used all the same.
    tuner(tmp_path).choose(JOB, fastest(candidates(JOB)[1]))
    assert tuner(tmp_path, usable=False).choose(JOB, never) == candidates(JOB)[1]
    assert not triton_choice.can_measure() or torch.cuda.is_available()


def test_deterministic_algorithms_take_the_rule(tmp_path):
    found = tuner(tmp_path)
    found.choose(JOB, fastest(candidates(JOB)[1]))
    torch.use_deterministic_algorithms(True)
    try:
        assert found.choose(JOB, never) == rule(JOB)
    finally:
        torch.use_deterministic_algorithms(False)


def test_processes_that_choose_at_once_lose_nothing(tmp_path):
    jobs = [job(2**i, 512, 512, 4, 128, torch.float16) for i in range(8)]
    threads = [
        threading.Thread(target=lambda j=j: tuner(tmp_path).choose(j, fastest(candidates(j)[-1])))
        for j in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    later = tuner(tmp_path)
    assert all(later.choose(j, never) == candidates(j)[-1] for j in jobs)


def test_forget(tmp_path):
    found = tuner(tmp_path)
    found.choose(JOB, fastest(candidates(JOB)[1]))
    found.forget()
    measured = []
    found.choose(JOB, fastest(rule(JOB), measured))
    assert measured


def test_the_processes_own_keeps_its_file_among_the_users_caches():
    assert triton_choice.tuner() is triton_choice.tuner()
    assert triton_choice.tuner.__wrapped__().folder == triton_choice.cache_folder()
    assert "fewbit" in str(triton_choice.cache_folder())
    assert "triton" in triton_choice.machine()
    assert isinstance(JOB, Job)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_self_check_passes_a_right_kernel(dtype):
    assert triton_check.problem(CPU, 4, dtype) is None


def test_the_self_check_finds_wrong_numbers_and_is_made_once(monkeypatch, caplog):
    calls = []

    def wrong(x, weight, scales, bits, tiles):
        calls.append(tiles)
        return torch.zeros(x.shape[0], scales.shape[1], dtype=x.dtype)

    monkeypatch.setattr(triton_products, "multiply", wrong)
    triton_check.problem.cache_clear()
    try:
        reasons = {triton_check.problem(CPU, 8, torch.float16) for _ in range(3)}
    finally:
        triton_check.problem.cache_clear()
    assert reasons == {"its self-check on cpu failed (error 1.0e+00 at 1 tokens)"}
    assert len(calls) == 1
    assert (
        len(
            [r for r in caplog.records if "the reference kernel, which is slow, takes its place" in r.message]
        )
        == 1
    )


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), OSError("no nvcc\nat all")])
def test_the_self_check_survives_what_a_driver_may_do(monkeypatch, error):
    def broken(*args):
        raise error

    monkeypatch.setattr(triton_products, "multiply", broken)
    triton_check.problem.cache_clear()
    try:
        found = triton_check.problem(CPU, 2, torch.float16)
    finally:
        triton_check.problem.cache_clear()
    assert found == f"its self-check on cpu failed ({type(error).__name__}: {str(error).splitlines()[0]})"


def test_auto_takes_it_after_the_check_and_the_reference_kernel_otherwise(monkeypatch):
    spec = KernelSpec(4, 128, True, False, 256, 128)
    monkeypatch.setattr(triton_check, "problem", lambda device, bits, dtype: None)
    assert registry.choose(spec, CUDA, torch.float16)[0].name == "triton"
    monkeypatch.setattr(
        triton_check, "problem", lambda device, bits, dtype: "its self-check on cuda failed (x)"
    )
    kernel, reasons = registry.choose(spec, CUDA, torch.float16)
    assert kernel.name == "reference"
    assert ("triton", "its self-check on cuda failed (x)") in reasons
    # By name, it runs without.
    assert isinstance(registry.choose(spec, CUDA, torch.float16, "triton")[0], TritonKernel)
