"""The full-precision path beside the quantized one: hold-out, correction, and measured errors."""

import pytest
import torch
from torch import nn

import fewbit
from fewbit.demo import calibration_text, evaluation_text, model_path
from fewbit.pipeline.statistics import BatchMasks, split_holdout
from models import random_sequences, tiny_model, tiny_tokenizer

SMALL = {"group_size": 16, "seq_len": 24}


def quantize(model, dataset, **options):
    config = fewbit.QuantConfig(**{**SMALL, **options})
    return fewbit.quantize(model, config, dataset=dataset, tokenizer=tiny_tokenizer()).fewbit_report


@pytest.mark.parametrize(
    ("batches", "held_out"),
    [([1], [0]), ([1, 1], [0, 1]), ([4], [1]), ([1] * 32, [0] * 30 + [1, 1]), ([16, 16, 16], [0, 0, 3]),
     ([2] * 100, [0] * 96 + [2] * 4), ([40, 1], [1, 1]), ([100, 1], [5, 1])],
)  # fmt: skip
def test_a_sixteenth_is_held_out(batches, held_out):
    masks = [BatchMasks(sequences=count) for count in batches]
    assert [batch.held_out for batch in split_holdout(masks)] == held_out


def test_holdout_enters_no_hessian_at_any_batch_size():
    sequences = random_sequences(20)
    seen = {}
    for batch_size in (1, 4, 20):
        layers = quantize(tiny_model("llama"), sequences, batch_size=batch_size).layers
        assert {layer["tokens"] for layer in layers} == {19 * 24}
        assert {layer["held_out"] for layer in layers} == {24}
        seen[batch_size] = [layer["loss"] for layer in layers[:3]]
    assert seen[4] == pytest.approx(seen[1], rel=1e-3)
    assert seen[20] == pytest.approx(seen[1], rel=1e-3)


def test_one_path_holds_out_nothing_and_measures_no_true_error():
    for options in ({"fast": True}, {"correction": 0}):
        layers = quantize(tiny_model("llama"), random_sequences(20), **options).layers
        assert {layer["tokens"] for layer in layers} == {20 * 24}
        assert {(layer["true_error"], layer["correction"]) for layer in layers} == {(None, None)}


def test_true_error_is_measured_on_holdout_outputs():
    model, original = tiny_model("llama"), tiny_model("llama")
    sequences = random_sequences(8)
    report = quantize(model, sequences, bits=2, correction=0.5)
    held_out = {"input_ids": sequences[-1]["input_ids"][None]}
    outputs = {}
    for whole in (original, model):
        for layer in report.layers:
            module = whole.get_submodule(layer["name"])
            module.register_forward_hook(
                lambda m, a, y, k=(layer["name"], whole is model): outputs.update({k: y})
            )
        with torch.no_grad():
            whole(**held_out)
    for layer in report.layers:
        want, got = outputs[layer["name"], False], outputs[layer["name"], True]
        # The model runs the kernel on the packed weights; the pipeline measured with float32 weights.
        assert layer["true_error"] == pytest.approx(float((got - want).norm() / want.norm()), rel=0.02)


@pytest.fixture(scope="module")
def demo_reports(tmp_path_factory):
    """The trained demo model at 3 bits: without correction and with the automatic one."""
    folder = tmp_path_factory.mktemp("demo")
    reports = {}
    for name, options in {"none": {"correction": 1e-9}, "auto": {}}.items():
        config = fewbit.QuantConfig(bits=3, group_size=64, num_samples=48, seq_len=128, **options)
        reports[name] = fewbit.quantize(
            model_path(),
            config,
            dataset=calibration_text(),
            output=folder / name,
            evaluate_on=evaluation_text(),
        )
    return reports


@pytest.mark.slow
def test_auto_correction_lowers_true_error(demo_reports):
    def mean(report):
        return sum(layer["true_error"] for layer in report.layers) / len(report.layers)

    assert mean(demo_reports["auto"]) < 0.95 * mean(demo_reports["none"])
    alphas = [layer["correction"] for layer in demo_reports["auto"].layers]
    assert alphas[:3] == [0.0, 0.0, 0.0]  # the first layers get the original inputs
    assert all(0 <= alpha <= 1 for alpha in alphas)
    assert max(alphas) > 0.3


@pytest.mark.slow
def test_auto_correction_lowers_kl(demo_reports):
    kl = {name: report.evaluation["quantized"]["kl"] for name, report in demo_reports.items()}
    assert kl["auto"] < kl["none"]


def test_single_sequence_is_noted():
    report = quantize(tiny_model("llama"), random_sequences(1))
    assert any("a single calibration sequence" in note for note in report.notes)
    assert {(layer["true_error"], layer["correction"]) for layer in report.layers} == {(None, 0.0)}


class Routed(nn.Module):
    """The second half of the layers gets only the rows that the first half sends there."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, input_ids):
        x = self.first(nn.functional.one_hot(input_ids % 32, 32).float())
        return self.expert(x[x[..., 0] > 0.05])


def test_unpaired_rows_are_not_corrected():
    torch.manual_seed(0)
    model = Routed()
    fewbit.quantize(model, fewbit.QuantConfig(bits=2, group_size=32), dataset=random_sequences(6))
    first, expert = model.fewbit_report.layers
    assert first["true_error"] is not None
    assert (expert["true_error"], expert["correction"]) == (None, None)
    assert expert["tokens"] > 0
    assert any("do not belong together" in note for note in model.fewbit_report.notes)


class Chosen(nn.Module):
    """The second layer gets as many rows on both paths, but not the same ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = self.first(x)
        return self.second(torch.randn_like(y))


def test_unrelated_rows_of_equal_shape_are_not_corrected():
    torch.manual_seed(0)
    model = Chosen()
    batches = [{"x": torch.randn(8, 32)} for _ in range(8)]
    fewbit.quantize(model, fewbit.QuantConfig(bits=2, group_size=32, correction=0.5), dataset=batches)
    first, second = model.fewbit_report.layers
    assert (first["correction"], first["held_out"]) == (0.5, 4)
    assert (second["correction"], second["held_out"], second["tokens"]) == (None, 0, 64)


class Again(nn.Module):
    """The same layer twice, then another; it looks at values."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.last(self.shared(self.shared(x) if x.sum().item() > -1e9 else x))


def test_reference_through_a_quantized_layer_is_noted():
    torch.manual_seed(0)
    model = Again()
    batches = [{"x": torch.randn(8, 32)} for _ in range(3)]
    fewbit.quantize(model, fewbit.QuantConfig(bits=2, group_size=32), dataset=batches)
    notes = model.fewbit_report.notes
    assert any("3 inputs reached 1 layers after they were solved" in note for note in notes)
    assert any("3 inputs of the full-precision path reached layers after" in note for note in notes)


def test_infinite_holdout_tokens_are_dropped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32))
    batches = [{"input": torch.randn(1, 8, 32)} for _ in range(4)]
    batches[3]["input"][0, 2, 5] = float("inf")
    fewbit.quantize(model, fewbit.QuantConfig(bits=3, group_size=32), dataset=batches)
    (layer,) = model.fewbit_report.layers
    assert (layer["tokens"], layer["held_out"], layer["dropped"]) == (24, 7, 1)


def test_convolutions_are_corrected():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
    images = [{"input": torch.randn(2, 3, 12, 12)} for _ in range(8)]
    fewbit.quantize(model, fewbit.QuantConfig(bits=3, group_size=8, correction=0.5), dataset=images)
    second = model.fewbit_report.layers[1]
    assert second["correction"] == 0.5
    assert second["held_out"] == 25
    assert second["tokens"] == 15 * 25
