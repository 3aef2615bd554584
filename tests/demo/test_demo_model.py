"""What ships inside the package: small, loadable offline, trained, and never shown its evaluation text."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit import demo
from fewbit.evaluation import evaluate, windows


def test_everything_is_there_and_small():
    files = [*demo.model_path().iterdir(), demo.calibration_text(), demo.evaluation_text()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        f.name for f in files
    }
    assert sum(file.stat().st_size for file in files) < 4.5e6


def test_the_texts_are_prose_and_share_no_paragraph():
    texts = [path().read_text(encoding="utf-8") for path in (demo.calibration_text, demo.evaluation_text)]
    assert all(len(text) > 150_000 and text.endswith("\n") for text in texts)
    first, second = ({line for line in text.splitlines() if len(line) > 80} for text in texts)
    assert not first & second


def test_the_tokenizer_gives_back_every_text():
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    for text in ('Emma was pleased.\n\n  "Indeed!"', "naïve 日本 🙂 \t x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_model_is_trained_and_widths_suit_every_format():
    model = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 32 == module.out_features % 32 == 0
    assert evaluate(model, windows(demo.evaluation_text(), tokenizer, 512, 8)).perplexity < 25
