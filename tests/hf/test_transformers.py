import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, GPTQConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import fewbit
from fewbit.checkpoint.quantization_config import parse
from fewbit.errors import CheckpointError, ConfigError, KernelError
from fewbit.kernels.linear import QuantizedLayer, QuantLinear
from fewbit.verification import verify
from tiny_gptq import alike, llama, logits, write_checkpoint


@pytest.fixture
def registered():
    fewbit.register()
    yield
    fewbit.unregister()


def quantization_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture
def truth_and_folder(tmp_path):
    truth = llama()
    write_checkpoint(tmp_path / "ckpt", truth)
    return truth, tmp_path / "ckpt"


def test_register_and_unregister_restore_exactly():
    before = AUTO_QUANTIZER_MAPPING["gptq"], AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]
    methods = dict(vars(GPTQConfig))
    fewbit.unregister()
    fewbit.register()
    fewbit.register()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is not before[0]
    fewbit.unregister()
    assert (AUTO_QUANTIZER_MAPPING["gptq"], AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]) == before
    assert dict(vars(GPTQConfig)) == methods
    fewbit.unregister()
    assert (AUTO_QUANTIZER_MAPPING["gptq"], AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]) == before


def test_what_another_tool_puts_there_meanwhile_stays(monkeypatch):
    monkeypatch.setitem(
        AUTO_QUANTIZER_MAPPING, "gptq", AUTO_QUANTIZER_MAPPING["gptq"]
    )  # comes back in the end
    fewbit.register()
    AUTO_QUANTIZER_MAPPING["gptq"] = object
    fewbit.unregister()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is object


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_from_pretrained_save_and_reload(registered, truth_and_folder, tmp_path, device_map):
    truth, folder = truth_and_folder
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert alike(model, truth)
    assert model.hf_quantizer.is_serializable()
    assert model.is_quantized
    model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map=device_map)
    assert alike(again, truth)


def test_settings_survive(registered, tmp_path):
    extra = {
        "dynamic": {"-:nothing": {}},
        "lm_head": False,
        "meta": {"uri": "x"},
        "modules_in_block_to_quantize": None,
        "own": [1],
    }
    write_checkpoint(tmp_path / "a", llama(), quantization=extra)
    before = quantization_config(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert quantization_config(tmp_path / "b") == before
    assert before.keys() >= extra.keys()


@pytest.mark.parametrize("zero", [False, True])
def test_a_v2_checkpoint_is_saved_as_v1_unless_asked_otherwise(registered, tmp_path, zero):
    truth = llama()
    tensors = write_checkpoint(tmp_path / "a", truth, fmt="gptq_v2")
    if zero:  # zero point 0, which v1 cannot say
        tensors["model.layers.0.mlp.up_proj.qzeros"] &= ~15
        save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert alike(model, truth) is not zero
    model.save_pretrained(tmp_path / "v1")
    model.config.quantization_config.format = "gptq_v2"
    model.save_pretrained(tmp_path / "v2")
    for fmt, folder in (("gptq", tmp_path / "v1"), ("gptq_v2", tmp_path / "v2")):
        assert quantization_config(folder)["checkpoint_format"] == fmt
        assert not verify(folder).problems
        assert alike(AutoModelForCausalLM.from_pretrained(folder), model)
    saved = load_file(tmp_path / "v2" / "model.safetensors")
    assert all(torch.equal(saved[name], tensors[name]) for name in saved if name.endswith("qzeros"))
    model.config.quantization_config.format = "gguf"
    with pytest.raises(ConfigError, match=r"format must be one of gptq, gptq_v2; got 'gguf'"):
        model.save_pretrained(tmp_path / "no")


def test_a_model_of_which_parts_are_elsewhere_keeps_its_format(registered, tmp_path, caplog):
    write_checkpoint(tmp_path, llama(), fmt="gptq_v2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.model.layers[0].mlp.up_proj.to("meta")  # as accelerate does with what it moves to and fro
    assert model.hf_quantizer.get_state_dict_and_metadata(model) == (None, {})
    assert model.config.quantization_config.to_dict()["checkpoint_format"] == "gptq_v2"
    assert "the format stays gptq_v2; fewbit convert rewrites the folder as gptq" in caplog.text


def test_rules_whose_order_decides_survive_the_sorting_of_json(registered, tmp_path):
    dynamic = {r"model\.layers\.0\..*": {"sym": True}, r"model\.(?:layers|other)\..*": {"sym": False}}
    write_checkpoint(tmp_path / "a", llama(), quantization={"dynamic": dynamic})
    assert list(dynamic) != sorted(dynamic)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = parse(quantization_config(tmp_path / "b"))
    for block, sym in enumerate([True, False]):
        assert again.layer(f"model.layers.{block}.mlp.up_proj").sym is sym


def test_modules_in_block_needs_no_optimum(registered, tmp_path):
    names = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
    names.append(["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"])
    truth = llama()
    write_checkpoint(tmp_path, truth, quantization={"modules_in_block_to_quantize": names})
    assert alike(AutoModelForCausalLM.from_pretrained(tmp_path), truth)


def test_kernel_chosen_through_gptq_config(registered, truth_and_folder):
    _, folder = truth_and_folder
    with pytest.warns(UserWarning, match=r"loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=GPTQConfig(bits=4, backend="reference")
        )
    assert model.model.layers[0].mlp.up_proj.kernel.name == "reference"
    with (
        pytest.warns(UserWarning, match=r"loading attributes"),
        pytest.raises(KernelError, match=r"'marlin' cannot run.*device is cpu, not cuda"),
    ):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=GPTQConfig(bits=4, backend="marlin"))


def test_auto_trainable_asks_for_gradients(registered, truth_and_folder):
    _, folder = truth_and_folder
    with pytest.warns(UserWarning, match=r"loading attributes"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=GPTQConfig(bits=4, backend="auto_trainable")
        )
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.trainable, layer.kernel.name, layer.QUANT_TYPE) == (True, "cpu", "fewbit")
    model.model.to(torch.float64)  # another kernel, chosen under the same condition
    assert (layer.trainable, layer.kernel.name) == (True, "reference")
    assert not AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.trainable


