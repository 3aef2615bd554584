"""Run benchmark tasks of lm-evaluation-harness on a loaded model.

The harness defines the tasks, prompts and scores. Most tasks load their questions from the Hub.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CalibrationError, ConfigError, DependencyError


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: name of the task or group of tasks.
        metric: name of the metric in the harness, such as "acc" or "acc_norm".
        value: value of the metric.
        stderr: standard error of `value`; None if the harness gives none.
        examples: number of questions; None for a group.
        num_fewshot: number of answered questions in front of each question; None for a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int | None
    num_fewshot: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    tasks_folder: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> list[Score]:
    """Score `model` on benchmark tasks.

    Args:
        model: a causal language model, quantized or not.
        tasks: names of tasks, groups or tags in the harness.
        tasks_folder: folder with more task files (.yaml), which may contain Python code that is run.
        num_fewshot: number of answered questions in front of each question; None for the task's default.
        limit: maximum number of questions per task; None for all.
        batch_size: prompts in a forward pass.

    Returns:
        The scores in the order of the harness.

    Raises:
        DependencyError: lm-evaluation-harness is not installed.
        ConfigError: a task is not known, or the folder does not exist.
        CalibrationError: a task's questions cannot be read.
    """
    require_harness()
    folder = None
    if tasks_folder is not None:
        folder = Path(tasks_folder).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder} with task files")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings do not apply here
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder.resolve()))
    _check_known(tasks, manager.all_tasks)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
        )
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"the questions of {', '.join(tasks)} cannot be read: {reason}. Most tasks load them from the Hub; "
            "without a network use tasks of your own (--tasks-folder)"
        ) from error
    return _scores(found)


def require_harness() -> None:
    """Raise DependencyError if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DependencyError("benchmark tasks need lm-evaluation-harness: pip install lm_eval accelerate")


def _check_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    if not tasks:
        raise ConfigError("name at least one task, such as arc_easy")
    for task in tasks:
        if task not in known:
            raise ConfigError(
                f"lm-evaluation-harness has no task {task!r}; `lm_eval ls tasks` lists the {len(known):,} that it has, "
                "and --tasks-folder adds your own"
            )


def _scores(found: Any) -> list[Score]:
    examples, shots = found["n-samples"], found["n-shot"]
    scores = []
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            scores.append(
                Score(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                    examples=examples[task]["effective"] if task in examples else None,
                    num_fewshot=shots.get(task),
                )
            )
    return scores
