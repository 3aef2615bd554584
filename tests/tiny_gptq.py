"""Tiny random models as GPTQ checkpoints, in the styles of the tools that write them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from fewbit.checkpoint import layout
from fewbit.quantized_matrix import QuantizedMatrix, group_count, sequential_groups


def random_codes(out_features, in_features, bits=4, group_size=32, *, order=False, sym=False, seed=0):
    """Random codes around their zero points, as trained weights are."""
    g = torch.Generator().manual_seed(seed)
    groups = group_count(in_features, group_size)
    g_idx = sequential_groups(in_features, group_size)
    if order:
        g_idx = g_idx[torch.randperm(in_features, generator=g)]
    top = 2**bits
    zeros = torch.full((out_features, groups), top // 2, dtype=torch.int16)
    if not sym:
        zeros = torch.randint(1, top, (out_features, groups), generator=g, dtype=torch.int16)
    return QuantizedMatrix(
        codes=torch.randint(0, top, (out_features, in_features), generator=g, dtype=torch.uint8),
        scales=((torch.rand(out_features, groups, generator=g) + 0.5) * 0.16 / top).half(),
        zeros=zeros,
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
    )


def llama(tie=False, **changes):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 200,
        "tie_word_embeddings": tie,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=96, n_layer=1, n_head=4, vocab_size=200, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=96,
        ffn_dim=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=200,
        max_position_embeddings=64,
        word_embed_proj_dim=96,
    )
    return OPTForCausalLM(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        d_model=96, d_kv=24, d_ff=192, num_layers=1, num_heads=4, vocab_size=200, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


FAMILIES = {"llama": llama, "gpt2": gpt2, "opt": opt, "t5": t5}


def write_checkpoint(
    folder,
    model,
    *,
    bits=4,
    group_size=32,
    fmt="gptq",
    order=False,
    lm_head=False,
    override=None,
    quantization=None,
    without=(),
    change=None,
    legacy=False,
    shards=1,
):
    """Quantize `model`'s linear layers at random, in place, and write the checkpoint.

    `model` then has the dequantized weights: the truth for the loaded one. Returns the tensors written.

    Args:
        override: ending of a layer's name → (bits, group_size).
        without: short names of tensors to leave out. change: (name, tensors) → tensors of one layer.
        legacy: AutoGPTQ's file names, and the settings in quantize_config.json only.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict())
    for name in model.all_tied_weights_keys:
        tensors.pop(name, None)
    head = model.get_output_embeddings()
    for seed, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, (nn.Linear, Conv1D)) or (module is head and not lm_head):
            continue
        settings = next((v for k, v in (override or {}).items() if name.endswith(k)), (bits, group_size))
        shape = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        codes = random_codes(*shape, *settings, order=order, seed=seed)
        weight = codes.dequantize()
        module.weight = nn.Parameter(weight.t().contiguous() if isinstance(module, Conv1D) else weight)
        packed = {k: v for k, v in layout.pack(codes, fmt).items() if k not in without}
        tensors.pop(f"{name}.weight", None)
        tensors |= {f"{name}.{k}": v for k, v in (change(name, packed) if change else packed).items()}
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": False,
        "desc_act": order,
        "checkpoint_format": fmt,
        "lm_head": lm_head,
    } | (quantization or {})
    _write(folder, model, tensors, settings, legacy, shards)
    return tensors


def _write(folder, model, tensors, settings, legacy, shards):
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["dtype"] = "float32"
    config["architectures"] = [type(model).__name__]
    if legacy:
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    else:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    stem = f"gptq_model-{settings['bits']}bit-{settings['group_size']}g" if legacy else "model"
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        mine = names[i::shards]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def logits(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (2, 9), generator=g)
    extra = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits.float()


def alike(found, truth):
    """Whether two models give the same logits, up to float32 rounding in the kernels."""
    a, b = logits(found), logits(truth)
    return bool((a - b).norm() < 1e-4 * b.norm())
