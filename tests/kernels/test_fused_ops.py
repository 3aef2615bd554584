"""Norms, gates and attention in one call each: against float64, on every instruction set, and inside models."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    Phi3Config,
    Qwen3Config,
)

import fewbit
from fewbit import native
from fewbit.errors import KernelError
from fewbit.hf.fuse import ATTENTION, merge_and_fuse
from fewbit.kernels.cpu.fused_ops import FusedGatedMLP, FusedRMSNorm
from models import random_sequences, tiny_model
from tiny_gptq import llama, write_checkpoint

pytestmark = pytest.mark.skipif(
    not native.available(), reason=native.unsupported_reason() or "compiled module"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETS = [isa for isa in native.instruction_sets() if isa != "avx512_bf16"]


def within_rounding(found, exact, scale=1.0):
    """Whether `found` is float64 `exact` up to a few units of its dtype (of `scale`, where sums cancel)."""
    unit = torch.finfo(found.dtype).eps
    return ((found.double() - exact).abs() <= 2 * unit * exact.abs() + 1.5 * unit * scale).all()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 576), (3, 7), (2, 5, 1000), (1, 1), (40, 2049)])
def test_rms_norm(shape, dtype, isa):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    with native.instruction_set(isa):
        assert within_rounding(native.rms_norm(x, weight, 1e-5), exact)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3072), (5, 14), (1, 2), (70, 1026)])
def test_silu_mul(shape, dtype, isa):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 8).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    with native.instruction_set(isa):
        assert within_rounding(native.silu_mul(x), gate / (1 + (-gate).exp()) * up, 1e-3)


def test_silu_of_extreme_numbers_is_torchs():
    gate = torch.tensor([-1e30, -300.0, -90.0, -87.5, -1e-30, 0.0, 88.5, 1e30, float("nan"), float("inf")])
    found = native.silu_mul(torch.cat([gate, torch.ones(10)]))
    torch.testing.assert_close(found, nn.functional.silu(gate), atol=1e-34, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "queries", "length", "size", "causal"),
    [
        (1, 9, 3, 1, 57, 64, False),
        (2, 4, 4, 1, 1, 16, False),
        (1, 6, 1, 1, 300, 80, False),
        (3, 2, 2, 1, 1000, 7, False),
        (1, 8, 2, 1, 513, 128, False),
        (1, 9, 3, 150, 150, 64, True),
        (2, 2, 1, 65, 65, 40, True),
        (1, 4, 4, 2, 2, 128, True),
        (2, 3, 3, 33, 129, 7, False),
    ],
)
def test_attention(batch, heads, key_heads, queries, length, size, causal, dtype, isa):
    torch.manual_seed(0)
    # As in a cache with room for more, and as projections give queries.
    keys, values = (torch.randn(batch, key_heads, length + 9, size).to(dtype)[:, :, :length] for _ in "kv")
    query = (torch.randn(batch, queries, heads, size) * 3).to(dtype).transpose(1, 2)
    with native.instruction_set(isa):
        found = native.attention(query, keys, values, size**-0.5, causal=causal)
    k, v = (t.double().repeat_interleave(heads // key_heads, dim=1) for t in (keys, values))
    scores = query.double() @ k.transpose(2, 3) / math.sqrt(size)
    if causal:
        scores = scores.masked_fill(torch.ones(queries, length).triu(1).bool(), float("-inf"))
    assert found.shape == (batch, queries, heads, size)
    assert within_rounding(found, (scores.softmax(-1) @ v).transpose(1, 2), 1e-5 / torch.finfo(dtype).eps)


def test_attention_far_from_zero():
    query = torch.full((1, 1, 70, 16), 30.0)
    keys = torch.linspace(-30, 30, 70)[None, None, :, None].expand(1, 1, 70, 16).contiguous()
    values = torch.arange(70.0)[None, None, :, None].expand(1, 1, 70, 16).contiguous()
    for causal in (True, False):
        expected = torch.arange(70.0) if causal else torch.full((70,), 69.0)
        found = native.attention(query, keys, values, 1.0, causal=causal)[0, :, 0]
        torch.testing.assert_close(found, expected[:, None].expand(70, 16))


def test_threads_do_not_change_numbers():
    torch.manual_seed(0)
    query, keys, values = torch.randn(2, 8, 1, 64), torch.randn(2, 4, 2000, 64), torch.randn(2, 4, 2000, 64)
    prompt = torch.randn(2, 8, 200, 64)
    x, before, found = torch.randn(300, 512), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append([
            native.attention(query, keys, values, 0.1), native.silu_mul(x), native.rms_norm(x, torch.ones(512), 1e-6),
            native.attention(prompt, keys, values, 0.1),
        ])  # fmt: skip
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


COMMON = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 200,
    "pad_token_id": 0,
}


def models_of(tmp_path, config, dtype="float32"):
    """The same checkpoint loaded plainly and fused."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)  # norms do nothing in new models
    write_checkpoint(tmp_path, model)
    return (fewbit.load(tmp_path, dtype=dtype, fuse=fuse) for fuse in (False, True))


