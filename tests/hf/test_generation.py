"""`generate` gives the same tokens as transformers' own generate, with either cache."""

import pytest
import torch

import fewbit
from fewbit.hf.generate import generate
from models import tiny_model
from tiny_gptq import gpt2, llama, opt, t5, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(path, llama())
    return path


def prompts(*lengths, vocabulary=120):
    """Random prompts of these lengths, padded on the left with 0."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(
            3, vocabulary, (length,), generator=torch.Generator().manual_seed(row)
        )
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def reference_tokens(model, inputs, tokens, **options):
    rows = model.generate(**inputs, max_new_tokens=tokens, **options)[:, inputs["input_ids"].shape[1] :]
    return rows.tolist()


GREEDY = {"do_sample": False, "eos_token_id": 999, "pad_token_id": 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(5,), (1,), (7, 3, 5)])
def test_greedy_tokens_are_those_reference_tokens(folder, dtype, lengths):
    model = fewbit.load(folder, dtype=dtype)
    inputs = prompts(*lengths)
    result = generate(model, inputs, 20, **GREEDY)
    assert result.tokens == reference_tokens(model, inputs, 20, **GREEDY)
    assert (result.steps, result.prompt_tokens) == (20, max(lengths))
    assert result.decode_rate > 0
    assert result.cache == "preallocated"


@pytest.mark.parametrize("make", [gpt2, opt])
def test_other_architectures(tmp_path, make):
    write_checkpoint(tmp_path, make())
    model = fewbit.load(tmp_path)
    inputs = prompts(6, 4)
    assert generate(model, inputs, 12, **GREEDY).tokens == reference_tokens(model, inputs, 12, **GREEDY)


def test_sampled_tokens_are_those_reference_tokens(folder):
    model, inputs = fewbit.load(folder), prompts(5, 2)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "eos_token_id": 999, "pad_token_id": 0}
    torch.manual_seed(3)
    found = generate(model, inputs, 15, **options).tokens
    torch.manual_seed(3)
    assert found == reference_tokens(model, inputs, 15, **options)


def test_text_ends_at_end_token(folder):
    model, inputs = fewbit.load(folder), prompts(5, 3)
    free = generate(model, inputs, 12, **GREEDY).tokens
    end = free[0][4]
    found = generate(model, inputs, 12, **GREEDY | {"eos_token_id": end}).tokens
    for row, whole in zip(found, free, strict=True):
        assert row == whole[: whole.index(end) + 1 if end in whole else 12]


def test_encoder_decoder_keeps_transformers_cache(tmp_path):
    write_checkpoint(tmp_path, t5())
    model, inputs = fewbit.load(tmp_path), prompts(4)
    result = generate(model, inputs, 6, **GREEDY)
    assert result.cache == "transformers' own: the model is an encoder and a decoder"
    whole = model.generate(**inputs, max_new_tokens=6, **GREEDY)
    assert result.tokens == whole[:, 1:].tolist()


def test_cache_from_generation_config():
    model = tiny_model("llama")
    model.generation_config.use_cache = False
    result = generate(model, prompts(4), 4, **GREEDY)
    assert result.cache == "transformers' own: the model's generation_config.json asks for a cache of its own"
    assert result.tokens == reference_tokens(model, prompts(4), 4, **GREEDY)


def test_sliding_attention_keeps_transformers_cache():
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model("mistral", **shape, num_key_value_heads=2, head_dim=12, sliding_window=4)
    result = generate(model, prompts(6, 3), 10, **GREEDY)
    assert result.cache == "transformers' own: not all blocks of the model attend to the whole text"
    assert result.tokens == reference_tokens(model, prompts(6, 3), 10, **GREEDY)
