"""`loss_aware` from `fewbit.quantize` to the checkpoint: the right sums, less divergence, the same bytes each way."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors import safe_open

import fewbit
from fewbit.calibration import prepare
from fewbit.context import RunContext
from fewbit.demo import calibration_text, evaluation_text, model_path
from fewbit.errors import ConfigError, ModelError, OutputError, SolverError
from fewbit.gptq import output_feedback
from fewbit.gptq.output_feedback import output_blocks
from fewbit.modeling.source import open_source
from fewbit.pipeline import output_hessians as module
from fewbit.pipeline.gradients import label_score
from fewbit.pipeline.output_hessians import OutputHessianStore, output_hessians
from fewbit.pipeline.streaming import StreamedWeights, Weights
from fewbit.planning import make_plan
from fewbit.profiling import Profiler
from fewbit.resources import Limit
from models import random_sequences, save_tiny, tiny_model
from moe_models import save_tiny_moe
from rank_processes import run_ranks

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
DATA = random_sequences(10, 32)
CONFIG = fewbit.QuantConfig(bits=3, group_size=32, seq_len=32, dtype="float32", loss_aware=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(output_feedback, "LARGEST_BLOCK", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("loss-aware") / "model", "llama", **SHAPE)


@pytest.fixture
def result(folder, tmp_path):
    out = tmp_path / "whole"
    return fewbit.quantize(folder, CONFIG, dataset=DATA, output=out), out


def context(config=CONFIG):
    return RunContext(config)


def calibration():
    return prepare(DATA, None, seq_len=32)


def contents(folder):
    reports = ("fewbit_report.json", "fewbit_report.html")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in reports}


def sums_of(model, weights):
    plan = make_plan(model, CONFIG)
    found, notes = output_hessians(model, plan, calibration(), weights, context())
    assert notes == []
    return {layer.name: found.of(layer.name, slice(0, layer.out_features), CPU) for layer in plan.layers}


def test_sums_are_those_of_plain_autograd():
    model, name = tiny_model("llama", **SHAPE), "model.layers.1.mlp.up_proj"
    found = sums_of(model, Weights(model))
    outputs, generator = [], torch.Generator().manual_seed(0)

    def remember(module, inputs, output):
        output.retain_grad()
        outputs.append(output)

    model.get_submodule(name).register_forward_hook(remember)
    for batch in calibration().batches:
        logits = model(**batch, use_cache=False).logits
        logits.backward(label_score(logits.detach(), None, generator)[0])
    g = torch.cat([y.grad.flatten(0, 1) for y in outputs])
    torch.testing.assert_close(found[name], output_blocks(g), rtol=1e-4, atol=1e-6)
    assert all(G.ne(0).any() for G in found.values())


def test_a_model_larger_than_memory_is_read_block_by_block(folder, monkeypatch):
    in_memory = tiny_model("llama", **SHAPE)
    source = open_source(folder)
    model, files = source.build_model("float32")
    weights = StreamedWeights(model, files, CPU, Profiler(CPU))
    monkeypatch.setattr(module, "takes_at_most", lambda *arguments: False)
    streamed = sums_of(model, weights)
    sizes = weights.shard_sizes()
    blocks = [size for name, size in sizes.items() if name.startswith("model.layers.")]
    assert weights.peak_bytes < sum(sizes.values()) - max(blocks)
    assert not any(p.device.type == "cpu" for p in model.model.layers.parameters())  # nothing stays
    in_memory.load_state_dict(source.load_model("float32", CPU).state_dict())
    for name, G in sums_of(in_memory, Weights(in_memory)).items():
        assert torch.equal(streamed[name], G)


def test_the_result_is_nearer_to_the_original(tmp_path, monkeypatch):
    """The trained model in the package, on text that it was not calibrated with."""
    monkeypatch.setattr(output_feedback, "LARGEST_BLOCK", 1024)
    kl = {}
    for loss_aware in (False, True):
        out = tmp_path / str(loss_aware)
        report = fewbit.quantize(
            model_path(),
            dataset=str(calibration_text()),
            output=out,
            bits=2,
            group_size=32,
            seq_len=128,
            num_samples=64,
            dtype="float32",
            loss_aware=loss_aware,
            evaluate_on=str(evaluation_text()),
            evaluate_tokens=8192,
        )
        kl[loss_aware] = report.evaluation["quantized"]["kl"]
    assert kl[True] < 0.93 * kl[False]


def test_a_report_without_notes_and_a_phase(result):
    report, out = result
    assert "gradients" in {phase["name"] for phase in report.phases}
    assert not any("gradient" in note for note in report.notes)
    assert not (out / ".fewbit").exists()


class KilledError(Exception):
    pass


def interrupted(folder, out, **options):
    def kill(phase, done, total):
        if phase == "quantize" and done > total // 2:
            raise KilledError

    with pytest.raises(KilledError):
        fewbit.quantize(folder, CONFIG, dataset=DATA, output=out, progress=kill, **options)
    return out / ".fewbit" / "output_hessians.safetensors"


def test_a_resumed_run_reads_the_sums(folder, result, tmp_path, monkeypatch):
    path = interrupted(folder, tmp_path / "out")
    with safe_open(path, "pt") as file:
        assert len(list(file.keys())) == 21

    def again(*arguments):
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "_collect", again)
    report = fewbit.quantize(folder, CONFIG, dataset=DATA, output=tmp_path / "out")
    assert report.resumed_layers
    assert contents(tmp_path / "out") == contents(result[1])


@pytest.mark.parametrize("damage", ["cut", "missing", "of other inputs"])
def test_lost_sums_are_computed_again(folder, result, tmp_path, damage):
    path = interrupted(folder, tmp_path / "out")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "missing":
        path.unlink()
    else:
        OutputHessianStore(path.parent, {"model": "another"}).write({"x": torch.ones(2)})
    fewbit.quantize(folder, CONFIG, dataset=DATA, output=tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result[1])


def on_ranks(comm, folder, out):
    return fewbit.quantize(folder, CONFIG, dataset=DATA, output=out)


def test_two_processes_write_the_same_bytes(folder, result, tmp_path):
    run_ranks(2, on_ranks, folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(result[1])


def test_a_model_in_memory_gets_the_same_codes(folder, result):
    model = open_source(folder).load_model("float32", CPU)
    fewbit.quantize(model, {**CONFIG.to_dict(), "dtype": "auto"}, dataset=DATA)
    ids = DATA[0]["input_ids"][None]
    again = fewbit.load(result[1], dtype=torch.float32)
    torch.testing.assert_close(model(ids).logits, again(ids).logits, atol=1e-4, rtol=1e-4)


def test_experts_without_tokens_are_counted(tmp_path):
    folder = save_tiny_moe(tmp_path / "model", "mixtral")
    report = fewbit.quantize(
        folder,
        dataset=random_sequences(1, 8) + random_sequences(1, 4),
        output=tmp_path / "out",
        bits=4,
        group_size=16,
        seq_len=8,
        loss_aware=True,
    )
    [note] = [note for note in report.notes if "no gradient reached" in note]
    assert re.match(
        r"no gradient reached 6 layers, for example model\.layers\..*: the outputs count alike", note
    )


def test_hessians_that_do_not_fit_into_memory_are_refused(monkeypatch):
    model = tiny_model("llama", **SHAPE)
    monkeypatch.setattr(module, "memory_left", lambda: Limit(100_000, "free on this machine"))
    with pytest.raises(
        ConfigError, match=r"needs 467 kB of memory .*, 100 kB are free on this machine: leave"
    ):
        output_hessians(model, make_plan(model, CONFIG), calibration(), Weights(model), context())


def test_a_full_disk_is_reported(tmp_path):
    store = OutputHessianStore(tmp_path / "missing", {})
    with pytest.raises(OutputError, match=r"cannot write .*output_hessians.safetensors: No such file"):
        store.write({"x": torch.ones(2)})


def test_gradients_that_overflow_are_refused():
    model = tiny_model("llama", **SHAPE)
    model.model.layers[1].mlp.up_proj.register_full_backward_pre_hook(lambda module, g: (g[0] * torch.inf,))
    with pytest.raises(ModelError, match=r"the gradients of model.layers.* overflow: try dtype float32"):
        output_hessians(model, make_plan(model, CONFIG), calibration(), Weights(model), context())


def test_a_loss_without_gradients_changes_nothing():
    model = tiny_model("llama", **SHAPE)
    model.lm_head.weight.data.zero_()
    _, [note] = output_hessians(model, make_plan(model, CONFIG), calibration(), Weights(model), context())
    assert note.startswith("no gradient reached 21 layers, for example model.layers.0.")


def test_layers_that_are_rounded_to_nearest_need_no_gradients():
    model = tiny_model("llama", **SHAPE)
    config = fewbit.QuantConfig(loss_aware=True, group_size=32, override={".*": {"method": "rtn"}})
    plan = make_plan(model, config)
    assert output_hessians(model, plan, calibration(), Weights(model), context(config)) == (None, [])


def test_damaged_sums_are_told():
    with pytest.raises(SolverError, match=r"is damaged: remove OUT/\.fewbit/output_hessians"):
        output_feedback.factor_outputs(-torch.eye(64)[None] * torch.arange(64))


def test_methods_without_calibration_are_refused():
    with pytest.raises(
        ConfigError, match="correction, tune and loss_aware need: leave them out, or use gptq"
    ):
        fewbit.QuantConfig(method="rtn", loss_aware=True)
