"""A fixed choice from all architectures (judge_all.py), which covers every kind of structure."""

from __future__ import annotations

import pytest
from judge import judge
from tiny_configs import model_pairs

RIGHT = (
    "falcon",  # a linear layer with a forward of its own
    "gpt_neo",  # local attention
    "gemma3n_text",  # several streams, embeddings per layer
    "gemma4_text",  # head sizes that differ between layers
    "deepseek_v3",  # latent attention
    "mamba",  # a weight that is used without a call
    "prophetnet",  # an embedding that is used without a call
    "bart",  # encoder-decoder
    "nemotron_h",  # experts without a gate
    "gpt_oss",  # fused in the files: transposed, interleaved, with biases
    "aria_text",  # fused in the files: transposed
    "granitemoe",  # fused in the files under other names
    "qwen3_vl_moe",  # fused and transposed in the files only
    "llama4_text",  # experts that get rows of all tokens
    "jetmoe",  # experts that get sorted tokens
    "dbrx",  # all experts in one matrix
    "longcat_flash",  # experts that return their input
    "phimoe",  # a router that is a linear layer
    "xlm",  # a cache although none was asked for
    "kimi_k25",  # two conversions for the same experts
    "xlm-roberta",  # the tied output embedding comes first in the state
    "modernbert",
    "step3p7",  # experts without transformers' attributes
    "molmo2",  # an embedding that is made of two tensors
    "qwen3_omni_moe_thinker",  # its initialization looks for fused experts
    "hrm_text",  # gate, q, k and v are one tensor in the files
    "lara_mini",  # linear attention whose inputs are one tensor in the files
    "minimax_m3_vl",  # gate and up are two tensors in the files and one layer in the model, also in experts
)
PARTIAL = {
    "inkling2_text": "the files hold it in another form",  # a weight that is not called weight in the files
    "deepseek_v4": "uses its weight in its own way",  # a grouped linear layer, tokens sent twice to one expert
    "zamba": "shares its weight",  # one layer in several blocks
}
REFUSED = {"rwkv": "changes its weights while it runs"}
TASKS = {model_type: task for task, model_type in reversed(model_pairs())}


@pytest.mark.parametrize("model_type", RIGHT)
def test_right(model_type, tmp_path):
    row = judge(TASKS[model_type], model_type, tmp_path)
    assert (row.status, row.reasons) == ("right", [])
    assert row.quantized == 100


@pytest.mark.parametrize("ignored", [r"layers\.0.*v_proj", r"q_proj|k_proj", r"layers\.1.*(k_proj|up_proj)"])
def test_some_layers_of_one_tensor(ignored, tmp_path):
    row = judge("MASKED_LM", "nomic_bert", tmp_path, ignore=(ignored,))
    assert row.status == "partial"
    assert all("asked to stay" in reason for reason in row.reasons)


@pytest.mark.parametrize("model_type", PARTIAL)
def test_partial_with_a_reason(model_type, tmp_path):
    row = judge(TASKS[model_type], model_type, tmp_path)
    assert row.status == "partial"
    assert any(PARTIAL[model_type] in reason for reason in row.reasons)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_the_plan(model_type, tmp_path):
    row = judge(TASKS[model_type], model_type, tmp_path)
    assert row.status == "refused"
    assert REFUSED[model_type] in row.reasons[0]
