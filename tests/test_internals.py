"""The private interfaces of torch and transformers do what fewbit expects of the installed versions.

A failure here names the versions; only src/fewbit/torch_internals.py or transformers_internals.py has to change.
"""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import fewbit
from fewbit import torch_internals, transformers_internals
from models import save_tiny, tiny_model
from moe_models import save_tiny_moe

SOURCES = Path(fewbit.__file__).parent
VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}"
PRIVATE_MODULES = re.compile(
    r"(torch|transformers)(\.\w+)*\._\w+|transformers\.(core_model_loading|conversion_mapping|cache_utils|quantizers\.auto)"
    r"|transformers\.integrations.*|torch\.nn\.modules\..*"
)
PRIVATE_ATTRIBUTES = {
    "_attn_implementation",
    "_chat_handler",
    "_from_config",
    "_generation_state",
    "_get_default_store",
    "_get_tracing_state",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_keys_to_ignore_on_load_missing",
    "_load_model",
    "_load_processor",
    "_model_manager",
    "_model_mapping",
    "_non_persistent_buffers_set",
    "_original_attn_impl",
    "_pytree",
    "_response_handler",
    "_schema",
    "_supports_attention_backend",
    "_tied_weights_keys",
    "_weight_conversions",
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _versions(record_property):
    record_property("versions", VERSIONS)


def test_only_internals_uses_private_interfaces():
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        if path.name in ("torch_internals.py", "transformers_internals.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
            attribute = node.attr if isinstance(node, ast.Attribute) else None
            if (module and PRIVATE_MODULES.fullmatch(module)) or attribute in PRIVATE_ATTRIBUTES:
                found.append(f"{path.relative_to(SOURCES)}:{node.lineno} {module or attribute}")
    assert not found


def test_every_name_exists():
    for module in (torch_internals, transformers_internals):
        assert not [name for name in module.__all__ if not hasattr(module, name)], VERSIONS


def test_dispatch_mode_sees_operations_and_can_be_left():
    seen = []

    class Mode(torch_internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((str(func), torch_internals.is_mutating(func)))
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        x + 1
        x.add_(1)
        with torch_internals.without_dispatch_modes():
            x.mul_(3)
    assert seen == [("aten.add.Tensor", False), ("aten.add_.Tensor", True)], VERSIONS
    assert x.tolist() == [6, 6]


def test_tree_functions():
    tree = {"a": [1, (2,)], "b": 3}
    assert torch_internals.tree_map(lambda x: 2 * x, tree) == {"a": [2, (4,)], "b": 6}, VERSIONS
    assert sorted(torch_internals.tree_leaves(tree)) == [1, 2, 3]


def test_tracing_state():
    states = []

    def function(x):
        states.append(torch_internals.tracing_state() is not None)
        return x + 1

    torch.jit.trace(function, torch.ones(1), check_trace=False)
    function(torch.ones(1))
    assert states == [True, False], VERSIONS


def test_default_store(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        torch_internals.default_store().set("fewbit/test", "here")
        assert torch_internals.default_store().get("fewbit/test") == b"here", VERSIONS
    finally:
        torch.distributed.destroy_process_group()


def test_modules():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("computed", torch.ones(1), persistent=False)
    assert torch_internals.non_persistent_buffers(module) == {"computed"}, VERSIONS
    made = []
    handle = torch_internals.register_module_parameter_registration_hook(
        lambda module, name, value: made.append(name)
    )
    nn.Linear(2, 2)
    handle.remove()
    nn.Linear(2, 2)
    assert made == ["weight", "bias"], VERSIONS
    attention = nn.MultiheadAttention(4, 2)
    assert isinstance(attention.out_proj, torch_internals.NonDynamicallyQuantizableLinear), VERSIONS


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_weight_conversions_of_experts(tmp_path, family):
    folder = save_tiny_moe(tmp_path, family)
    files = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    conversions = transformers_internals.conversions(model)
    names = transformers_internals.WeightNames(model, conversions)
    mapped = {name: names.rename(name) for name in files}
    assert {target for target, _ in mapped.values()} == set(model.state_dict()), VERSIONS
    merged = [name for name, (_, targets) in mapped.items() if targets]
    assert merged
    assert all("experts." in name for name in merged)

    original = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.zeros_(model.get_parameter(mapped[merged[0]][0]))
    tensors = {name: files[name] for name in merged}
    transformers_internals.load_converted(model, tensors, torch.device("cpu"))
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items()), VERSIONS
    assert transformers_internals.conversions(model) is conversions
    reverted = transformers_internals.revert_weight_conversion(model, model.state_dict())
    assert reverted.keys() == files.keys(), VERSIONS
    assert all(torch.equal(reverted[name], files[name]) for name in files)


def test_default_conversions():
    model = tiny_model("llama")
    assert transformers_internals.conversions(model) is None
    for entry in transformers_internals.get_model_conversion_mapping(model):
        assert isinstance(entry, transformers_internals.WeightTransform), VERSIONS


def test_tied_weights(tmp_path):
    tied = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" in tied.all_tied_weights_keys, VERSIONS
    class_value = type(tied)._tied_weights_keys
    transformers_internals.untie(tied, ["lm_head.weight"])
    assert "lm_head.weight" not in tied.all_tied_weights_keys
    assert type(tied)._tied_weights_keys is class_value


def test_models():
    model = tiny_model("llama")
    with torch.device("meta"):
        built = transformers_internals.build(type(model), model.config)
    assert built.state_dict().keys() == model.state_dict().keys(), VERSIONS
    assert next(built.parameters()).is_meta
    assert transformers_internals.optional_parameters(model) == list(
        model._keys_to_ignore_on_load_missing or ()
    )
    assert transformers_internals.uses_attention(model, "sdpa"), VERSIONS
    model.set_attn_implementation("eager")
    assert not transformers_internals.uses_attention(model, "sdpa"), VERSIONS
    assert not transformers_internals.has_adapter(model)
    parameter = nn.Parameter(torch.ones(1))
    assert not transformers_internals.is_loaded(parameter)
    transformers_internals.mark_loaded(parameter)
    assert transformers_internals.is_loaded(parameter)


def test_parameters_are_marked_as_loaded(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path))
    assert all(transformers_internals.is_loaded(parameter) for parameter in model.parameters()), VERSIONS


def test_class_mapping():
    mapping = transformers_internals.class_mapping(AutoModelForSeq2SeqLM)
    assert mapping[transformers.T5Config] is transformers.T5ForConditionalGeneration, VERSIONS
    assert transformers_internals.class_mapping(transformers.T5ForConditionalGeneration) is None


@pytest.mark.parametrize("mapping", ["AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING"])
def test_quantizer_mappings(mapping):
    assert "gptq" in getattr(transformers_internals, mapping), VERSIONS


def test_attention_interfaces():
    assert "sdpa" in transformers_internals.ALL_MASK_ATTENTION_FUNCTIONS, VERSIONS
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
    module = nn.Module()
    module.is_causal = True
    output, weights = transformers_internals.sdpa_attention_forward(module, q, k, v, None, is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert torch.allclose(output, expected, atol=1e-6), VERSIONS
    assert weights is None


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_argument_for_a_cache_has_its_present_name():
    model = tiny_model("llama")
    ids = torch.tensor([[1, 2, 3]])
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, **{transformers_internals.cache_argument(model): cache})
    assert cache.get_seq_length() == 4, VERSIONS
