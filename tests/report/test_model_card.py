"""The model card: facts in brief, no paths, no times, a header that the Hub reads."""

import re

import yaml
from huggingface_hub import ModelCard

from fewbit.report.model_card import model_card
from report_samples import dense_layers, evaluation, layer, report


def header(card):
    return yaml.safe_load(card.split("---")[1])


def test_base_model_only_from_the_hub():
    assert header(model_card(report())) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", "fewbit", "4-bit"],
    }
    known = report()
    known["model"]["hub_id"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header(model_card(known))["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert header(model_card(known))["base_model_relation"] == "quantized"
    assert "# HuggingFaceTB/SmolLM2-135M-Instruct, quantized with fewbit" in model_card(known)


def test_the_hub_reads_the_header():
    known = report()
    known["model"] |= {"hub_id": "ann/model", "license": "apache-2.0"}
    data = ModelCard(model_card(known)).data
    assert (data.license, data.base_model, data.pipeline_tag) == (
        "apache-2.0",
        "ann/model",
        "text-generation",
    )
    assert {"gptq", "4-bit"} <= set(data.tags)


def test_no_path_and_no_time_of_this_machine():
    private = report(
        output="/home/ann/secret/out", command="fewbit quantize /home/ann/secret", evaluation=evaluation()
    )
    private["model"]["name"] = "secret"
    private["calibration"]["source"] = "secret.txt"
    card = model_card(private)
    assert "secret" not in card
    assert "ann" not in re.findall(r"\w+", card)
    slower = {
        **private,
        "seconds": 99.0,
        "peak_memory_bytes": 1,
        "phases": [],
        "resumed_layers": 7,
        "notes": ["line 3"],
    }
    assert model_card(slower) == card


def test_facts():
    card = model_card(report())
    assert "| model | LlamaForCausalLM, 134 M parameters |" in card
    assert "| bits | 4 bits, group 64; symmetric |" in card
    assert "| bits per weight | 4.358 in the quantized layers, 6.810 over the whole model |" in card
    assert "| size | 114 MB, from 269 MB in bfloat16 |" in card
    assert "| quantized | 210 layers; 1 weight matrix left as they are |" in card
    assert "| calibration | 4,096 tokens in 8 sequences |" in card
    assert "on average, against full precision |" in card
    assert re.search(r"correction α = 0\.\d+ on average \|", card)


def test_evaluation():
    assert "Evaluation" not in model_card(report())
    card = model_card(report(evaluation=evaluation()))
    assert "| perplexity | 22.26 ± 0.51 | 24.90 ± 0.58 |" in card
    assert "| KL divergence from the original, nats per token | 0 | 0.127 ± 0.004 |" in card
    assert "| same first choice as the original |  | 84.3 % |" in card


def test_snippets_name_the_repository():
    assert 'fewbit.load("path/to/this/folder")' in model_card(report())
    card = model_card(report(engines={"vllm": [], "sglang": []}), "ann/model-4bit")
    for snippet in (
        'fewbit.load("ann/model-4bit")',
        'from_pretrained("ann/model-4bit")',
        "vllm serve ann/model-4bit",
        "sglang.launch_server --model-path ann/model-4bit",
    ):
        assert snippet in card


def test_only_engines_that_load_the_files_are_recommended():
    card = model_card(report(engines={"vllm": ["210 layers: 3 bits"], "sglang": []}))
    assert "vllm" not in card
    assert "sglang.launch_server" in card
    assert "GPU" not in model_card(report())


def test_limits_follow_from_the_plan():
    note = "210 layers have 576 inputs, which group size 128 does not divide"
    assert f"- {note}" in model_card(report(plan_notes=[note]))
    assert "To know" not in model_card(report(notes=["only about this run"]))


def test_round_to_nearest_and_mixed_bits():
    layers = [
        layer(f"h.{i}.x", bits=bits, method="rtn", output_error=None) for i, bits in enumerate((2, 3, 4, 8))
    ]
    mixed = report(layers, calibration={"source": "none", "sequences": 0, "tokens": 0})
    card = model_card(mixed)
    assert "| bits | 4 settings, see `config.json`; symmetric |" in card
    assert "| method | round-to-nearest |" in card
    assert "| calibration | none |" in card
    assert "| output error of a layer | not measured |" in card
    assert header(card)["tags"] == ["gptq", "fewbit", "2-bit", "3-bit", "4-bit", "8-bit"]


def test_a_method_for_some_layers():
    card = model_card(report([layer("h.0.x"), layer("h.1.x", method="rtn")]))
    assert "; 1 layer round-to-nearest |" in card


def test_error_without_a_full_precision_path():
    card = model_card(report([{**item, "true_error": None} for item in dense_layers(2)]))
    assert "on average, added by the layer itself |" in card
