"""Prefetched blocks: the same tensors, one block at a time, and no thread left behind."""

import threading
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import saved

import fewbit
import models
from fewbit import preparation
from fewbit.checkpoint.safetensors_file import FileTensor, check_all_finite, read_header
from fewbit.errors import ModelError
from fewbit.modeling.source import open_source
from fewbit.pipeline.streaming import REST, StreamedWeights
from fewbit.planning import block_of
from fewbit.profiling import Profiler

CPU = torch.device("cpu")
IDS = models.random_sequences(1)[0]["input_ids"][None]


def opened(folder, device=CPU, prefetch=True):
    model, files = open_source(folder).build_model("auto")
    weights = StreamedWeights(model, files, device, Profiler())
    weights._prefetches = prefetch
    return model, weights


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fewbit-prefetch")]


def finished(weights):
    """Wait until the block that is being read is there."""
    weights._prefetcher._reading.exception()


def nothing(unit):
    pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "mixtral", "qwen2_moe"])
def test_prefetching_reads_the_same_tensors(tmp_path, family):
    folder = saved(tmp_path / "model", family)
    expected = open_source(folder).load_model("auto", CPU)
    model, weights = opened(folder)
    inputs = {"decoder_input_ids": IDS} if family == "t5" else {}
    with weights.on_demand(nothing), torch.no_grad():
        assert torch.equal(model(IDS, **inputs).logits, expected(IDS, **inputs).logits)
    assert weights.prefetched_shards == len(set(weights.shard_sizes()) - {REST} - weights._embeddings) > 1
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert not threads()


def test_prefetching_writes_the_same_files(tmp_path, monkeypatch):
    folder, made = saved(tmp_path / "model", "mixtral"), []

    def streamed(*arguments, prefetch):
        made.append(StreamedWeights(*arguments))
        made[-1]._prefetches = prefetch
        return made[-1]

    for prefetch in (False, True):
        monkeypatch.setattr(preparation, "StreamedWeights", partial(streamed, prefetch=prefetch))
        config = fewbit.QuantConfig(group_size=8, seq_len=24, fast=True)
        fewbit.quantize(folder, config, dataset=models.random_sequences(4), output=tmp_path / str(prefetch))
    assert [weights.prefetched_shards for weights in made] == [0, 2]
    assert made[0].peak_bytes == made[1].peak_bytes
    files = [(tmp_path / str(prefetch) / "model.safetensors").read_bytes() for prefetch in (False, True)]
    assert files[0] == files[1]


def test_nothing_is_prefetched_on_a_cpu(tmp_path):
    model, files = open_source(saved(tmp_path / "model", "llama")).build_model("auto")
    weights = StreamedWeights(model, files, CPU, Profiler())
    with weights.on_demand(nothing), torch.no_grad():
        model(IDS)
        assert not threads()
    assert weights.prefetched_shards == 0


def test_one_block_is_prefetched_at_a_time(tmp_path, monkeypatch):
    model, weights = opened(saved(tmp_path / "model", "llama", num_hidden_layers=4))
    read, original = [], FileTensor.read

    def recorded(self, **options):
        read.append(block_of(next(name for name, one in weights._files.items() if one is self)))
        return original(self, **options)

    monkeypatch.setattr(FileTensor, "read", recorded)
    with weights.on_demand(nothing):
        weights.load("model.layers.0.mlp.up_proj")
        finished(weights)
        assert {"model.layers.0", "model.layers.1"} == {block for block in read if "layers" in block}
        resident = weights.resident_bytes
        assert all(p.is_meta for p in model.model.layers[1].parameters())
        weights.load("model.layers.1.mlp.up_proj")
        weights.release_except(["model.layers.1.mlp.up_proj"])
        assert weights.resident_bytes == resident
    assert read.count("model.layers.1") == read.count("model.layers.0") == 9


