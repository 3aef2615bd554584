"""`target_bits` from `fewbit.quantize` to the checkpoint: met, filled, resumed, and read by everybody."""

import json

import pytest
import torch
from typer.testing import CliRunner

import fewbit
from fewbit import mixed_precision as budget
from fewbit.checkpoint.quantization_config import parse
from fewbit.cli.main import app
from fewbit.config import QuantConfig
from fewbit.errors import ConfigError, ResumeError
from fewbit.mixed_precision.settings_groups import Choice
from fewbit.pipeline.journal import Journal
from fewbit.planning import LayerPlan, Plan
from models import random_sequences, save_tiny, tiny_model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
DATA = random_sequences(8, 32)


def config(target=3.9, **more):
    return QuantConfig(target_bits=target, seq_len=32, fast=True, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("budget") / "model", "llama", **SHAPE)


@pytest.fixture(scope="module")
def result(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("budget") / "out"
    phases = []
    report = fewbit.quantize(
        folder, config(), dataset=DATA, output=out, progress=lambda phase, done, total: phases.append(phase)
    )
    return out, report, phases


def settings_of(report):
    return {layer["name"]: (layer["bits"], layer["group_size"]) for layer in report.layers}


def contents(out):
    ours = ("fewbit_report", "README")
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and not p.name.startswith(ours)}


@pytest.mark.parametrize("target", [3.6, 4.7, 6.5])
def test_the_budget_is_met_and_filled(target):
    model = tiny_model("llama", **SHAPE)
    fewbit.quantize(model, config(target), dataset=DATA)
    report = model.fewbit_report
    assert target - 0.02 < report.bits_per_weight <= target
    assert len(set(settings_of(report).values())) > 2
    assert any(
        f"chosen for a budget of {target}: {report.bits_per_weight:.3f} per weight" in n for n in report.notes
    )


def test_partners_are_alike_and_unlike_others(result):
    _, report, phases = result
    found = settings_of(report)
    for block in range(6):
        for partners in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
        ):
            assert len({found[f"model.layers.{block}.{name}"] for name in partners}) == 1
    assert phases.index("measure") < phases.index("quantize")


def test_fewer_bits_go_where_they_cost_less():
    model = tiny_model("llama", **SHAPE)
    model.model.layers[2].mlp.down_proj.weight.data *= 1e-3  # hardly matters
    model.model.layers[4].mlp.down_proj.weight.data *= 10  # matters most
    fewbit.quantize(model, config(), dataset=DATA)
    found = settings_of(model.fewbit_report)
    assert found["model.layers.2.mlp.down_proj"][0] == 2
    assert found["model.layers.4.mlp.down_proj"][0] >= 4


def test_the_checkpoint_states_every_layer_and_is_read_back(result):
    out, report, _ = result
    settings = parse(json.loads((out / "config.json").read_text())["quantization_config"])
    for name, (bits, group_size) in settings_of(report).items():
        assert settings.layer(name)[:2] == (bits, group_size)
    for merged, part in (("self_attn.qkv_proj", "self_attn.q_proj"), ("mlp.gate_up_proj", "mlp.up_proj")):
        for block in range(6):
            assert settings.layer(f"model.layers.{block}.{merged}") == settings.layer(
                f"model.layers.{block}.{part}"
            )
    verified = CliRunner().invoke(app, ["verify", str(out), "--json"])
    assert json.loads(verified.stdout)["ok"], verified.stdout
    inspected = json.loads(CliRunner().invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert inspected["bits_per_weight"] == pytest.approx(report.bits_per_weight)
    model = fewbit.load(out)
    again = tiny_model("llama", **SHAPE)
    fewbit.quantize(again, config(), dataset=DATA)
    ids = DATA[0]["input_ids"][None]
    torch.testing.assert_close(model(ids).logits, again(ids).logits, atol=1e-4, rtol=1e-4)


def interrupt_after(monkeypatch, blocks):
    append, done = Journal.append, []

    def counted(self, *block):
        append(self, *block)
        done.append(block)
        if len(done) == blocks:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", counted)


def interrupted(monkeypatch, folder, out):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            fewbit.quantize(folder, config(), dataset=DATA, output=out)
    return out / ".fewbit" / "allocation.json"


def test_a_resumed_run_does_not_choose_again(monkeypatch, folder, result, tmp_path):
    out = tmp_path / "out"
    assert interrupted(monkeypatch, folder, out).is_file()

    def measured_again(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(budget, "measure", measured_again)
    report = fewbit.quantize(folder, config(), dataset=DATA, output=out)
    assert report.resumed_layers == 21
    assert contents(out) == contents(result[0])
    assert any("chosen for a budget" in note for note in report.notes)
    assert not (out / ".fewbit").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "of other inputs"])
