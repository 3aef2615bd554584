"""Options of `fewbit.load` that cost nothing but memory: joined layers, an 8-bit copy of the output layer."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fewbit
from fewbit import native
from fewbit.errors import ConfigError
from fewbit.kernels.cpu.lm_head import Int8LMHead, round_to_8_bits
from fewbit.kernels.cpu.merged import MergedCpuKernel, merge_layers
from fewbit.kernels.cpu.packed import dequantize_packed
from fewbit.kernels.linear import QuantLinear
from tiny_gptq import FAMILIES, llama, logits, random_codes, write_checkpoint

pytestmark = pytest.mark.skipif(
    not native.available(), reason=native.unsupported_reason() or "compiled module"
)


def decode(model, steps=4):
    """Logits of single tokens, which is where layers are joined."""
    with torch.inference_mode():
        out = model(torch.tensor([[5, 9, 2]]), use_cache=True)
        found = [out.logits]
        for step in range(steps):
            out = model(torch.tensor([[7 + step]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, dim=1)


def close(found, expected, share):
    return (found - expected).float().norm() <= share * expected.float().norm()


@pytest.mark.parametrize("kernel", ["cpu", "cpu_a8"])
@pytest.mark.parametrize("order", [False, True])
def test_merged_layers_give_the_same_numbers(tmp_path, kernel, order):
    write_checkpoint(tmp_path, llama(), order=order)
    apart = fewbit.load(tmp_path, dtype="float32", kernel=kernel, fuse=False)
    joined = fewbit.load(tmp_path, dtype="float32", kernel=kernel, fuse=True)
    fused = [m for m in joined.modules() if isinstance(getattr(m, "kernel", None), MergedCpuKernel)]
    assert len(fused) == 14
    assert {m.kernel.name for m in fused} == {kernel}
    merged = [m for m in fused if m.kernel.merged.weight.out_features > m.out_features]
    assert len(merged) == (0 if order else 10)  # with act-order every layer has an order of its own
    # Norms and attention sum in another order; an activation that is rounded to 8 bits may fall to the other side.
    share = 1e-5 if kernel == "cpu" else 5e-3
    assert close(decode(joined), decode(apart), share)
    for same in (
        copy.deepcopy(joined),
        pickle.loads(pickle.dumps(joined)),
    ):  # their attention is torch's again
        assert close(decode(same), decode(apart), share)


@pytest.mark.parametrize("kernel", ["cpu", "cpu_a8"])
def test_merged_layers_of_all_sizes_and_zero_points(kernel):
    module = nn.Module()
    for seed, (name, outputs, sym) in enumerate(
        [("q_proj", 32, True), ("k_proj", 48, False), ("v_proj", 37, True)]
    ):
        layer = QuantLinear.from_codes(random_codes(outputs, 100, 4, 24, sym=sym, seed=seed))
        layer.prepare(kernel)
        module.add_module(name, layer)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(1, 1, 100)
    with torch.no_grad():
        apart = [layer(x) for layer in module.children()]
        assert merge_layers(module) == 2
        joined = [layer(x) for layer in module.children()]
    merged = module.q_proj.kernel.merged.weight
    assert merged.out_features == 117
    assert merged.scales.shape == merged.zeros.shape == (2 + 3 + 3, 5, 16)
    assert module.v_proj.block_scales.data_ptr() == merged.scales[5].data_ptr()  # a part of it, not a copy
    for a, b in zip(apart, joined, strict=True):
        torch.testing.assert_close(a, b)
    for layer in module.children():
        layer.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_what_is_done_by_default_is_on_record(tmp_path, caplog):
    write_checkpoint(tmp_path, llama())
    with caplog.at_level("INFO"):
        fewbit.load(tmp_path, dtype="float32")
        assert "fused: 6 calls saved" in caplog.text
        assert "output layer: as it is, the model is in float32" in caplog.text
        caplog.clear()
        fewbit.load(tmp_path, dtype="bfloat16", kernel="auto_a16")
        assert "output layer: as it is, kernel auto_a16 rounds nothing" in caplog.text


@pytest.mark.parametrize(("bits", "head"), [(2, 8), (3, 8), (4, 8), (8, 16)])
def test_the_head_runs_in_8_bits_where_that_costs_little(bits, head, tmp_path):
    write_checkpoint(tmp_path, llama(), bits=bits)
    for dtype in ("bfloat16", "float16"):
        found = fewbit.load(tmp_path, dtype=dtype).lm_head
        assert isinstance(found, Int8LMHead) == (head == 8)
        assert type(fewbit.load(tmp_path, dtype=dtype, lm_head_runtime=16).lm_head) is nn.Linear


def test_merged_layers_save_and_cast(tmp_path):
    written = write_checkpoint(tmp_path / "a", llama())
    joined = fewbit.load(tmp_path / "a", dtype="bfloat16", fuse=True)
    joined.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[name], written[name]) for name in saved if name.endswith("qweight"))
    joined.model.to(torch.float32)
    assert not any(isinstance(getattr(m, "kernel", None), MergedCpuKernel) for m in joined.modules())


def test_merged_layers_in_any_order(tmp_path):
    write_checkpoint(tmp_path, llama())
    joined = fewbit.load(tmp_path, dtype="float32", fuse=True).model.layers[0].self_attn
    apart = fewbit.load(tmp_path, dtype="float32", fuse=False).model.layers[0].self_attn
    x = torch.randn(1, 1, joined.q_proj.in_features)
    for names in (
        ["v_proj", "q_proj", "k_proj"],
        ["k_proj"],
        ["q_proj", "q_proj"],
        ["q_proj", "v_proj", "k_proj"],
    ):
        for name in names:
            with torch.no_grad():
                assert torch.equal(getattr(joined, name)(x), getattr(apart, name)(x))
                x += 0.5  # in place: what was computed before is of no use
    assert joined.q_proj.kernel.merged.pending is None or len(joined.q_proj.kernel.merged.pending) == 3


def test_merged_layers_with_biases(tmp_path):
    truth = FAMILIES["qwen2"]() if "qwen2" in FAMILIES else llama(attention_bias=True)
    write_checkpoint(tmp_path, truth)
    apart, joined = fewbit.load(tmp_path, fuse=False), fewbit.load(tmp_path)
    for model in (apart, joined):
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.bias"):
                parameter.data += 1.0
    assert close(decode(joined), decode(apart), 1e-5)


def test_the_head_in_8_bits(tmp_path):
    for tie in (False, True):
        folder = tmp_path / str(tie)
        write_checkpoint(folder, llama(tie=tie))
        model, small = fewbit.load(folder), fewbit.load(folder, lm_head_runtime=8)
        assert isinstance(small.lm_head, Int8LMHead)
        a, b = logits(model), logits(small)
        assert 0 < (a - b).norm() < 6e-3 * a.norm()
        assert (small.lm_head.weight is small.get_input_embeddings().weight) == tie
        assert small.state_dict().keys() == model.state_dict().keys()
        small.save_pretrained(folder / "again")
        assert torch.equal(logits(fewbit.load(folder / "again")), a)


def test_the_head_in_8_bits_compiles_to_one_graph(tmp_path):
    write_checkpoint(tmp_path, llama())
    head = fewbit.load(tmp_path, lm_head_runtime=8).lm_head
    x = torch.randn(2, head.in_features)
    with torch.no_grad():
        assert torch.equal(torch.compile(head, fullgraph=True, backend="aot_eager")(x), head(x))


def test_a_changed_head_is_not_copied(tmp_path):
    write_checkpoint(tmp_path, llama())
    small = fewbit.load(tmp_path, lm_head_runtime=8)
    with torch.no_grad():
        small.lm_head.weight.mul_(2.0)
    exact = fewbit.load(tmp_path)
    exact.lm_head.weight.data.mul_(2.0)
    assert torch.equal(logits(small), logits(exact))


@pytest.mark.parametrize("body_is_trained", [False, True])
def test_a_trained_head_gets_its_gradient(tmp_path, body_is_trained):
    write_checkpoint(tmp_path, llama())
    head = fewbit.load(tmp_path, lm_head_runtime=8).lm_head
    x = torch.randn(2, head.in_features, requires_grad=body_is_trained)
    head(x).sum().backward()
    torch.testing.assert_close(head.weight.grad, x.detach().sum(0).expand_as(head.weight))


@pytest.mark.parametrize("shape", [(7, 100), (5000, 64), (33, 1)])
def test_rounding_to_8_bits(shape):
    weight = torch.randn(shape)
    weight[0] = 0
    found = dequantize_packed(*round_to_8_bits(weight), torch.float32)
    groups = weight.abs().split(64, dim=1)
    step = torch.cat([g.amax(1, keepdim=True).expand_as(g) / 127 for g in groups], dim=1)
    assert (
        (found - weight).abs() <= step * 0.76
    ).all()  # half a step, and a bfloat16 scale at the largest code


def test_unsupported_heads(tmp_path):
    write_checkpoint(tmp_path / "a", llama())
    with pytest.raises(ConfigError, match=r"lm_head_runtime must be 8, 16 or 'auto', got 4"):
        fewbit.load(tmp_path / "a", lm_head_runtime=4)
    write_checkpoint(tmp_path / "b", llama(), lm_head=True)
    with pytest.raises(ConfigError, match=r"quantized in the checkpoint"):
        fewbit.load(tmp_path / "b", lm_head_runtime=8)
    from fewbit.kernels.cpu.lm_head import add_int8_lm_head

    with pytest.raises(ConfigError, match=r"Linear has no output layer"):
        add_int8_lm_head(nn.Linear(3, 3), 8)
