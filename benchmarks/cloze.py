"""Does a model that lost more in KL divergence also answer worse? Cloze questions from held-out text, in lm-eval.

    python benchmarks/prepare.py
    python benchmarks/cloze.py ORIGINAL CHECKPOINT …            # folders; needs pip install lm_eval accelerate
    fewbit eval CHECKPOINT --against ORIGINAL --tasks cloze_wiki --tasks-folder F   # after --write F: the same task

A question is the 20 words in front of the last word of a sentence, with eight words to choose from: the right one, and
seven that end other sentences of the same text and are as long, give or take a letter. The answer is the word with the
highest log-likelihood. Questions come from the texts on which KL is measured too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from pathlib import Path

import prepare

TEXTS = {"cloze_wiki": prepare.TEST, "cloze_austen": prepare.AUSTEN_TEST}
CHOICES, WORDS_IN_FRONT = 8, 20
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def questions(text: str, count: int, seed: int = 0) -> list[dict[str, object]]:
    """`count` questions from sentences that are spread evenly over `text`."""
    chance = random.Random(seed)
    words = text.split()
    ends = [i for i, word in enumerate(words) if i >= WORDS_IN_FRONT and re.fullmatch(r"[a-z]{4,12}\.", word)]
    last = sorted({words[i][:-1] for i in ends})
    found = []
    for i in ends[:: max(1, len(ends) // count)][:count]:
        right = words[i][:-1]
        alike = [word for word in last if word != right and abs(len(word) - len(right)) <= 1]
        choices = [right, *chance.sample(alike, CHOICES - 1)]
        chance.shuffle(choices)
        question = " ".join(words[i - WORDS_IN_FRONT : i])
        found.append({"question": question, "choices": choices, "answer": choices.index(right)})
    return found


def write_tasks(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in TEXTS.items():
        file = folder.resolve() / f"{name}.jsonl"
        rows = questions(path.read_text(encoding="utf-8"), count)
        file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", type=Path, help="folders: dense models or checkpoints")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep the tasks here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.write or Path(temporary)
        write_tasks(folder, arguments.questions)
        for path in arguments.models:
            print(path.name, *scores(path, folder), sep=" | ", flush=True)


def scores(path: Path, folder: Path) -> list[str]:
    """Accuracy on both tasks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fewbit
    from fewbit.hf.lm_eval import run_tasks

    quantized = "quantization_config" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    load = fewbit.load if quantized else AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = run_tasks(model, tokenizer, list(TEXTS), tasks_folder=folder, batch_size=8)
    return [f"{score.value:.3f} ± {score.stderr or 0:.3f}" for score in found if score.metric == "acc"]


if __name__ == "__main__":
    main()