def test_a_lost_choice_is_made_again(monkeypatch, folder, result, tmp_path, damage):
    out = tmp_path / "out"
    path = interrupted(monkeypatch, folder, out)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "missing":
        path.unlink()
    else:
        budget.BudgetStore(path.parent, {"model": "another"}, {}).write(
            budget.Allocation({"x": Choice(2, 32)}, ())
        )
    report = fewbit.quantize(folder, config(), dataset=DATA, output=out)
    assert report.resumed_layers == 21
    assert contents(out) == contents(result[0])


def test_another_choice_than_that_of_the_finished_layers_is_refused(monkeypatch, folder, tmp_path):
    out = tmp_path / "out"
    interrupted(monkeypatch, folder, out).unlink()
    monkeypatch.setattr(budget, "allocate", lambda options, budget: [0] * len(options))
    with pytest.raises(
        ResumeError, match=r"allocation.json was lost, and choosing again gives .* delete .* to start"
    ):
        fewbit.quantize(folder, config(), dataset=DATA, output=out)


def test_another_budget_is_another_run(monkeypatch, folder, tmp_path):
    out = tmp_path / "out"
    interrupted(monkeypatch, folder, out)
    with pytest.raises(ResumeError, match="made with another config"):
        fewbit.quantize(folder, config(4.5), dataset=DATA, output=out)


def test_an_impossible_budget_names_the_smallest_and_writes_nothing(folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ConfigError, match=r"target_bits 2.1 cannot be met: .* at least (\d\.\d+) bits"
    ) as error:
        fewbit.quantize(folder, config(2.1), dataset=DATA, output=out)
    assert not out.exists()
    smallest = float(str(error.value).partition("at least ")[2].partition(" ")[0])
    model = tiny_model("llama", **SHAPE)
    fewbit.quantize(model, config(smallest), dataset=DATA)
    assert smallest - 0.002 < model.fewbit_report.bits_per_weight <= smallest


def test_overrides_stay_and_count_and_skipped_layers_do_not():
    model = tiny_model("llama", **SHAPE)
    override = {r"layers\.0\..*down_proj": {"bits": 8, "group_size": 64}, r"layers\.1\.": "skip"}
    fewbit.quantize(model, config(4.2, override=override), dataset=DATA)
    found = settings_of(model.fewbit_report)
    assert found["model.layers.0.mlp.down_proj"] == (8, 64)
    assert not any(".1." in name for name in found)
    assert 4.15 < model.fewbit_report.bits_per_weight <= 4.2
    every = {r".": {"bits": 8}}
    with pytest.raises(ConfigError, match="give fewer bits in override"):
        fewbit.quantize(tiny_model("llama", **SHAPE), config(4.2, override=every), dataset=DATA)


def test_without_calibration_text_there_is_nothing_to_measure():
    with pytest.raises(
        ConfigError, match="target_bits measures the layers on calibration text, which method 'rtn'"
    ):
        QuantConfig(target_bits=3.5, method="rtn")


def test_without_a_budget_nothing_is_measured(folder, tmp_path):
    report = fewbit.quantize(
        folder, QuantConfig(group_size=32, fast=True, seq_len=32), dataset=DATA, output=tmp_path / "o"
    )
    assert {layer["bits"] for layer in report.layers} == {4}
    assert not any("budget" in note for note in report.notes)


def plan_of(*choices):
    """A plan of layers given as (bits, group_size, number of weights / 64)."""
    layers = []
    for number, (bits, group_size, rows) in enumerate(choices):
        settings = QuantConfig(bits=bits, group_size=group_size).defaults
        layers.append(LayerPlan(f"layer.{number}", rows, 64, settings, "block"))
    return Plan(tuple(layers), (), ())


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ([(4, 64, 10), (8, 32, 20)], (8, 32)),
        ([(4, 64, 10), (4, 32, 15), (8, 32, 20)], (4, 32)),
        # One layer at 3 bits, and Marlin must not be chosen for the model.
        ([(4, 64, 100), (3, 32, 1)], (3, 32)),
        ([(2, 64, 3), (3, 32, 2), (3, 64, 2), (4, 64, 9)], (3, 32)),
    ],
)
def test_the_configuration_states_what_lets_engines_choose_a_kernel_for_all(choices, expected):
    assert budget.base_settings(plan_of(*choices)) == expected


@pytest.mark.parametrize(
    "text", ["[]", "7", "{}", '{"fingerprint": {}}', '{"fingerprint": {}, "layers": [1]}', "[" * 10**5]
)
def test_a_choice_of_another_shape_under_a_right_checksum_counts_as_absent(tmp_path, text):
    store = budget.BudgetStore(tmp_path, {}, {})
    store.path.write_text(f"{budget._checksum(text)}\n{text}")
    assert store.read() is None
