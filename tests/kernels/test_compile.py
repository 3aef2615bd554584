"""A whole tiny decoder as one graph, for every kernel that runs here; and the form of every operator."""

import pytest
import torch

import fewbit
from fewbit.kernels import registry
from fewbit.kernels.linear import QuantLinear
from fewbit.kernels.spec import KernelSpec
from tiny_gptq import llama, random_codes, write_checkpoint

SPEC = KernelSpec(bits=4, group_size=32, sym=False, act_order=False, in_features=96, out_features=96)
ABLE = {name for name, reason in registry.explain(SPEC, "cpu", torch.bfloat16) if reason is None}
KERNELS = [kernel.name for kernel in registry.KERNELS if kernel.name in ABLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, llama())
    return path


@pytest.mark.parametrize(("kernel", "fuse"), [*((name, False) for name in KERNELS), ("cpu", True)])
def test_a_decoder_is_one_graph_and_gives_the_same(folder, kernel, fuse):
    # A compiler gets the model's own code.
    model, plain = (
        fewbit.load(folder, dtype="bfloat16", kernel=kernel, fuse=fused, lm_head_runtime=16)
        for fused in (fuse, False)
    )
    ids = torch.randint(0, 200, (2, 7), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits
        assert torch.equal(found, plain(input_ids=ids, use_cache=False).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_inductor_gives_nearly_the_same(folder, kernel):
    model = fewbit.load(folder, dtype="bfloat16", kernel=kernel)
    ids = torch.randint(0, 200, (1, 5), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, options={"emulate_precision_casts": True})
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits.float()
        wanted = model(input_ids=ids, use_cache=False).logits.float()
    assert (found - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_flow_through_the_graph(folder, kernel):
    model = fewbit.load(folder, dtype="bfloat16", kernel=kernel)
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        own = x.clone().requires_grad_()
        run(own).sum().backward()
        grads.append(own.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(("bits", "order"), [(2, False), (3, True), (4, True), (8, False)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_operators_are_well_formed(kernel, bits, order):
    """Schema, fake implementation, autograd and tracing of each operator that a product really calls."""
    layer = QuantLinear.from_codes(
        random_codes(32, 64, bits, 32, order=order),
        torch.randn(32, dtype=torch.bfloat16),
        compute_dtype=torch.bfloat16,
    )
    layer.prepare(kernel)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    calls = called_operators(lambda: layer(x).sum().backward())
    assert calls
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)


def called_operators(work):
    """(operator, arguments) of every call to one of fewbit's own while `work` runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fewbit":
                own = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
                if "linear" in func.__name__:
                    own[0].requires_grad_()
                calls.append((func, tuple(own)))
            return func(*args, **(kwargs or {}))

    with Recorder():
        work()
    return calls
