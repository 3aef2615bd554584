import dataclasses

import pytest
import torch

from fewbit import native
from fewbit.errors import KernelError
from fewbit.kernels import registry
from fewbit.kernels.spec import KernelSpec

SPEC = KernelSpec(bits=4, group_size=64, sym=True, act_order=False, in_features=256, out_features=128)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reasons(spec=SPEC, device=CPU, dtype=torch.bfloat16):
    return dict(registry.explain(spec, device, dtype))


def test_auto_takes_the_first_kernel_that_fits():
    kernel, tried = registry.choose(SPEC, CPU, torch.bfloat16)
    assert (kernel.name, tried) == ("cpu", (("cpu", None),))
    kernel, tried = registry.choose(SPEC, CPU, torch.float64)
    assert kernel.name == "reference"
    assert "activations are float64, not float32, float16 or bfloat16" in tried[0][1]
    assert tried[1] == ("triton", "device is cpu, not cuda or xpu")


def test_auto_a16_keeps_16_bit_activations():
    kernel, tried = registry.choose(SPEC, CPU, torch.bfloat16, "auto_a16")
    assert (kernel.name, tried) == ("cpu_a16", (("cpu_a16", None),))
    kernel, _ = registry.choose(SPEC, CPU, torch.float64, "auto_a16")
    assert kernel.name == "reference"


def test_reference_runs_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "the compiled module cannot be imported"))
    kernel, tried = registry.choose(SPEC, CPU, torch.bfloat16)
    assert (kernel.name, tried[0]) == ("reference", ("cpu", "the compiled module cannot be imported"))


@pytest.mark.parametrize(
    ("change", "device", "words"),
    [({"kind": "conv2d"}, CPU, "the layer is a conv2d"), ({}, CUDA, "device is cuda, not cpu")],
)
def test_a_named_kernel_says_why_it_cannot_run(change, device, words):
    spec = dataclasses.replace(SPEC, **change)
    assert words in reasons(spec, device)["cpu"]
    with pytest.raises(
        KernelError, match=rf"kernel 'cpu' cannot run .*{words}.*Kernels that can: .*reference"
    ):
        registry.choose(spec, device, torch.bfloat16, "cpu")


def test_names_of_other_tools():
    assert [kernel.name for kernel in registry.resolve("gptq_marlin")] == ["marlin"]
    assert [kernel.name for kernel in registry.resolve("exllama_v2")] == ["exllamav2"]
    assert registry.resolve("AUTO_TRAINABLE") == registry.resolve("auto")
    assert [kernel.name for kernel in registry.resolve("auto")] == ["cpu", "triton", "reference"]
    with pytest.raises(
        KernelError, match=r"vllm is an engine, not a kernel: it serves the checkpoint's folder"
    ):
        registry.resolve("vllm")


def test_torch_is_the_reference_kernel():
    for name in ("torch", "gptq_torch"):
        assert registry.choose(SPEC, CPU, torch.bfloat16, name)[0].name == "reference"
    with pytest.raises(KernelError, match=r"kernel 'reference' cannot run .*activations are torch.int8"):
        registry.choose(SPEC, CPU, torch.int8, "torch")


def test_unknown_names():
    with pytest.raises(
        KernelError, match=r"there is no kernel 'fast'; use auto or one of cpu, triton, reference"
    ):
        registry.choose(SPEC, CPU, torch.bfloat16, "fast")
    with pytest.raises(KernelError, match=r"there is no kernel 'marlins'"):
        registry.get("marlins")


def test_nothing_fits():
    with pytest.raises(
        KernelError, match=r"no kernel can run this layer: cpu: .*triton: .*reference: .*int8"
    ):
        registry.choose(SPEC, CPU, torch.int8)
