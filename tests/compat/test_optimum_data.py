"""optimum's data, utils and eval modules."""

import math

import datasets
import pytest
import torch
from torch import nn

import fewbit
from fewbit.calibration import prepare
from fewbit.compat.optimum.data import get_dataset, prepare_dataset
from fewbit.compat.optimum.eval import evaluate_perplexity
from fewbit.compat.optimum.utils import (
    get_block_name_with_pattern,
    get_layers,
    get_preceding_modules,
    get_seqlen,
)
from fewbit.errors import CalibrationError, ConfigError
from models import TEXT, random_sequences, tiny_model, tiny_tokenizer


@pytest.fixture
def wikitext(monkeypatch):
    """The Hub's data sets, played by local texts; gives the splits that were read."""
    splits = []

    def load_dataset(path, *args, split, **kwargs):
        splits.append((path, split))
        return [{"text": TEXT if split == "train" else TEXT.upper()}] * 4

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return splits


def test_windows_of_a_known_data_set(wikitext):
    examples = get_dataset("wikitext2", tiny_tokenizer(), nsamples=3, seqlen=32)
    assert [{key: tuple(value.shape) for key, value in e.items()} for e in examples] == [
        {"attention_mask": (1, 32), "input_ids": (1, 32)}
    ] * 3
    assert all(e["attention_mask"].all() for e in examples)
    same = prepare("wikitext2", tiny_tokenizer(), num_samples=3, seq_len=32)
    assert all(
        torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(examples, same.batches, strict=True)
    )
    other = get_dataset("wikitext2", tiny_tokenizer(), nsamples=3, seqlen=32, seed=1)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(examples, other, strict=True))


def test_splits(wikitext):
    for name, path in (("wikitext2", "Salesforce/wikitext"), ("c4", "allenai/c4"), ("c4-new", "allenai/c4")):
        wikitext.clear()
        get_dataset(name, tiny_tokenizer(), 2, 16)
        get_dataset(name, tiny_tokenizer(), 2, 16, split="validation")
        assert wikitext == [(path, "train"), (path, "test")]


def test_fewer_windows_than_asked_for_are_said(wikitext, caplog):
    assert len(get_dataset("wikitext2", tiny_tokenizer(), nsamples=500, seqlen=64)) < 500
    assert "500 were asked for" in caplog.text


@pytest.mark.parametrize(
    ("name", "split", "kind", "message"),
    [
        ("pile", "train", ValueError, r"there is no dataset 'pile': use one of wikitext2, c4, c4-new"),
        ("ptb", "train", RuntimeError, r"'ptb' is no longer supported"),
        ("ptb-new", "train", CalibrationError, r"'ptb-new' is no longer supported"),
        ("c4", "test", ValueError, r"split must be 'train' or 'validation'; got 'test'"),
    ],
)
def test_names_that_are_refused(name, split, kind, message):
    with pytest.raises(kind, match=message):
        get_dataset(name, tiny_tokenizer(), split=split)


def test_prepared_batches_feed_a_model():
    tokenizer = tiny_tokenizer()
    examples = [tokenizer(TEXT[:length], return_tensors="pt") for length in (10, 20, 30)]
    batches = prepare_dataset(examples, batch_size=2, pad_token_id=0)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 20), (1, 30)]
    assert batches[0]["attention_mask"].sum(1).tolist() == [10, 20]
    assert batches[1]["attention_mask"].all()
    model = tiny_model("llama")
    with torch.no_grad():
        alone = model(**examples[0]).logits
        together = model(**batches[0]).logits[:1, :10]
    assert torch.allclose(alone, together, atol=1e-5)


def test_prepared_batches_need_a_pad_token():
    with pytest.raises(CalibrationError, match=r"batch_size 2 needs a pad token"):
        prepare_dataset(random_sequences(), batch_size=2)


def test_prepared_examples_must_hold_tokens():
    with pytest.raises(CalibrationError, match=r"dataset element 1 .*must be .*a dict with input_ids"):
        prepare_dataset([{"input_ids": [5]}, {"text": "a"}])


@pytest.mark.parametrize(
    ("family", "block", "before"),
    [
        ("llama", "model.layers", ["model.embed_tokens"]),
        ("gpt2", "transformer.h", ["transformer.wte", "transformer.wpe", "transformer.drop"]),
        ("gpt_neox", "gpt_neox.layers", ["gpt_neox.embed_in", "gpt_neox.emb_dropout"]),
        ("bloom", "transformer.h", ["transformer.word_embeddings", "transformer.word_embeddings_layernorm"]),
    ],
)
def test_where_the_blocks_are(family, block, before):
    model = tiny_model(family)
    assert get_block_name_with_pattern(model) == block
    assert get_preceding_modules(model, block) == before


def test_blocks_of_opt_and_of_a_bare_model():
    model = tiny_model("opt")
    assert get_block_name_with_pattern(model) == "model.decoder.layers"
    assert "model.decoder.embed_positions" in get_preceding_modules(model, "model.decoder.layers")
    assert get_block_name_with_pattern(model.model) == "decoder.layers"


def test_blocks_that_are_nowhere():
    with pytest.raises(
        ConfigError, match=r"Sequential has its blocks at none of .*: pass block_name_to_quantize"
    ):
        get_block_name_with_pattern(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"Module h was not found in LlamaForCausalLM"):
        get_preceding_modules(tiny_model("llama"), "h")


def test_the_longest_sequence(caplog):
    assert get_seqlen(tiny_model("llama")) == 128
    assert get_seqlen(tiny_model("gpt2", n_positions=64)) == 64
    assert get_seqlen(nn.Linear(2, 2)) == 2048
    assert "Linear names no longest sequence: 2048 is used; model_seqlen sets it" in caplog.text


def test_layers_by_type_and_prefix():
    model = tiny_model("llama")
    assert "lm_head" in get_layers(model)
    first = get_layers(model, prefix="model.layers.0")
    assert len(first) == 7
    assert all(module is model.get_submodule(name) for name, module in first.items())
    assert list(get_layers(model.lm_head, name="head")) == ["head"]
    fewbit.quantize(model, fewbit.QuantConfig(method="rtn", group_size=16))
    assert list(get_layers(model)) == ["lm_head"]


def test_perplexity(wikitext):
    model = tiny_model("llama", max_position_embeddings=512)
    perplexity = evaluate_perplexity(model, tiny_tokenizer())
    assert wikitext == [("Salesforce/wikitext", "test")]
    assert math.isfinite(perplexity)
    with torch.no_grad():
        ids = tiny_tokenizer()(("\n\n".join([TEXT.upper()] * 4)), return_tensors="pt").input_ids
        windows = ids[0, : ids.shape[1] // 512 * 512].view(-1, 512)
        nll = model(windows, labels=windows).loss
    assert perplexity == pytest.approx(nll.exp().item(), rel=1e-4)
