import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from fewbit.checkpoint.safetensors_file import FileTensor
from fewbit.errors import ModelError
from fewbit.modeling.source import open_source
from fewbit.pipeline.streaming import REST, StreamedWeights
from fewbit.planning import block_of
from fewbit.profiling import Profiler

CPU = torch.device("cpu")


EXPERTS = {
    "hidden_size": 48, "intermediate_size": 40, "moe_intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40,
}  # fmt: skip


def saved(folder, family, **changes):
    experts = EXPERTS if family in ("mixtral", "qwen2_moe") else {}
    return models.save_tiny(folder, family, **{**experts, **changes})


def opened(folder, dtype="auto"):
    model, files = open_source(folder).build_model(dtype)
    return model, StreamedWeights(model, files, CPU, Profiler())


def state(model):
    tensors = dict(model.state_dict())
    tensors.update((name, buffer) for name, buffer in model.named_buffers())
    return tensors


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*models.FAMILIES, "mixtral", "qwen2_moe"])
def test_the_same_tensors_as_from_pretrained(tmp_path, family, dtype):
    folder = saved(tmp_path / "model", family)
    expected = open_source(folder).load_model(dtype, CPU)
    model, weights = opened(folder, dtype)
    weights.load_all()
    found, wanted = state(model), state(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same(found[name], wanted[name])] == []
    ids = models.random_sequences(1)[0]["input_ids"][None]
    inputs = {"decoder_input_ids": ids} if family == "t5" else {}
    with torch.no_grad():
        assert torch.equal(model(ids, **inputs).logits, expected(ids, **inputs).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral"])
def test_one_block_at_a_time(tmp_path, family):
    folder = saved(tmp_path / "model", family, num_hidden_layers=5)
    expected = state(open_source(folder).load_model("auto", CPU))
    model, weights = opened(folder)
    assert weights.resident_bytes == 0
    blocks = dict.fromkeys(block_of(name) for name in expected if block_of(name) != name)
    blocks = [block for block in blocks if any(p.is_meta for p in model.get_submodule(block).parameters())]
    assert len(blocks) >= 4
    sizes = {}
    for block in blocks:
        weights.release_except([block])
        weights.load(block)
        inside = {name for name in expected if name.startswith(f"{block}.")}
        sizes[block] = sum(expected[name].nbytes for name in inside & set(model.state_dict()))
        for name in inside:
            assert same(state(model)[name], expected[name])
        others = [p for name, p in model.named_parameters() if block_of(name) in {*blocks} - {block}]
        assert others
        assert all(p.is_meta for p in others)
    assert weights.peak_bytes <= max(sizes.values()) + weights._loaded.get(REST, 0)
    weights.release_except([])
    assert weights.resident_bytes == weights._loaded.get(REST, 0)


def test_blocks_are_loaded_on_demand_and_restored(tmp_path):
    folder = models.save_tiny(tmp_path / "model", "llama", num_hidden_layers=3)
    expected = open_source(folder).load_model("auto", CPU)
    model, weights = opened(folder)
    ids = models.random_sequences(1)[0]["input_ids"][None]
    came = []
    with weights.on_demand(came.append), torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
        assert came == [REST, "model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "lm_head"]
        weights.release_except(["model.layers.2.mlp.up_proj"])
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        assert not model.model.layers[2].mlp.up_proj.weight.is_meta
        came.clear()
        assert torch.equal(model(ids).logits, expected(ids).logits)
        assert "model.layers.0" in came
        assert "model.layers.2" not in came
    weights.release_except([])
    with pytest.raises(RuntimeError):
        model(ids)  # nothing comes by itself any more


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path, tied):
    folder = models.save_tiny(tmp_path / "model", "llama", tie_word_embeddings=tied)
    model, weights = opened(folder)
    weights.load("lm_head")
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert (head is embedding) == tied
    assert not head.is_meta
    assert embedding.is_meta != tied
    weights.release_except([])
    assert model.lm_head.weight.is_meta
    if tied:
        weights.untie("lm_head.weight")
        weights.load("lm_head")
        expected = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(model.lm_head.weight, expected)
        assert model.model.embed_tokens.weight.is_meta


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_the_files_hold_twice(tmp_path, equal):
    folder = models.save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, weights = opened(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    weights.load_all()
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_fingerprint_covers_config_and_weights(tmp_path):
    folder = models.save_tiny(tmp_path / "model", "llama")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update((folder / "model.safetensors").read_bytes())
    assert open_source(folder).fingerprint() == digest.hexdigest()


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_non_finite_weights_are_found_first(tmp_path, value, word):
    folder = models.save_tiny(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight holds {word}"):
        open_source(folder).fingerprint()


def test_values_that_do_not_fit_the_dtype(tmp_path):
    folder = models.save_tiny(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _, weights = opened(folder, "float16")
    with pytest.raises(ModelError, match="does not fit the dtype"):
        weights.load("model.layers.1")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    folder = models.save_tiny(tmp_path / "model", "llama")
    _, weights = opened(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match="became shorter"):
        weights.load("model.layers.1")
    path.unlink()
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        weights.load("model.layers.1")


@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_reading_a_tensor(tmp_path, shape, dtype):
    from fewbit.checkpoint.safetensors_file import read_header

    tensor = torch.randint(0, 2, shape).to(dtype)
    save_file({"a": torch.zeros(3), "x": tensor}, tmp_path / "t.safetensors")
    infos, _ = read_header(tmp_path / "t.safetensors")
    read = FileTensor(tmp_path / "t.safetensors", infos["x"])[...]
    assert read.shape == shape
    assert read.dtype == dtype
    assert torch.equal(read.float(), tensor.float())


def test_a_shard_missing_is_a_model_error(tmp_path):
    folder = models.save_tiny(tmp_path / "model", "llama")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="00002-of-00002"):
        open_source(folder).build_model("auto")
