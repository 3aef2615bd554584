"""Before a quantization: settings for engines, and refusals of exports, from the real widths and the real model."""

import json

import pytest
from test_gguf_file import byte_level_tokenizer
from typer.testing import CliRunner

import fewbit
from fewbit.cli.main import app
from fewbit.engines import ENGINES, engine, of_plan, unsupported_reasons
from fewbit.errors import CheckpointError, ConfigError, OutputError
from fewbit.exports.before import check_export, open_prospect, settings_for
from models import save_tiny, tiny_model


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """Inputs of 192 and 384: 128 does not divide the first."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", hidden_size=192, intermediate_size=384, vocab_size=200).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("to", "settings", "words"),
    [
        ("awq", {"bits": 3}, "3 bits"),
        ("awq", {"target_bits": 3.5}, "2 bits"),
        ("awq", {"override": {"down_proj": {"bits": 8}}}, "down_proj: 8 bits"),
        ("awq", {"override": {"down_proj": {"group_size": 32}}}, "one group size"),
        ("mlx", {"sym": False}, "rounded"),
        ("gguf", {"act_order": "full"}, "act-order"),
        ("gguf", {"bits": 8, "sym": False}, "asymmetric"),
        ("gguf", {"group_size": 128}, "q_proj: 192 inputs are no multiple of the group size 128"),
        ("auto-round", {"sym": False}, "asymmetric"),
        ("compressed-tensors", {"act_order": "full"}, "act-order"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_work(to, settings, words, llama_folder, tmp_path):
    prospect, output = open_prospect(llama_folder), tmp_path / "out.gguf"
    with pytest.raises(ConfigError, match=words):
        check_export(prospect, fewbit.QuantConfig(**{"group_size": 64, **settings}), to, output)
    config = fewbit.QuantConfig(group_size=64)
    check_export(prospect, config, to, output)
    output.write_text("something else")
    with pytest.raises(OutputError, match=r"out\.gguf"):
        check_export(prospect, config, to, output)


def test_a_model_that_a_gguf_file_cannot_hold_is_refused_before_the_work(tmp_path):
    save_tiny(tmp_path / "gpt2", "gpt2", n_embd=64)
    config = fewbit.QuantConfig(group_size=32)
    with pytest.raises(CheckpointError, match=r"knows the model types llama, .* and this one is 'gpt2'"):
        check_export(open_prospect(tmp_path / "gpt2"), config, "gguf", tmp_path / "out.gguf")
    save_tiny(tmp_path / "llama", hidden_size=64, intermediate_size=128)
    with pytest.raises(CheckpointError, match="splits text in a way without a name there"):
        check_export(open_prospect(tmp_path / "llama"), config, "gguf", tmp_path / "out.gguf")
    (tmp_path / "llama" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        check_export(open_prospect(tmp_path / "llama"), config, "gguf", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("names", "settings", "chosen"),
    [
        (["vllm"], {}, (64, "gptq")),
        (["llama.cpp"], {}, (32, "gptq")),
        (["mlx-lm"], {}, (64, "gptq")),
        (["llama.cpp", "vllm"], {}, (32, "gptq")),
        (["vllm"], {"group_size": 32}, (32, "gptq")),
        (["gptqmodel"], {"sym": False}, (128, "gptq_v2")),
        (["vllm-humming"], {"sym": False, "bits": 3}, (64, "gptq_v2")),
    ],
)
def test_what_the_user_leaves_open_is_chosen(names, settings, chosen, llama_folder):
    prospect, config = open_prospect(llama_folder), fewbit.QuantConfig(**settings)
    found = settings_for(names, prospect, config, settings)
    assert (found.group_size, found.format) == chosen
    assert {name: getattr(found, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (["vllm"], {"bits": 3}, "vLLM 0.32 on NVIDIA GPUs could not load the result: 14 layers: 3 bits"),
        (["vllm"], {"group_size": 128}, "192 inputs, which groups of 128 do not divide"),
        (["llama.cpp"], {"act_order": "full"}, "groups in the order of activations"),
        (["llama.cpp"], {"bits": 8, "sym": False}, "asymmetric grids at 8 bits"),
        (["sglang", "gptqmodel"], {"sym": False}, "reads from itself only"),
        (["mlx-lm"], {"sym": False}, "asymmetric grids; it takes symmetric ones"),
        (["awq"], {"bits": 8}, "8 bits; it takes 4"),
        (["vllm"], {"target_bits": 4.5}, "2 bits"),
    ],
)
def test_what_an_engine_does_not_take_is_refused(names, settings, words, llama_folder):
    prospect, config = open_prospect(llama_folder), fewbit.QuantConfig(**settings)
    with pytest.raises(ConfigError, match=words):
        settings_for(names, prospect, config, settings)


@pytest.mark.parametrize("entry", [one for one in ENGINES if one.target], ids=lambda one: one.name)
def test_engines_and_exports_agree(entry, llama_folder, tmp_path):
    """What the table says of an engine that reads an export is what the export says."""
    prospect = open_prospect(llama_folder)
    for bits in (2, 3, 4, 8):
        for group_size in (16, 32, 64, 128, -1):
            for sym in (True, False):
                for act_order in ("group", "full"):
                    config = fewbit.QuantConfig(
                        bits=bits, group_size=group_size, sym=sym, act_order=act_order
                    )
                    reasons = unsupported_reasons(entry, of_plan(prospect.plan(config), config))
                    try:
                        check_export(prospect, config, entry.target, tmp_path / "out.gguf")
                    except ConfigError:
                        assert reasons, config
                    else:
                        narrow = entry.group_sizes is not None and group_size not in entry.group_sizes
                        assert not reasons or narrow, (config, reasons)


def test_the_command_chooses_says_so_and_exports(llama_folder, tmp_path):
    (tmp_path / "text.txt").write_text("hello there, he will tell all " * 400)
    given = [
        "quantize",
        str(llama_folder),
        "-o",
        str(tmp_path / "out"),
        "--dataset",
        str(tmp_path / "text.txt"),
    ]
    given += ["--seq-len", "32", "--num-samples", "4", "--fast"]
    runner = CliRunner()
    refused = runner.invoke(app, [*given, "--for", "llama.cpp", "--bits", "8", "--asym"])
    assert isinstance(refused.exception, ConfigError)
    assert not (tmp_path / "out").exists()
    result = runner.invoke(app, [*given, "--for", "llama.cpp"])
    assert result.exit_code == 0, result.output
    assert "group_size is 32, for llama.cpp" in result.output
    assert f"next: fewbit export {tmp_path / 'out'} --to gguf -o {tmp_path / 'out.gguf'}" in result.output
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["group_size"] == 32
    )
    assert engine("llama.cpp").target == "gguf"


def test_the_command_refuses_a_model_type_before_the_work(tmp_path):
    save_tiny(tmp_path / "gpt2", "gpt2", n_embd=64)
    given = ["quantize", str(tmp_path / "gpt2"), "-o", str(tmp_path / "out"), "--group-size", "32"]
    given += ["--dataset", str(tmp_path / "missing.txt"), "--export", "gguf"]
    result = CliRunner().invoke(app, given)
    assert isinstance(result.exception, CheckpointError)
    assert "this one is 'gpt2'" in str(result.exception)
    assert not (tmp_path / "out").exists()
