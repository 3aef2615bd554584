"""The whole estimate on tiny models: it covers what a run does, and agrees with it where that is exact."""

import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit import QuantConfig
from fewbit.estimate import estimate
from models import TEXT, random_sequences, save_tiny

MOE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5", "mixtral"])
def test_the_plan_is_what_the_run_does(tmp_path, family):
    model = save_tiny(tmp_path / "model", family, **(MOE if family == "mixtral" else {}))
    config = QuantConfig(group_size=16, seq_len=24)
    found = estimate(model, config, dataset=random_sequences())
    report = fewbit.quantize(model, config, dataset=random_sequences(), output=tmp_path / "out")
    planned = [module for module in found.modules() if module["reason"] is None]
    assert [module["name"] for module in planned] == [layer["name"] for layer in report.layers]
    assert [module["bytes"] for module in planned] == [layer["stored_bytes"] for layer in report.layers]
    assert sum(module["reason"] is not None for module in found.modules()) == len(report.skipped)
    assert found.works
    assert all(seconds >= 0 for seconds in found.seconds.values())


def test_round_to_nearest_needs_no_text(model_folder):
    found = estimate(model_folder, QuantConfig(group_size=16, method="rtn"))
    assert found.works
    assert found.seconds["forward passes"] == found.seconds["Hessians"] == 0
    assert "activations" not in {name for name, size in found.memory.parts.items() if size}


@pytest.mark.parametrize(("options", "name"), [({"target_bits": 4.9}, "target_bits"), ({}, "evaluation")])
def test_the_time_of_options_is_left_out_with_a_note(model_folder, options, name):
    config = QuantConfig(**{"group_size": 16, "seq_len": 24, **options})
    text = [TEXT * 20] if name == "evaluation" else None
    found = estimate(model_folder, config, dataset=random_sequences(), evaluate_on=text)
    assert found.works
    assert f"the time of {name} is not included" in found.notes
    assert not any(
        "not included" in note for note in estimate(model_folder, QuantConfig(group_size=16)).notes
    )


def added(memory):
    """The peak without what this process held before, which varies from test to test."""
    return memory.peak - memory.parts["libraries"]


def test_presets_have_a_time_and_a_moment(model_folder):
    fast, default, best = (
        estimate(
            model_folder,
            QuantConfig(group_size=16, seq_len=24, quality=quality),
            dataset=random_sequences(),
        )
        for quality in ("fast", "default", "best")
    )
    assert all(found.works for found in (fast, default, best))
    assert fast.seconds["forward passes"] < default.seconds["forward passes"]
    assert best.seconds.keys() - default.seconds.keys() == {"tuning", "distillation"}
    assert min(best.seconds["tuning"], best.seconds["distillation"]) > 0
    assert added(best.memory) >= added(default.memory)


def test_loss_aware_has_a_time_and_takes_memory(model_folder):
    plain, loss_aware = (
        estimate(
            model_folder,
            QuantConfig(group_size=16, loss_aware=chosen, seq_len=24),
            dataset=random_sequences(),
        )
        for chosen in (False, True)
    )
    assert loss_aware.works
    assert loss_aware.seconds.keys() - plain.seconds.keys() == {"gradients"}
    assert loss_aware.seconds["gradients"] > 0
    assert added(loss_aware.memory) > added(plain.memory)


def test_activations_grow_with_the_tokens(model_folder):
    few, many = (
        estimate(model_folder, QuantConfig(group_size=16, num_samples=count, seq_len=100))
        for count in (10, 1000)
    )
    # Not exactly: the worst moments of the two are at different layers.
    assert many.memory.parts["activations"] == pytest.approx(100 * few.memory.parts["activations"], rel=0.1)


def test_weights_that_are_read_at_once_count_once(tmp_path):
    model = save_tiny(tmp_path / "model")
    file = model / "model.safetensors"
    torch.save(load_file(file), model / "pytorch_model.bin")
    size = file.stat().st_size
    file.unlink()
    config = QuantConfig(group_size=16, seq_len=24)
    found = estimate(model, config, dataset=random_sequences(), allow_pickle=True)
    assert found.works
    assert found.memory.parts["weights"] == pytest.approx(size, rel=0.1)
    assert found.seconds["checking the source"] > 0


def test_each_of_several_processes_takes_less_memory(tmp_path):
    model = save_tiny(tmp_path / "model", hidden_size=96)
    config = QuantConfig(group_size=16, num_samples=400, seq_len=100)
    alone, divided = (estimate(model, config, processes=processes) for processes in (1, 4))
    assert divided.memory.parts["activations"] == pytest.approx(
        alone.memory.parts["activations"] / 4, rel=0.01
    )
    assert divided.details()["processes"] == 4


def test_what_several_processes_cannot_do_is_a_problem(tmp_path):
    model = save_tiny(tmp_path / "model")
    [problem] = estimate(model, QuantConfig(group_size=16), dataset="-", processes=2).problems
    assert problem.startswith("standard input cannot be read by all 2 processes")
    [problem] = estimate(model, QuantConfig(group_size=16), dataset=random_sequences(), processes=0).problems
    assert problem == "there cannot be 0 processes: give 1 or more"


def test_a_distillation_is_planned(tmp_path):
    model = save_tiny(tmp_path / "model")
    config = QuantConfig(group_size=16, seq_len=24, distill=True, distill_tokens=48_000)
    found = estimate(model, config, dataset=random_sequences(), output=tmp_path / "out")
    assert found.works
    assert found.seconds["distillation"] > found.seconds["forward passes"]
    more = QuantConfig(**{**config.to_dict(), "distill_tokens": 480_000})
    assert (
        estimate(model, more, dataset=random_sequences()).seconds["distillation"]
        > found.seconds["distillation"]
    )
    t5 = estimate(save_tiny(tmp_path / "t5", "t5"), config, dataset=random_sequences())
    assert any("causal language models" in problem for problem in t5.problems)
