"""Benchmarks with lm-evaluation-harness: with a stand-in for it, and, slow, with itself and tasks in a folder.

pip install lm_eval accelerate && python -m pytest -m slow tests/hf/test_lm_eval.py
"""

import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
from typer.testing import CliRunner

from fewbit import demo
from fewbit.cli.main import app
from fewbit.errors import CalibrationError, ConfigError, DependencyError
from fewbit.hf.lm_eval import run_tasks
from tiny_gptq import llama

MODEL = str(demo.model_path())


def run(*args):
    return CliRunner().invoke(app, ["eval", *map(str, args), "--device", "cpu", "-q"])


@pytest.fixture
def harness(monkeypatch):
    """A `lm_eval` that records what it is asked and answers as the real one does."""
    asked = types.SimpleNamespace(calls=[], answer=None)

    def simple_evaluate(**arguments):
        asked.calls.append(arguments)
        if isinstance(asked.answer, Exception):
            raise asked.answer
        return {
            "results": {
                "arc_easy": {
                    "name": "arc_easy", "alias": "arc_easy", "sample_len": 7,
                    "acc,none": 0.25, "acc_stderr,none": 0.125, "acc,flexible": 0.5, "acc_stderr,flexible": "N/A",
                },
                "both": {"alias": "both", "acc,none": 1, "acc_stderr,none": "N/A"},
            },
            "n-samples": {"arc_easy": {"original": 9, "effective": 7}},
            "n-shot": {"arc_easy": 2},
        }  # fmt: skip

    class TaskManager:
        def __init__(self, include_path):
            self.folder = include_path
            self.all_tasks = ["arc_easy", "both"]

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **arguments: types.SimpleNamespace(**arguments)},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_scores_and_arguments_pass_through(harness, tmp_path):
    result = run(MODEL, "--tasks", "arc_easy, both", "--num-fewshot", 2, "--limit", 7, "--batch-size", 3,
                 "--tasks-folder", tmp_path, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "tasks": [
            {"task": "arc_easy", "metric": "acc", "value": 0.25, "stderr": 0.125, "examples": 7, "num_fewshot": 2},
            {
                "task": "arc_easy", "metric": "acc (flexible)", "value": 0.5, "stderr": None,
                "examples": 7, "num_fewshot": 2,
            },
            {"task": "both", "metric": "acc", "value": 1.0, "stderr": None, "examples": None, "num_fewshot": None},
        ]
    }  # fmt: skip
    (asked,) = harness.calls
    assert (asked["tasks"], asked["num_fewshot"], asked["limit"]) == (["arc_easy", "both"], 2, 7)
    assert asked["task_manager"].folder == str(tmp_path)
    assert asked["model"].batch_size == 3
    assert type(asked["model"].pretrained).__name__ == "LlamaForCausalLM"


def test_the_original_is_asked_the_same_and_a_text_may_come_along(harness):
    result = run(MODEL, "--against", MODEL, "--tasks", "arc_easy", "--dataset", demo.evaluation_text(),
                 "--seq-len", 32, "--num-samples", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert result.stdout.count("0.2500 ± 0.1250") == 2
    assert "original" in result.stdout
    assert len(harness.calls) == 2


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ((), ConfigError, "nothing to measure on: give --dataset TEXT for perplexity, or --tasks"),
        (("--tasks", "arc_hard"), ConfigError, "has no task 'arc_hard'; `lm_eval ls tasks` lists the 2"),
        (("--tasks", ","), ConfigError, "name at least one task"),
        (("--tasks", "arc_easy", "--tasks-folder", "nowhere"), ConfigError, "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_asked(options, kind, words, harness):
    error = run(MODEL, *options).exception
    assert isinstance(error, kind)
    assert words in str(error)


def test_questions_that_cannot_be_read(harness):
    harness.answer = ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nand so on")
    with pytest.raises(
        CalibrationError, match=r"questions of arc_easy cannot be read: .* on the Hub\. Most tasks"
    ):
        run_tasks(llama(), None, ["arc_easy"])


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="need lm-evaluation-harness: pip install lm_eval accelerate"):
        run_tasks(llama(), None, ["arc_easy"])
    assert isinstance(run("no-such-model", "--tasks", "arc_easy").exception, DependencyError)


TASK = """\
task: austen
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_the_harness_itself_with_a_task_of_ones_own(tmp_path):
    pytest.importorskip("lm_eval")
    text = demo.evaluation_text().read_text()
    rows = [
        {
            "start": text[at : at + 200],
            "good": text[at + 200 : at + 230],
            "bad": text[at + 200 : at + 230][::-1],
        }
        for at in range(0, 6000, 300)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "austen.yaml").write_text(TASK.format(questions=tmp_path / "questions.jsonl"))
    result = run(MODEL, "--tasks", "austen", "--tasks-folder", tmp_path, "--limit", 12, "--json")
    assert result.exit_code == 0, result.output
    (score,) = json.loads(result.stdout)["tasks"]
    assert (score["task"], score["metric"], score["examples"]) == ("austen", "acc", 12)
    assert score["value"] > 0.9  # words forward against words backward
    assert score["stderr"] is not None
