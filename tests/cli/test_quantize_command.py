"""The command line as a user meets it: output, exit codes, messages."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fewbit
from fewbit.cli.main import app, run
from models import TEXT, save_tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT * 8)
    return save_tiny(folder / "model"), folder / "text.txt"


SMALL = ["--group-size", "16", "--seq-len", "32", "--num-samples", "4"]


def invoke(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def refused(monkeypatch, capsys, *arguments):
    """Run through the entry point; its exit code must be 2. What it says, on one line."""
    monkeypatch.setattr(sys, "argv", ["fewbit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_quantize_prints_a_summary(tmp_path, inputs, monkeypatch):
    model, text = inputs
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("quantize", model, "-o", tmp_path / "out", "--dataset", text, *SMALL, "-v")
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert "14 layers" in said
    assert "fallbacks none" in said
    assert "model.layers.1.mlp.down_proj" in said


def test_quantize_json_has_the_contract_keys_and_nothing_else_on_stdout(tmp_path, inputs):
    model, text = inputs
    result = invoke("quantize", model, "-o", tmp_path / "out", "--dataset", text, *SMALL, "--json")
    answer = json.loads(result.stdout)
    assert set(answer) == {
        "output", "modules", "bits_per_weight", "model_bits_per_weight", "seconds", "peak_memory_bytes", "fallbacks",
        "report",
    }  # fmt: skip
    assert answer["modules"] == 14


def test_activations_go_to_a_folder_that_must_be_there(tmp_path, inputs, monkeypatch, capsys):
    model, text = inputs
    arguments = ["quantize", model, "-o", tmp_path / "out", "--dataset", text, *SMALL]
    missing = [*arguments, "--offload-dir", tmp_path / "missing"]
    assert "missing: No such file or directory. Create the folder" in refused(monkeypatch, capsys, *missing)
    result = invoke(*arguments, "--offload-dir", tmp_path)
    assert result.exit_code == 0
    assert "were kept on disk" in " ".join(result.stderr.split())


def test_quantize_and_evaluate_in_one_go(tmp_path, inputs):
    model, text = inputs
    result = invoke(
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--dataset",
        text,
        *SMALL,
        "--bits",
        8,
        "--eval",
        text,
        "--json",
    )
    scores = json.loads(result.stdout)["eval"]
    assert scores["base"]["kl"] is None
    assert 0 <= scores["quantized"]["kl"] < 0.01


def test_underscores_and_aliases(tmp_path, inputs):
    model, text = inputs
    result = invoke(
        "quantize", model, "-o", tmp_path / "out", "--dataset", text, "--group_size=16", "--seqlen", 32,
        "--nsamples", 3, "--act_order", "full", "--lm_head", "--asym", "--format", "gptq_v2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["desc_act"], settings["sym"], settings["lm_head"]) == (True, False, True)
    assert settings["checkpoint_format"] == "gptq_v2"
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert report["calibration"]["tokens"] == 96


def test_text_from_stdin(tmp_path, inputs):
    model, _ = inputs
    result = invoke(
        "quantize", model, "-o", tmp_path / "out", "--dataset", "-", *SMALL, "--json", input=TEXT * 4
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["modules"] == 14


def test_override_and_ignore(tmp_path, inputs):
    model, text = inputs
    result = invoke(
        "quantize", model, "-o", tmp_path / "out", "--dataset", text, *SMALL, "--json",
        "--override", "down_proj=bits:8,group_size:-1", "--override", "v_proj=skip", "--ignore", "layers.0.*q_proj",
    )  # fmt: skip
    assert json.loads(result.stdout)["modules"] == 14 - 3
    dynamic = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["dynamic"]
    assert any(key.startswith("-:") for key in dynamic)
    assert {"bits": 8, "group_size": -1} in dynamic.values()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "5"], "bits must be one of 2, 3, 4, 8; got 5"),
        (["--group-size", "0"], "group_size must be positive, or -1"),
        (["--damp", "1.5"], "damp must lie between 0 and 1"),
        (["--override", "x"], "write REGEX=bits:8,group_size:32 or REGEX=skip"),
        (["--ignore", "nothing_here"], "matches no layer of this model"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--max-shard-size", "huge"], "max_shard_size 'huge' is no size"),
        (["--act-order", "sideways"], "sideways"),
        (["--dataset", "ptb"], "no longer supported"),
        (["--dataset", "nothing-like-this"], "wikitext2"),
    ],
)
def test_bad_usage_exits_with_2_and_says_why(tmp_path, inputs, monkeypatch, capsys, arguments, message):
    model, text = inputs
    given = ["quantize", model, "-o", tmp_path / "out", "--dataset", text, *SMALL, *arguments]
    assert message in refused(monkeypatch, capsys, *given)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_missing_dataset_is_said(tmp_path, inputs, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, "quantize", inputs[0], "-o", tmp_path / "out")
    assert "no dataset was given" in said


def test_help_has_examples():
    result = invoke("quantize", "--help")
    assert "fewbit quantize model.gguf -o out" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    "command", ["quantize", "eval", "inspect", "verify", "generate", "serve", "convert", "demo", "env"]
)
def test_every_command_has_help_with_examples_and_can_say_more_or_less(command):
    result = invoke(command, "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    assert f"Examples: fewbit {command} " in shown
    for option in ("--verbose", "-v", "--quiet", "-q", "--help"):
        assert option in shown, option


def test_env_says_what_a_bug_report_needs():
    facts = json.loads(invoke("env", "--json").stdout)
    assert {"fewbit", "torch", "transformers", "python", "compiled solver"} <= set(facts)


def test_env_says_more_or_less():
    assert invoke("env", "-q").stdout == f"{fewbit.__version__}\n"
    assert "torch build" in json.loads(invoke("env", "-v", "--json").stdout)


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "fewbit", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "quantize" in done.stdout


_STATE = """
import logging, sys, time, torch
def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    handlers = {logger.name: [id(h) for h in logger.handlers] for logger in loggers if logger.handlers}
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), handlers
before, modules, start = state(), set(sys.modules), time.perf_counter()
import fewbit
seconds = time.perf_counter() - start
assert state() == before, (before, state())
heavy = {"transformers", "greenlet", "typer", "rich"} & {name.partition(".")[0] for name in set(sys.modules) - modules}
assert not heavy, heavy
print(seconds)
"""


def test_import_has_no_effects_and_is_light():
    done = subprocess.run([sys.executable, "-c", _STATE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


@pytest.mark.parametrize(
    "effect",
    [
        pytest.param("torch.set_num_threads(torch.get_num_threads() + 1)", marks=pytest.mark.slow),
        pytest.param("torch.set_default_dtype(torch.float64)", marks=pytest.mark.slow),
        pytest.param("torch.set_grad_enabled(False)", marks=pytest.mark.slow),
        "logging.getLogger('fewbit').addHandler(logging.StreamHandler())",
        "import rich",
    ],
)
def test_the_check_of_the_import_sees_effects(effect):
    code = _STATE.replace("import fewbit\n", f"{effect}\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AssertionError" in done.stderr


def test_the_demo_says_when_the_compiled_solver_is_missing(monkeypatch):
    from fewbit import native
    from fewbit.demo import showcase

    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler was found at install time"))
    monkeypatch.setattr(showcase.Showcase, "__init__", lambda self, progress: None)
    monkeypatch.setattr(showcase.Showcase, "run", lambda self: [])
    assert "no compiler was found at install time" in " ".join(invoke("demo").stderr.split())


def test_accuracy_options(tmp_path, inputs):
    model, text = inputs
    common = ["quantize", model, "--dataset", text, *SMALL, "--json"]
    for name, options, expected in (
        ("fast", ["--fast"], (None, None)),
        ("half", ["--correction", "0.5"], (0.5, True)),
        ("none", ["--correction", "0", "--tune", "--tune-steps", "2"], (0.0, True)),
        ("tuned", ["--tune", "--tune-steps", "2"], (None, True)),
    ):
        result = invoke(*common, "-o", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        last = json.loads((tmp_path / name / "fewbit_report.json").read_text())["layers"][-1]
        assert (last["true_error"] is not None) == bool(expected[1])
        assert name == "tuned" or last["correction"] == expected[0]
        assert (last["block_error"] is not None) == ("--tune" in options)


def test_a_correction_that_is_no_number(tmp_path, inputs, monkeypatch, capsys):
    model, text = inputs
    arguments = ("quantize", model, "-o", tmp_path / "out", "--dataset", text, "--correction", "much")
    assert "correction must lie between 0 and 1, or be 'auto'" in refused(monkeypatch, capsys, *arguments)
