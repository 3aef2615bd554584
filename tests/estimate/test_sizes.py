"""Predicted bytes against those of a finished run."""

import pytest

import fewbit
from fewbit import QuantConfig
from fewbit.estimate import estimate
from models import random_sequences, save_tiny


@pytest.mark.parametrize(
    "options", [{}, {"lm_head": True}, {"bits": 3, "sym": False, "group_size": -1}, {"dtype": "bfloat16"}]
)
def test_the_files_have_the_predicted_sizes(tmp_path, options):
    model = save_tiny(tmp_path / "model")
    config = QuantConfig(**{"group_size": 16, **options})
    found = estimate(model, config, dataset=random_sequences(), output=tmp_path / "out")
    report = fewbit.quantize(model, config, dataset=random_sequences(), output=tmp_path / "out")
    assert found.sizes.quantized == report.quantized_bytes
    assert found.bits_per_weight == report.bits_per_weight
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert report.model_bits_per_weight == 8 * weights / report.model["parameters"]
    header = weights - found.sizes.quantized - found.sizes.plain
    expected = report.model_bits_per_weight - 8 * header / report.model["parameters"]
    assert found.model_bits_per_weight == pytest.approx(expected)
    assert 0 <= weights - found.sizes.quantized - found.sizes.plain < 8000  # the header
    everything = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert found.sizes.output == pytest.approx(everything, rel=0.15)


def test_the_hessians_of_the_outputs_take_what_is_predicted(tmp_path):
    model = save_tiny(tmp_path / "model")
    config, data = QuantConfig(group_size=16, loss_aware=True), random_sequences()

    class KilledError(Exception):
        pass

    def kill(phase, done, total):
        if phase == "quantize":
            raise KilledError

    found = estimate(model, config, dataset=data, output=tmp_path / "out")
    with pytest.raises(KilledError):
        fewbit.quantize(model, config, dataset=data, output=tmp_path / "out", progress=kill)
    stored = (tmp_path / "out" / ".fewbit" / "output_hessians.safetensors").stat().st_size
    assert 0 <= stored - found.sizes.output_hessians < 8000  # the header
    assert found.sizes.disk - found.sizes.output - found.sizes.journal == found.sizes.output_hessians
