"""The same tokens as transformers' own generate, whatever the path."""

import pytest
import torch

import fewbit
from fewbit.hf.compiled import _state
from fewbit.hf.generate import COMPILE_FROM, generate
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


def of_transformers(model, inputs, tokens, **options):
    rows = model.generate(**inputs, max_new_tokens=tokens, **options)[:, inputs["input_ids"].shape[1] :]
    return rows.tolist()


GREEDY = {"do_sample": False, "eos_token_id": 999, "pad_token_id": 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(5,), (1,), (7, 3, 5)])
def test_greedy_tokens_are_those_of_transformers(folder, dtype, lengths):
    model = fewbit.load(folder, dtype=dtype)
    inputs = prompts(*lengths)
    result = generate(model, inputs, 20, **GREEDY)
    assert result.tokens == of_transformers(model, inputs, 20, **GREEDY)
    assert (result.steps, result.prompt_tokens) == (20, max(lengths))
    assert result.decode_rate > 0
    assert result.method == f"not compiled: it would pay from about {COMPILE_FROM:,} tokens on"


@pytest.mark.parametrize("make", [gpt2, opt])
def test_other_families(tmp_path, make):
    write_checkpoint(tmp_path, make())
    model = fewbit.load(tmp_path)
    inputs = prompts(6, 4)
    assert generate(model, inputs, 12, **GREEDY).tokens == of_transformers(model, inputs, 12, **GREEDY)


def test_sampled_tokens_are_those_of_transformers(folder):
    model, inputs = fewbit.load(folder), prompts(5, 2)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20, "eos_token_id": 999, "pad_token_id": 0}
    torch.manual_seed(3)
    found = generate(model, inputs, 15, **options).tokens
    torch.manual_seed(3)
    assert found == of_transformers(model, inputs, 15, **options)


def test_a_text_ends_at_its_end_token(folder):
    model, inputs = fewbit.load(folder), prompts(5, 3)
    free = generate(model, inputs, 12, **GREEDY).tokens
    end = free[0][4]
    found = generate(model, inputs, 12, **GREEDY | {"eos_token_id": end}).tokens
    for row, whole in zip(found, free, strict=True):
        assert row == whole[: whole.index(end) + 1 if end in whole else 12]


def test_models_with_other_caches_keep_transformers_own(tmp_path):
    write_checkpoint(tmp_path, t5())
    model, inputs = fewbit.load(tmp_path), prompts(4)
    result = generate(model, inputs, 6, compile=True, **GREEDY)
    assert result.method == "not compiled: the model is an encoder and a decoder"
    whole = model.generate(**inputs, max_new_tokens=6, **GREEDY)
    assert result.tokens == whole[:, 1:].tolist()


def test_a_model_that_asks_for_its_own_cache_gets_it():
    model = tiny_model("llama")
    model.generation_config.use_cache = False
    result = generate(model, prompts(4), 4, compile=True, **GREEDY)
    assert result.method == "not compiled: the model's generation_config.json asks for a cache of its own"
    assert result.tokens == of_transformers(model, prompts(4), 4, **GREEDY)


@pytest.mark.parametrize("prepare", ["eager attention", "wrapped"])
def test_why_it_is_not_compiled(folder, prepare):
    model = fewbit.load(folder)
    if prepare == "wrapped":
        model.forward = model.forward
        why = "another library has replaced its forward"
    else:
        model.set_attn_implementation("eager")
        why = "its attention is eager, not sdpa"
    assert generate(model, prompts(3), 3, compile=True, **GREEDY).method == f"not compiled: {why}"


def test_without_a_compiler_it_runs_plainly_and_says_so(folder, monkeypatch):
    from torch._dynamo.exc import Unsupported

    def fail(*args):
        raise Unsupported("no C++ compiler\nmore", case_name="")

    monkeypatch.setattr("fewbit.hf.compiled._compiled_step", lambda: fail)
    model, inputs = fewbit.load(folder), prompts(5)
    result = generate(model, inputs, 8, compile=True, **GREEDY)
    assert result.method == "not compiled: no C++ compiler"
    assert result.tokens == of_transformers(model, inputs, 8, **GREEDY)
    assert "forward" not in vars(model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(5,), (7, 3)])
def test_compiled_tokens_are_those_of_transformers(folder, dtype, lengths):
    model, inputs = fewbit.load(folder, dtype=dtype), prompts(*lengths)
    result = generate(model, inputs, 20, compile=True, **GREEDY)
    assert result.method == "compiled"
    assert result.tokens == of_transformers(model, inputs, 20, **GREEDY)
    again = generate(model, inputs, 20, compile=True, **GREEDY)
    assert again.tokens == result.tokens
    assert again.compile_seconds == 0.0


@pytest.mark.slow
def test_fused_layers_compile(folder):
    model = fewbit.load(folder, dtype="bfloat16", fuse=True)
    inputs = prompts(6)
    plain = generate(model, inputs, 12, compile=False, **GREEDY)
    result = generate(model, inputs, 12, compile=True, **GREEDY)
    assert (result.method, result.tokens) == ("compiled", plain.tokens)


def test_a_graph_belongs_to_one_model_in_one_state(folder):
    model, other = fewbit.load(folder), fewbit.load(folder)
    states = [_state(model), _state(other)]
    other.model.layers[0].mlp.up_proj.prepare("reference")
    states.append(_state(other))
    states.append(_state(other.train()))
    assert len(set(states)) == 4
    assert _state(model) == states[0]


def test_a_model_with_sliding_attention_keeps_transformers_own_cache():
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model("mistral", **shape, num_key_value_heads=2, head_dim=12, sliding_window=4)
    result = generate(model, prompts(6, 3), 10, compile=True, **GREEDY)
    assert result.method == "not compiled: not all blocks of the model attend to the whole text"
    assert result.tokens == of_transformers(model, prompts(6, 3), 10, **GREEDY)
