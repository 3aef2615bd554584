"""Every form of fused experts, taken apart: the same outputs, and every weight in its place."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from fewbit.modeling.expert_layouts import FusedParameter, layout_of
from fewbit.modeling.experts import BatchedExperts, RoutedExperts, SortedExperts
from fewbit.pipeline.expert_calibration import _tokens_per_expert

E, H, I, TOKENS = 4, 16, 24, 30  # noqa: E741


def fused(model_type, class_name, **settings):
    """A random module of fused experts of transformers."""
    module = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=[class_name])
    config = AutoConfig.for_model(settings.pop("config", model_type), **settings)
    if model_type == "dbrx":
        config = config.ffn_config
        config.hidden_size = H
    config._experts_implementation = "eager"
    experts = getattr(module, class_name)(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def routed_inputs(k=2, experts=E):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, H, generator=g, dtype=torch.float64)
    index = torch.rand(TOKENS, experts, generator=g).topk(k).indices
    return x, index, torch.rand(TOKENS, k, generator=g, dtype=torch.float64)


ROUTED = {
    "gpt_oss": ("GptOssExperts", {"hidden_size": H, "intermediate_size": I, "num_local_experts": E}),
    "muse_spark": (
        "MuseSparkExperts",
        {
            "config": "muse_spark_text",
            "moe_hidden_size": H,
            "moe_intermediate_size": I,
            "num_local_experts": E,
        },
    ),
    "dbrx": (
        "DbrxExperts",
        {"ffn_config": {"ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": 2}},
    ),
}


@pytest.mark.parametrize("model_type", ROUTED)
def test_routed(model_type):
    class_name, settings = ROUTED[model_type]
    module = fused(model_type, class_name, **settings)
    x, index, weights = routed_inputs()
    expected = module(x, index, weights) if model_type != "dbrx" else module(x[None], index, weights)[0]
    torch.testing.assert_close(RoutedExperts(module, layout_of(module))(x, index, weights), expected)
    assert not list(module.parameters(recurse=False))


def test_choices_that_return_their_input():
    settings = {"hidden_size": H, "expert_ffn_hidden_size": I, "n_routed_experts": E, "zero_expert_num": 2}
    module = fused("longcat_flash", "LongcatFlashExperts", **settings)
    x, index, weights = routed_inputs(k=3, experts=E + 2)
    assert (index >= E).any()
    expected = module(x, index, weights)
    torch.testing.assert_close(RoutedExperts(module, layout_of(module))(x, index, weights), expected)


def test_one_row_of_tokens_per_expert():
    settings = {"config": "llama4_text", "hidden_size": H, "intermediate_size": I, "num_local_experts": E}
    module = fused("llama4", "Llama4TextExperts", **settings)
    rows = torch.randn(E, TOKENS, H, dtype=torch.float64)
    rows[torch.rand(E, TOKENS) < 0.7] = 0
    rows[1] = 0
    expected = module(rows.view(-1, H))
    torch.testing.assert_close(BatchedExperts(module, layout_of(module))(rows.view(-1, H)), expected)


def test_sorted_tokens():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    module = JetMoeParallelExperts(E, H, I).double()
    nn.init.normal_(module.weight)
    x, sizes = torch.randn(TOKENS, H, dtype=torch.float64), [12, 0, 17, 1]
    expected = module(x, sizes)
    unfused = SortedExperts(module, layout_of(module))
    torch.testing.assert_close(unfused(x, sizes), expected)
    assert unfused(x[:0], [0] * E).shape == (0, I)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_matrices_are_views_of_the_right_rows(transposed, interleaved):
    parameter = FusedParameter("w", ("gate_proj", "up_proj"), transposed, interleaved)
    weight = torch.randn(E, H, 2 * I) if transposed else torch.randn(E, 2 * I, H)
    found = parameter.matrices(weight, E, 2)
    matrix = weight[2].T if transposed else weight[2]
    rows = {"gate_proj": matrix[:I], "up_proj": matrix[I:]}
    if interleaved:
        rows = {"gate_proj": matrix[::2], "up_proj": matrix[1::2]}
    for name, expected in rows.items():
        assert torch.equal(found[name], expected)
        assert found[name].untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_loading_the_fused_parameters_again():
    class_name, settings = ROUTED["gpt_oss"]
    module = fused("gpt_oss", class_name, **settings).to("meta")
    unfused = RoutedExperts(module, layout_of(module), stored_fused=True)
    assert all(parameter.is_meta for parameter in unfused.parameters())
    values = {name: torch.randn(empty.shape) for name, empty in unfused._empty.items()}
    with unfused.fused_for_loading():
        assert set(values) <= set(dict(unfused.named_parameters()))
        for name in ("gate_up_proj_bias", "down_proj"):
            unfused._parameters[name] = nn.Parameter(values[name])
    assert not set(values) & set(dict(unfused.named_parameters()))
    up = unfused.get_submodule("3.up_proj")
    assert torch.equal(up.bias, values["gate_up_proj_bias"][3, 1::2])
    assert up.weight.is_meta  # was not loaded
    assert torch.equal(unfused.get_submodule("1.down_proj").weight, values["down_proj"][1].T)


def test_a_token_sent_twice_to_one_expert_is_one_token():
    choice = torch.tensor([[0, 0], [0, 1], [5, 1]])  # 5: no expert
    assert _tokens_per_expert(choice, 3).tolist() == [2, 2, 0]