def test_block_out_of_order_is_read_when_needed(tmp_path):
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=4)
    expected = load_file(folder / "model.safetensors")
    model, weights = opened(folder)
    with weights.on_demand(nothing):
        for number in (0, 2, 1, 3):
            weights.load(f"model.layers.{number}")
            name = f"model.layers.{number}.mlp.up_proj.weight"
            assert torch.equal(model.get_parameter(name), expected[name])
    assert weights.prefetched_shards == 2  # the first, and the one after 2


def test_read_errors_are_raised_where_the_block_is_needed(tmp_path):
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=4)
    model, weights = opened(folder)
    path = folder / "model.safetensors"
    with weights.on_demand(nothing):
        weights.load("model.layers.0")
        finished(weights)
        path.unlink()
        weights.load("model.layers.1")  # is here already
        with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors: No such file"):
            weights.load("model.layers.2")
        assert not model.model.layers[1].mlp.up_proj.weight.is_meta
    assert not threads()


def test_shrunken_file_is_noticed_in_the_forward(tmp_path):
    folder = saved(tmp_path / "model", "llama", num_hidden_layers=4)
    model, weights = opened(folder)
    path = folder / "model.safetensors"
    with weights.on_demand(nothing):
        weights.load("model.embed_tokens")
        finished(weights)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(ModelError, match="became shorter while it was in use"), torch.no_grad():
            model(IDS)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_thread_ends_after_errors(tmp_path, error):
    _, weights = opened(saved(tmp_path / "model", "llama", num_hidden_layers=4))

    def stopped():
        with weights.on_demand(nothing):
            weights.load("model.layers.0")
            assert threads()
            raise error

    with pytest.raises(error):
        stopped()
    assert not threads()
    weights.load("model.layers.1")  # without it
    assert weights.prefetched_shards == 1


def test_interrupt_waits_for_one_more_tensor_only(tmp_path, monkeypatch):
    _, weights = opened(saved(tmp_path / "model", "llama", num_hidden_layers=4))
    begun, read, cancelled, original = threading.Event(), [], [], FileTensor.read

    def slow(self, **options):
        if threads() == [threading.current_thread()]:
            begun.wait()
            read.append(self)
            cancelled[0].wait(0.2)
        return original(self, **options)

    def interrupt(*_):
        raise KeyboardInterrupt

    def interrupted():
        with weights.on_demand(nothing):
            cancelled.append(weights._prefetcher._cancelled)
            begun.set()
            monkeypatch.setattr(weights._prefetcher._reading, "result", interrupt)
            weights.load("model.layers.0")

    monkeypatch.setattr(FileTensor, "read", slow)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not threads()
    assert len(read) == 1


@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_reading_into_pinned_memory(tmp_path, shape, dtype, monkeypatch):
    pinned, empty = [], torch.empty

    def recorded(*arguments, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*arguments, **options)

    tensor = torch.randint(0, 2, shape).to(dtype)
    save_file({"a": torch.zeros(3), "x": tensor}, tmp_path / "t.safetensors")
    infos, _ = read_header(tmp_path / "t.safetensors")
    monkeypatch.setattr(torch, "empty", recorded)
    read = FileTensor(tmp_path / "t.safetensors", infos["x"]).read(pinned=True)
    assert pinned == [bool(tensor.numel())]
    assert (read.shape, read.dtype) == (tensor.shape, dtype)
    assert torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e5m2])
def test_finite_check_of_many_tensors(dtype):
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, 2.0]).to(dtype), "i": torch.ones(2).int()}
    check_all_finite(tensors)
    check_all_finite({"none": torch.empty(0)})
    check_all_finite({"large": torch.tensor([1e300], dtype=torch.float64)})
    tensors["b"] = torch.tensor([1.0, float("nan")]).to(dtype)
    with pytest.raises(ModelError, match="the weight b holds NaN"):
        check_all_finite(tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_on_a_gpu(tmp_path, family):
    folder = saved(tmp_path / "model", family)
    expected = load_file(folder / "model.safetensors")
    model, weights = opened(folder, torch.device("cuda"))
    with weights.on_demand(nothing), torch.no_grad():
        model(IDS.cuda())
    assert weights.prefetched_shards == 2
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(model.get_parameter(name).cpu(), expected[name])
    assert not threads()