def test_disk_offload_is_refused(registered, truth_and_folder):
    _, folder = truth_and_folder
    with pytest.raises(ConfigError, match=r"device_map has disk entries"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"model": "cpu", "lm_head": "disk"})


def test_a_device_map_without_accelerate_names_it(registered, truth_and_folder, monkeypatch):
    _, folder = truth_and_folder
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    with pytest.raises(ValueError, match=r"pip install accelerate"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")


def test_a_bare_model_leaves_the_head_alone(registered, tmp_path):
    truth = llama()
    write_checkpoint(tmp_path, truth, lm_head=True)
    model = AutoModel.from_pretrained(tmp_path)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        expected = truth.model(ids).last_hidden_state
        assert (model(ids).last_hidden_state - expected).norm() < 1e-4 * expected.norm()


def test_pickles_are_refused(registered, truth_and_folder):
    _, folder = truth_and_folder
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle.*--allow-pickle"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("which", ["one", "all"])
def test_an_index_that_leaves_the_folder(registered, tmp_path, which):
    write_checkpoint(tmp_path / "inside", llama(), shards=2)
    index = tmp_path / "inside" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    for name, file in list(values["weight_map"].items())[: 1 if which == "one" else None]:
        shutil.copy(tmp_path / "inside" / file, tmp_path / file)
        values["weight_map"][name] = f"../{file}"
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"names files outside its folder: .*\.\./"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "inside")


def test_unquantized_weights_that_claim_otherwise(registered, truth_and_folder):
    _, folder = truth_and_folder
    save_file(llama().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"says it is quantized, but has no tensor named \*.qweight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_experts_both_by_themselves_and_merged_are_refused(registered, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=50,
    )
    tensors = write_checkpoint(tmp_path, MixtralForCausalLM(config))
    stem = "model.layers.0.self_attn.q_proj"
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"model.layers.0.block_sparse_moe.experts.0.w1.{part}"] = tensors[f"{stem}.{part}"]
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj holds all of them"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dequantize_gives_the_ordinary_model(registered, tmp_path, family):
    from tiny_gptq import FAMILIES

    truth = FAMILIES[family]()
    write_checkpoint(tmp_path / "a", truth)
    fewbit.register(fast=False)  # fused operations round differently
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a").dequantize()
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert alike(model, truth)
    model.save_pretrained(tmp_path / "b")
    fewbit.unregister()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))


def test_rules_of_casting(registered, truth_and_folder):
    _, folder = truth_and_folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"half"):
        model.half()
    with pytest.raises(ValueError, match=r"cannot cast a GPTQ model"):
        model.to(torch.bfloat16)
    model.to("cpu")
    model.model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.kernel.name == "cpu"
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_through_plain_peft(registered, truth_and_folder, tmp_path, dtype, fast):
    fewbit.register(fast=fast)
    peft = pytest.importorskip("peft")
    _, folder = truth_and_folder
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    before = logits(base)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
    ids = torch.randint(0, 200, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name and p.grad.abs().sum() > 0 for name, p in trained.items())
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match=r"gptq quantized"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tmp_path / "adapter"
    )
    assert alike(again, model) if fast else torch.equal(logits(again), logits(model))


def test_gradients_are_those_of_the_dequantized_model(registered, truth_and_folder):
    truth, folder = truth_and_folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 200, (2, 9))
    grads = []
    for each in (model, truth):
        each(input_ids=ids, labels=ids).loss.backward()
        grads.append(each.model.embed_tokens.weight.grad)
    assert (grads[0] - grads[1]).norm() < 1e-4 * grads[1].norm()
