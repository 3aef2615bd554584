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


def test_auto_takes_the_first_that_fits_and_keeps_why_others_do_not():
    kernel, tried = registry.choose(SPEC, CPU, torch.bfloat16)
    assert (kernel.name, tried) == ("cpu", (("cpu", None),))
    kernel, tried = registry.choose(SPEC, CPU, torch.float64)
    assert kernel.name == "reference"
    assert "activations are float64, not float32, float16 or bfloat16" in tried[0][1]
    assert "dtype=torch.bfloat16" in tried[1][1]


def test_who_asks_for_16_bit_activations_gets_them():
    kernel, tried = registry.choose(SPEC, CPU, torch.bfloat16, "auto_a16")
    assert (kernel.name, tried) == ("cpu_a16", (("cpu_a16", None),))
    kernel, _ = registry.choose(SPEC, CPU, torch.float64, "auto_a16")
    assert kernel.name == "reference"


def test_without_the_compiled_module_torch_has_a_kernel(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "the compiled module cannot be imported"))
    kernel, tried = registry.choose(SPEC, CPU, torch.bfloat16)
    assert (kernel.name, tried[0]) == ("torch_int4", ("cpu", "the compiled module cannot be imported"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out_features": 24}, "out_features 24 is not a multiple of 16"),
        ({"group_size": 48}, "group_size 48 with in_features 256: not multiples of 32"),
        ({"group_size": -1, "in_features": 40}, "not multiples of 32"),
        ({"act_order": True, "even_groups": False}, "g_idx gives some groups more or fewer"),
        ({"kind": "conv2d"}, "the layer is a conv2d"),
    ],
)
def test_int4_refuses(change, words):
    assert words in reasons(dataclasses.replace(SPEC, **change))["torch_int4"]
    with pytest.raises(KernelError, match=r"kernel 'torch_int4' cannot run .*Kernels that can: .*reference"):
        registry.choose(dataclasses.replace(SPEC, **change), CPU, torch.bfloat16, "torch_int4")


def test_int4_refuses_other_devices():
    assert reasons(device=CUDA)["torch_int4"] == "device is cuda, not cpu"


def test_names_of_other_tools():
    assert [kernel.name for kernel in registry.meant("gptq_marlin")] == ["marlin"]
    assert [kernel.name for kernel in registry.meant("exllama_v2")] == ["exllamav2"]
    assert registry.meant("AUTO_TRAINABLE") == registry.meant("auto")
    assert [kernel.name for kernel in registry.meant("auto")] == ["cpu", "torch_int4", "triton", "reference"]
    with pytest.raises(
        KernelError, match=r"vllm is an engine, not a kernel: it serves the checkpoint's folder"
    ):
        registry.meant("vllm")


def test_torch_is_the_better_of_the_two_that_fit():
    assert registry.choose(SPEC, CPU, torch.bfloat16, "torch")[0].name == "torch_int4"
    kernel, tried = registry.choose(SPEC, CPU, torch.float32, "gptq_torch")
    assert (kernel.name, tried[0][0]) == ("reference", "torch_int4")
    with pytest.raises(KernelError, match=r"no kernel can run this layer: torch_int4: .*; reference: "):
        registry.choose(SPEC, CPU, torch.int8, "torch")


def test_unknown_names():
    with pytest.raises(
        KernelError, match=r"there is no kernel 'fast'; use auto or one of cpu, torch_int4, triton, reference"
    ):
        registry.choose(SPEC, CPU, torch.bfloat16, "fast")
    with pytest.raises(KernelError, match=r"there is no kernel 'marlins'"):
        registry.get("marlins")


def test_nothing_fits():
    with pytest.raises(
        KernelError, match=r"no kernel can run this layer: cpu: .*torch_int4: .*reference: .*int8"
    ):
        registry.choose(SPEC, CPU, torch.int8)
