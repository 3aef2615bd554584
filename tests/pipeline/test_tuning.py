"""`--tune` inside the walk: blocks are tuned as they are left, and later blocks see the tuned ones."""

import json
import math
import signal

import pytest
import torch
from torch import nn

import fewbit
from fewbit.demo import calibration_text, evaluation_text, model_path
from fewbit.errors import CalibrationError
from fewbit.pipeline.journal import Journal
from fewbit.pipeline.tune_block import tune_block
from models import random_sequences, tiny_model, tiny_tokenizer

OPTIONS = {"bits": 2, "group_size": 64, "sym": False, "num_samples": 16, "seq_len": 64}
STEPS = 12


def run(output, **options):
    config = fewbit.QuantConfig(**OPTIONS, **options)
    return fewbit.quantize(model_path(), config, dataset=calibration_text(), output=output)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "out"
    return folder, run(folder, tune=True, tune_steps=STEPS)


def test_every_block_improves(tuned):
    _, report = tuned
    for layer in report.layers:
        before, after = layer["block_error"]
        assert after <= before
        assert layer["tuned"] == (after < before)
    assert sum(layer["tuned"] for layer in report.layers) > len(report.layers) / 2
    assert "tune" in report.seconds_by_phase


@pytest.mark.slow
def test_the_tuned_model_is_closer_to_the_original(tuned, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fewbit.evaluation import evaluate, windows

    run(tmp_path / "plain")
    text = windows(evaluation_text(), AutoTokenizer.from_pretrained(model_path()), 128, 24)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    kl = [
        evaluate(fewbit.load(folder, dtype=torch.float32), text, against=base).kl
        for folder in (tuned[0], tmp_path / "plain")
    ]
    assert kl[0] < kl[1]


class Killed(BaseException):
    pass


def test_resumes_to_the_same_bytes(tuned, tmp_path, monkeypatch):
    output, append = tmp_path / "out", Journal.append

    def dying(self, block, tensors, records):
        append(self, block, tensors, records)
        if block.endswith(".1"):
            raise Killed(signal.SIGKILL)

    monkeypatch.setattr(Journal, "append", dying)
    with pytest.raises(Killed):
        run(output, tune=True, tune_steps=STEPS)
    monkeypatch.undo()
    report = run(output, tune=True, tune_steps=STEPS)
    assert 0 < report.resumed_layers < report.modules
    for path in tuned[0].glob("*.safetensors"):
        assert path.read_bytes() == (output / path.name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert config == json.loads((tuned[0] / "config.json").read_text())


def test_untunable_layers_are_left_to_the_solver():
    model = tiny_model("llama")
    config = fewbit.QuantConfig(bits=4, group_size=16, seq_len=24, tune=True, tune_steps=2, lm_head=True)
    report = fewbit.quantize(
        model, config, dataset=random_sequences(4), tokenizer=tiny_tokenizer()
    ).fewbit_report
    errors = {layer["name"]: layer["block_error"] for layer in report.layers}
    assert errors.pop("lm_head") is None
    assert None not in errors.values()


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5", "falcon"])
def test_other_families(family):
    model = tiny_model(family)
    config = fewbit.QuantConfig(bits=2, group_size=16, seq_len=24, tune=True, tune_steps=2)
    report = fewbit.quantize(
        model, config, dataset=random_sequences(4), tokenizer=tiny_tokenizer()
    ).fewbit_report
    assert all(layer["block_error"] is not None for layer in report.layers)


def test_padding_does_not_count(monkeypatch):
    sequences = [{"input_ids": s["input_ids"][: 9 + 5 * i]} for i, s in enumerate(random_sequences(4))]
    seen = []

    def spy(block, layers, train, held_out, **options):
        seen.append((train, held_out))
        return tune_block(block, layers, train, held_out, **options)

    monkeypatch.setattr("fewbit.pipeline.block_tuning.tune_block", spy)
    config = fewbit.QuantConfig(bits=2, group_size=16, seq_len=24, tune=True, tune_steps=1, batch_size=2)
    fewbit.quantize(tiny_model("llama"), config, dataset=sequences, tokenizer=tiny_tokenizer())
    assert len(seen) == 2
    for train, held_out in seen:
        # The last sequence judges; it shares its batch with one that trains.
        assert [int(call.mask.sum()) for call in train] == [9 + 14, 19]
        assert [int(call.mask.sum()) for call in held_out] == [24]


def test_one_sequence_is_too_few():
    config = fewbit.QuantConfig(group_size=16, seq_len=24, tune=True)
    with pytest.raises(CalibrationError, match="there is only one: give more text, or leave out tune"):
        fewbit.quantize(tiny_model("llama"), config, dataset=random_sequences(1), tokenizer=tiny_tokenizer())


class Block(nn.Module):
    """A residual block that can be told to be difficult."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        if self.kind == "in place":
            return x.add_(y)
        if self.kind == "list":
            return [x + y]
        return x + y


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(120, 32)
        self.blocks = nn.ModuleList([Block(kind), Block("plain")])

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, list) else x
        return x


@pytest.mark.parametrize(
    ("kind", "reason"), [("in place", "changes its inputs in place"), ("list", "neither a tensor")]
)
def test_block_that_cannot_be_repeated_is_noted(kind, reason):
    torch.manual_seed(0)
    model = Stack(kind)
    config = fewbit.QuantConfig(bits=2, group_size=16, seq_len=24, tune=True, tune_steps=2)
    with torch.no_grad():
        fewbit.quantize(model, config, dataset=random_sequences(4))
    errors = [layer["block_error"] for layer in model.fewbit_report.layers]
    assert errors[:2] == [None, None]
    assert None not in errors[2:]
    assert any("1 blocks were not tuned" in note and reason in note for note in model.fewbit_report.notes)


def test_batches_with_non_finite_tokens_are_dropped():
    torch.manual_seed(0)
    model = Stack("plain")
    sequences = random_sequences(40)
    for sequence in sequences:
        sequence["input_ids"][sequence["input_ids"] == 7] = 8
    sequences[1]["input_ids"][3] = sequences[39]["input_ids"][2] = 7
    config = fewbit.QuantConfig(bits=2, group_size=16, seq_len=24, tune=True, tune_steps=40)
    model.embed.register_forward_hook(
        lambda module, args, y: torch.where((args[0] == 7)[..., None], torch.full_like(y, float("nan")), y)
    )
    fewbit.quantize(model, config, dataset=sequences)
    report = model.fewbit_report
    assert all(layer["dropped"] == 2 for layer in report.layers)
    assert all(math.isfinite(error) for layer in report.layers for error in layer["block_error"])
    assert any(layer["tuned"] for layer in report.layers)
    assert any("2 batches with values that are not finite" in note for note in report.notes)


class Loose(torch.nn.Module):
    """Its numbered blocks are containers that are never called."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(120, 16)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)}) for _ in range(2)
        )

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer["a"](x)
        return x


def test_blocks_never_run_as_a_whole_keep_their_codes():
    config = fewbit.QuantConfig(bits=3, group_size=16, seq_len=24, tune=True)
    report = fewbit.quantize(Loose(), config, dataset=random_sequences(4)).fewbit_report
    assert [layer["block_error"] for layer in report.layers] == [None, None]
