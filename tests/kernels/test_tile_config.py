"""How a Triton product is cut up, tuning with Triton's autotuner, and the self-check before "auto" takes the kernel."""

import pytest
import torch
from test_triton import fragments_of, layer_of, relative

from fewbit.kernels import registry
from fewbit.kernels.spec import KernelSpec
from fewbit.kernels.triton import kernel as triton_kernel
from fewbit.kernels.triton.kernel import TritonKernel, self_check
from fewbit.kernels.triton.tile_config import candidates, heuristic_config, problem_key, shared_bytes
from tiny_gptq import random_codes

pytest.importorskip("triton", reason="pip install triton")

from fewbit.kernels.triton import kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_cached_checks():
    self_check.cache_clear()
    kernels._tuner.cache_clear()
    yield
    self_check.cache_clear()
    kernels._tuner.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("outputs", [32, 4096, 152_064])
def test_heuristic_config_fits_shared_memory(dtype, bits, outputs):
    for tokens in (1, 2, 3, 8, 16, 17, 64, 128):
        config = heuristic_config(problem_key(tokens, outputs, 14336, bits, 128, dtype))
        assert config.path in ("gemv", "gemm")
        assert 0 < shared_bytes(config, bits) <= 80 << 10
        assert dtype != torch.float32 or config.path == "gemv"  # tensor cores would round


def test_heuristic_config_depends_on_sizes():
    def config(tokens, outputs=4096):
        return heuristic_config(problem_key(tokens, outputs, 4096, 4, 128, torch.float16))

    assert config(3) == config(4) != config(9)
    assert config(1).split < config(1, outputs=1024).split
    assert config(256).path == "dense"


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 2048])
def test_candidates_share_path_and_split(tokens):
    for outputs in (512, 14336):
        key = problem_key(tokens, outputs, 4096, 4, 128, torch.float16)
        found = candidates(key)
        assert found[0] == heuristic_config(key)
        assert len({(config.path, config.split) for config in found}) == 1
        assert len(set(found)) == len(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_tuning_takes_the_fastest_candidate(monkeypatch, tokens):
    from triton.runtime.autotuner import Autotuner

    layer = layer_of(random_codes(48, 256, 4, 64))
    x = torch.randn(tokens, 256).half()
    truth = x.double() @ layer.codes().dequantize(torch.float64).t()
    weight, scales = fragments_of(layer), layer.scales
    configs = candidates(problem_key(tokens, 48, 256, 4, weight.group, x.dtype))
    timed = []

    def bench(tuner, call, quantiles):
        call()
        timed.append(call)
        return [1.0 if len(timed) == 2 else 2.0] * 3

    monkeypatch.setattr(Autotuner, "do_bench", bench)
    # Nothing can be timed here, so the heuristic decides.
    assert torch.equal(
        kernels.multiply(x, weight, scales, 4), kernels.multiply(x, weight, scales, 4, configs[0])
    )
    assert not timed
    monkeypatch.setattr(kernels, "_can_tune", lambda: True)
    found = kernels.multiply(x, weight, scales, 4)
    assert len(timed) == len(configs)
    assert relative(found, truth) < 2e-3
    # What was chosen once is used where nothing can be timed, such as in a CUDA graph.
    monkeypatch.setattr(kernels, "_can_tune", lambda: False)
    assert torch.equal(kernels.multiply(x, weight, scales, 4), found)
    assert torch.equal(kernels.multiply(x, weight, scales, 4, configs[1]), found)
    assert len(timed) == len(configs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_self_check_passes_a_correct_kernel(dtype):
    assert self_check(CPU, 4, dtype) is None


def test_self_check_finds_wrong_numbers_and_runs_once(monkeypatch, caplog):
    calls = []

    def wrong(x, weight, scales, bits, config):
        calls.append(config)
        return torch.zeros(x.shape[0], scales.shape[1], dtype=x.dtype)

    monkeypatch.setattr(kernels, "multiply", wrong)
    reasons = {self_check(CPU, 8, torch.float16) for _ in range(3)}
    assert reasons == {"its self-check on cpu failed (error 1.0e+00 at 1 tokens)"}
    assert len(calls) == 1
    assert caplog.text.count("the reference kernel, which is slow, takes its place") == 1


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), OSError("no nvcc\nat all")])
def test_self_check_reports_errors_of_the_driver(monkeypatch, error):
    def broken(*args):
        raise error

    monkeypatch.setattr(kernels, "multiply", broken)
    found = self_check(CPU, 2, torch.float16)
    assert found == f"its self-check on cpu failed ({type(error).__name__}: {str(error).splitlines()[0]})"


def test_auto_takes_the_kernel_only_after_the_check(monkeypatch):
    spec = KernelSpec(4, 128, True, False, 256, 128)
    monkeypatch.setattr(triton_kernel, "self_check", lambda device, bits, dtype: None)
    assert registry.choose(spec, CUDA, torch.float16)[0].name == "triton"
    reason = "its self-check on cuda failed (x)"
    monkeypatch.setattr(triton_kernel, "self_check", lambda device, bits, dtype: reason)
    kernel, reasons = registry.choose(spec, CUDA, torch.float16)
    assert kernel.name == "reference"
    assert ("triton", reason) in reasons
    # By name, it runs without.
    assert isinstance(registry.choose(spec, CUDA, torch.float16, "triton")[0], TritonKernel)
