import dataclasses
import importlib.util

import pytest
import torch

from fewbit.errors import KernelError
from fewbit.runtime import registry
from fewbit.runtime.kernel import KernelSpec

SPEC = KernelSpec(bits=4, group_size=64, sym=True, act_order=False, in_features=256, out_features=128)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reasons(spec=SPEC, device=CPU, dtype=torch.bfloat16):
    return dict(registry.explain(spec, device, dtype))


def test_auto_takes_the_first_that_fits_and_keeps_why_others_do_not():
    kernel, tried = registry.choose(SPEC, CPU, torch.bfloat16)
    assert (kernel.name, tried) == ("torch_int4", (("torch_int4", None),))
    kernel, tried = registry.choose(SPEC, CPU, torch.float32)
    assert kernel.name == "reference"
    assert "float32" in tried[0][1]
    assert "dtype=torch.bfloat16" in tried[0][1]


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
    with pytest.raises(KernelError, match=r"kernel 'torch_int4' cannot run .*Kernels that can: reference"):
        registry.choose(dataclasses.replace(SPEC, **change), CPU, torch.bfloat16, "torch_int4")


def test_int4_refuses_other_devices():
    assert reasons(device=CUDA)["torch_int4"] == "device is cuda, not cpu"


@pytest.mark.parametrize("name", ["marlin", "machete", "exllama", "exllamav2"])
def test_providers_say_which_condition_fails_first(name, monkeypatch):
    assert reasons()[name] == "device is cpu, not cuda"
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert "is not installed" in reasons(device=CUDA)[name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    assert reasons(device=CUDA)[name] == "fewbit does not wrap it yet"
    with pytest.raises(KernelError, match=f"kernel '{name}' cannot run .*device is cpu, not cuda"):
        registry.choose(SPEC, CPU, torch.bfloat16, name)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("marlin", {"bits": 3}, "bits 3 is not 4 or 8"),
        ("marlin", {"group_size": 256}, "group_size 256 is not one of -1, 32, 64, 128"),
        ("marlin", {"sym": False}, "asymmetric"),
        ("marlin", {"out_features": 96}, "shape 96 x 256 (out x in) is not a multiple of 64 x 128"),
        ("machete", {"group_size": 32}, "group_size 32"),
        ("exllamav2", {"bits": 8}, "bits 8 is not 4"),
        ("exllama", {"in_features": 80}, "shape 128 x 80"),
        ("marlin", {"kind": "conv2d"}, "the layer is a conv2d"),
    ],
)
def test_providers_conditions(name, change, words):
    assert words in reasons(dataclasses.replace(SPEC, **change), CUDA)[name]


def test_unknown_names():
    with pytest.raises(
        KernelError, match=r"there is no kernel 'fast'; use auto or one of torch_int4, reference"
    ):
        registry.choose(SPEC, CPU, torch.bfloat16, "fast")
    with pytest.raises(KernelError, match=r"there is no kernel 'marlins'"):
        registry.get("marlins")


def test_nothing_fits():
    with pytest.raises(KernelError, match=r"no kernel can run this layer: torch_int4: .*reference: .*int8"):
        registry.choose(SPEC, CPU, torch.int8)