def text(model, mask=None, **options):
    """Logits of single tokens after a prompt of two texts."""
    ids = torch.tensor([[5, 9, 2], [7, 1, 1]])
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.inference_mode():
        out = model(ids, attention_mask=mask, use_cache=True, **options)
        found = [out.logits[:, -1:]]
        for step in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            new = torch.full((2, 1), 11 + step)
            out = model(new, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return torch.cat(found, dim=1)


def counts(model):
    forwards = [vars(module).get("forward") for module in model.modules()]
    return (
        sum(isinstance(forward, FusedRMSNorm) for forward in forwards),
        sum(isinstance(forward, FusedGatedMLP) for forward in forwards),
        model.config._attn_implementation,
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AutoConfig.for_model("llama", **COMMON), (5, 2, "fewbit")),
        (Qwen3Config(**COMMON), (9, 2, "fewbit")),  # norms of queries and keys
        (Phi3Config(**COMMON), (5, 2, "fewbit")),  # gate and up in one matrix
        # 1 + weight, and gelu: left as they are. Its attention has a cap: eager, or torch's.
        (Gemma2Config(**COMMON), (0, 0, None)),
    ],
    ids=["llama", "qwen3", "phi3", "gemma2"],
)
def test_families(tmp_path, config, expected):
    plain, fused = models_of(tmp_path, config)
    assert counts(fused)[:2] == expected[:2]
    assert expected[2] in (None, counts(fused)[2])
    a, b = text(plain), text(fused)
    assert (a - b).norm() <= 1e-5 * a.norm()
    padded = torch.tensor([[1, 1, 1], [0, 0, 1]])
    a, b = text(plain, padded), text(fused, padded)
    assert (a - b).norm() <= 1e-5 * a.norm()


def test_fused_code_runs(tmp_path, monkeypatch):
    _, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    called = []
    for name in ("rms_norm", "silu_mul", "attention"):
        true = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, true=true, name=name, **k: called.append(name) or true(*a, **k)
        )
    text(fused)
    # Five passes: prompt and four tokens.
    assert {name: called.count(name) for name in called} == {
        "rms_norm": 25,
        "silu_mul": 10,
        "attention": 10,
    }


def test_calibration_uses_the_attention_and_gives_it_back(monkeypatch):
    calls, true = [], native.attention
    monkeypatch.setattr(native, "attention", lambda *a, **k: calls.append(1) or true(*a, **k))
    model = tiny_model("llama")
    assert model.config._attn_implementation == "sdpa"
    config = fewbit.QuantConfig(group_size=16, num_samples=3, seq_len=16)
    fewbit.quantize(model, config, dataset=random_sequences(3, 16))
    blocks = model.config.num_hidden_layers
    assert len(calls) == 2 * 3 * blocks  # both paths
    assert model.config._attn_implementation == "sdpa"


def test_gradients_and_hooks_use_the_models_code(tmp_path):
    plain, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    ids = torch.tensor([[5, 9, 2]])
    for model in (plain, fused):
        model(ids, labels=ids).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)
    seen = []
    handle = fused.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    text(fused)
    assert len(seen) == 5
    handle.remove()
    layer = fused.model.layers[1].mlp
    layer.gate_proj = nn.Linear(96, 192, bias=False)
    with torch.inference_mode():
        x = torch.randn(1, 1, 96)
        own = layer.down_proj(layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x))
        assert torch.equal(layer(x), own)


def test_fusing_does_not_change_what_is_saved(tmp_path):
    plain, fused = models_of(tmp_path / "a", AutoConfig.for_model("llama", **COMMON))
    plain.save_pretrained(tmp_path / "b")
    fused.save_pretrained(tmp_path / "c")
    assert (tmp_path / "b" / "config.json").read_text() == (tmp_path / "c" / "config.json").read_text()
    assert plain.state_dict().keys() == fused.state_dict().keys()


def test_cast_and_compiled(tmp_path):
    plain, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    a, b = text(plain.bfloat16()), text(fused.bfloat16())
    assert (a - b).norm() <= 0.05 * a.norm()
    with torch.no_grad():
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        ids = torch.tensor([[5, 9, 2]])
        expected = fused(ids, use_cache=False).logits
        found = compiled(ids, use_cache=False).logits
    assert (found - expected).norm() <= 0.05 * expected.norm()


def test_every_way_of_loading_is_fast_unless_told_otherwise(tmp_path):
    models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    assert counts(fewbit.load(tmp_path)) == (5, 2, "fewbit")
    assert counts(fewbit.load(tmp_path, kernel="reference"))[:2] == (0, 0)
    for fast, expected in ((True, (5, 2, "fewbit")), (False, (0, 0, "sdpa"))):
        fewbit.register(fast=fast)
        try:
            assert counts(AutoModelForCausalLM.from_pretrained(tmp_path)) == expected
        finally:
            fewbit.unregister()
    eager = fewbit.load(tmp_path, kernel="auto_trainable")
    assert counts(eager)[:2] == (0, 0)


def test_a_fused_model_can_be_copied_and_pickled(tmp_path):
    plain, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    expected = text(plain)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        fused.model.norm.weight.data.fill_(0.0)  # nothing of the copy refers to the original
        assert (text(again) - expected).norm() <= 1e-5 * expected.norm()


def test_continuous_batching_works(tmp_path):
    plain, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    prompts = [[5, 9, 2, 7], [7, 1], [3, 4, 5, 6, 7, 8, 9]]
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default transformers takes most of the memory for the cache.
    small = ContinuousBatchingConfig(max_batch_tokens=64, num_blocks=8, page_size=16)
    options = {"generation_config": config, "continuous_batching_config": small}
    found = [
        [one.generated_tokens for one in model.generate_batch(prompts, **options).values()]
        for model in (plain, fused)
    ]
    assert len(found[0]) == 3
    assert sorted(found[0]) == sorted(found[1])


def test_requests_that_follow_each_other_do_not_see_each_other(tmp_path):
    """Prompts in several parts, and answers, in the same batches."""
    plain, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (19, 1, 40, 7)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(max_batch_tokens=16, num_blocks=8, page_size=16)
    results = fused.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    found = {tuple(one.prompt_ids): one.generated_tokens for one in results.values()}
    for prompt in prompts:
        expected = plain.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert found[tuple(prompt)] == expected.tolist()
    assert fused.config._attn_implementation == ATTENTION


def test_other_calls_work_while_batches_run(tmp_path):
    plain, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    ids = torch.tensor([[0, 0, 7, 9, 4], [5, 6, 7, 8, 9]])
    options = {
        "attention_mask": (ids != 0).long(),
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": -1,
    }
    expected = plain.generate(ids, **options, pad_token_id=0)
    fused.init_continuous_batching()
    assert torch.equal(fused.generate(ids, **options, pad_token_id=0), expected)
    assert torch.equal(
        fused.generate(ids[1:], max_new_tokens=6, do_sample=False, eos_token_id=-1), expected[1:]
    )


def test_sliding_windows_keep_torchs_attention_in_batches(tmp_path):
    _, fused = models_of(tmp_path, AutoConfig.for_model("mistral", **COMMON, sliding_window=8))
    manager = fused.init_continuous_batching()
    assert fused.config._attn_implementation == "sdpa"
    assert manager.model is fused


def test_models_without_quantized_layers_are_unchanged():
    assert merge_and_fuse(llama()) == {"calls saved": 0}


def test_wrong_inputs_are_the_layers_errors(tmp_path):
    _, fused = models_of(tmp_path, AutoConfig.for_model("llama", **COMMON))
    with torch.inference_mode(), pytest.raises(KernelError, match=r"the layer takes .* \(…, 96\)"):
        fused.model.layers[0].mlp(torch.randn(1, 1, 95))
