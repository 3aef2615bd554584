"""Mixtures of experts from folder to checkpoint and back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fewbit
from fewbit.checkpoint.layout import PARTS, QWEIGHT
from fewbit.cli.main import app
from fewbit.errors import CheckpointError, SolverError
from fewbit.gptq import cholesky as fallback
from fewbit.kernels.linear import QuantLinear
from fewbit.modeling.expert_names import InFiles
from fewbit.verification import verify
from models import random_sequences
from moe_models import EXPERTS, MOE_SHAPES, UNDER_ROUTED, UNREACHED, save_tiny_moe, tiny_moe
from rank_processes import run_ranks

SEQUENCES, LENGTH = 8, 40
DATA = random_sequences(SEQUENCES, LENGTH)
CONFIG = fewbit.QuantConfig(bits=3, group_size=16)
SHOWN = random_sequences(4, 40, seed=9)


def tensors(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def logits(model):
    with torch.no_grad():
        return model(torch.stack([sequence["input_ids"] for sequence in SHOWN])).logits


def error(model, original):
    return float((logits(model) - logits(original)).norm() / logits(original).norm())


@pytest.fixture(scope="module", params=MOE_SHAPES)
def run(request, tmp_path_factory):
    """(family, source folder, checkpoint folder, report)"""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny_moe(folder / "model", request.param)
    report = fewbit.quantize(source, CONFIG, dataset=DATA, output=folder / "out")
    return request.param, source, folder / "out", report


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_tiny_moe(tmp_path_factory.mktemp("qwen") / "model", "qwen3_moe")


def test_names_match_the_original_files(run):
    _, source, out, report = run
    names, original = set(tensors(out)), set(tensors(source))
    quantized = {name.removesuffix(f".{QWEIGHT}") for name in names if name.endswith(QWEIGHT)}
    assert len(quantized) == report.modules
    assert {f"{layer}.weight" for layer in quantized} < original
    assert names == original - {f"{layer}.weight" for layer in quantized} | {
        f"{layer}.{part}" for layer in quantized for part in PARTS
    }
    assert sum(".experts." in layer for layer in quantized) % (3 * EXPERTS) == 0


def test_gptq_beats_round_to_nearest(run):
    family, _, out, _ = run
    original, rounded = tiny_moe(family), tiny_moe(family)
    fewbit.quantize(rounded, fewbit.QuantConfig(bits=3, group_size=16, method="rtn"))
    assert error(fewbit.load(out), original) < 0.6 * error(rounded, original)


def test_loaded_model_equals_the_one_in_memory(run, tmp_path):
    family, _, out, _ = run
    model = fewbit.quantize(tiny_moe(family), CONFIG, dataset=DATA)
    loaded = fewbit.load(out, fuse=False, lm_head_runtime=16)
    layers = {name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    assert layers == {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert not [name for name, p in loaded.named_parameters() if p.ndim == 3]
    torch.testing.assert_close(logits(loaded), logits(model))
    for number, one in enumerate((model, loaded)):
        one.save_pretrained(tmp_path / str(number))
        again, written = tensors(tmp_path / str(number)), tensors(out)
        assert again.keys() == written.keys()
        assert all(torch.equal(again[name], written[name]) for name in written)


def test_verify_and_inspect(run):
    _, source, out, report = run
    result = verify(out, against=source)
    assert result.ok, result.problems
    shown = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert json.loads(shown.stdout)["kinds"] == {"linear": report.modules}


def test_module_names_are_read_too(run, tmp_path):
    """Where a tool wrote experts.3.gate_proj although the original files say w1."""
    _, _, out, _ = run
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

    def renamed(name):
        module, _, rest = name.replace(".block_sparse_moe.", ".mlp.").rpartition(".")
        parent, _, own = module.rpartition(".")
        return f"{parent}.{parts.get(own, own)}.{rest}" if ".experts." in name else name

    shutil.copytree(out, tmp_path / "out")
    save_file(
        {renamed(name): t for name, t in tensors(out).items()},
        tmp_path / "out" / "model.safetensors",
        {"format": "pt"},
    )
    torch.testing.assert_close(logits(fewbit.load(tmp_path / "out")), logits(fewbit.load(out)))


def test_missing_expert_is_found(run, tmp_path):
    _, _, out, _ = run
    found = tensors(out)
    lost = next(name for name in found if ".experts." in name and name.endswith(QWEIGHT))
    shutil.copytree(out, tmp_path / "out")
    layer = lost.removesuffix(f".{QWEIGHT}")
    kept = {name: t for name, t in found.items() if not name.startswith(f"{layer}.")}
    save_file(kept, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    problems = verify(tmp_path / "out").problems
    assert any("experts" in problem.where and "missing" in problem.what for problem in problems)


def test_report_has_the_tokens_of_every_expert(run):
    _, _, _, report = run
    layers = {layer["name"]: layer for layer in report.layers}
    experts = {name.rsplit(".", 2)[0] for name in layers if ".experts." in name}
    assert experts
    for module in experts:
        for part in ("gate_proj", "up_proj", "down_proj"):
            of = [layers[f"{module}.{number}.{part}"] for number in range(EXPERTS)]
            # One sequence is held out; of every other token two experts know.
            assert sum(layer["tokens"] for layer in of) == (SEQUENCES - 1) * LENGTH * 2
            assert of[UNREACHED]["tokens"] == 0 < of[UNREACHED]["added"]
            assert 0 < of[UNDER_ROUTED]["tokens"] < of[UNDER_ROUTED]["tokens"] + of[UNDER_ROUTED]["added"]
            assert of[0]["added"] == 0
            assert of[0]["fallbacks"] == ()
            assert of[UNREACHED]["fallbacks"] == (fallback.UNDER_ROUTED,)
    assert report.fallbacks == {fallback.UNDER_ROUTED: sum(layer["added"] > 0 for layer in layers.values())}
    assert all(layers[f"{module}.0.up_proj"]["correction"] is not None for module in experts)


def test_strict_refuses_under_routed_experts(qwen, tmp_path):
    config = fewbit.QuantConfig(bits=3, group_size=16, strict=True)
    with pytest.raises(
        SolverError, match=r"experts\.\d+\.gate_proj needed a fallback \(tokens of other experts"
    ):
        fewbit.quantize(qwen, config, dataset=DATA, output=tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_some_experts_can_stay_dense(tmp_path, family):
    source = save_tiny_moe(tmp_path / "model", family)
    config = fewbit.QuantConfig(bits=8, group_size=16, ignore=(r"experts\.[0-2]\.", r"layers\.1\..*up_proj"))
    report = fewbit.quantize(source, config, dataset=DATA, output=tmp_path / "out")
    written, original = tensors(tmp_path / "out"), tensors(source)
    plain = [name for name in written if ".experts." in name and name.endswith(".weight")]
    assert len(plain) == 2 * 3 * 3 + 3
    assert all(torch.equal(written[name], original[name]) for name in plain)
    assert sum(name.endswith(QWEIGHT) and ".experts." in name for name in written) == 36 - len(plain)
    assert verify(tmp_path / "out", against=source).ok
    loaded = fewbit.load(tmp_path / "out")
    assert error(loaded, tiny_moe(family)) < 0.03
    assert report.modules == sum(isinstance(module, QuantLinear) for module in loaded.modules())


def test_dense_experts_release_the_fused_tensor(tmp_path):
    model, original = tiny_moe("mixtral"), tiny_moe("mixtral")
    config = fewbit.QuantConfig(bits=8, group_size=16, ignore=(r"experts\.[0-2]\.",))
    fewbit.quantize(model, config, dataset=DATA)
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(fewbit.load(tmp_path)), logits(model))
    assert error(model, original) < 0.03


def quantize_as_a_rank(comm, source, output):
    return fewbit.quantize(source, CONFIG, dataset=DATA, output=output)


def test_two_processes_match_one(qwen, tmp_path):
    alone = quantize_as_a_rank(None, qwen, tmp_path / "one")
    together = run_ranks(2, quantize_as_a_rank, qwen, tmp_path / "two")[0]
    for one, other in zip(alone.layers, together.layers, strict=True):
        if "layers.0." in one["name"]:  # further on a rounding may send a token elsewhere
            assert (one["tokens"], one["added"]) == (other["tokens"], other["added"])
            assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_transformers_loads_the_checkpoint(run):
    _, _, out, _ = run
    fewbit.register()
    try:
        model = AutoModelForCausalLM.from_pretrained(out)
    finally:
        fewbit.unregister()
    torch.testing.assert_close(logits(model), logits(fewbit.load(out)))


def test_experts_kept_dense_stay_fused_when_loaded(qwen, tmp_path):
    config = fewbit.QuantConfig(bits=8, group_size=16, ignore=(r"\.experts\.",))
    fewbit.quantize(qwen, config, dataset=DATA, output=tmp_path / "out")
    model = fewbit.load(tmp_path / "out")
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.ndim == 3} == {
        "gate_up_proj",
        "down_proj",
    }
    assert error(model, tiny_moe("qwen3_moe")) < 0.03


class StopError(Exception):
    pass


def test_resumed_run_writes_the_same_bytes(run, tmp_path):
    _, source, out, _ = run

    def stop(phase, done, total):
        if phase == "quantize" and done > 0.6 * total:
            raise StopError

    with pytest.raises(StopError):
        fewbit.quantize(source, CONFIG, dataset=DATA, output=tmp_path / "out", progress=stop)
    report = fewbit.quantize(source, CONFIG, dataset=DATA, output=tmp_path / "out")
    assert 0 < report.resumed_layers < report.modules
    for file in ("model.safetensors", "config.json", "fewbit_manifest.json"):
        assert (tmp_path / "out" / file).read_bytes() == (out / file).read_bytes()


def test_loading_names_experts_that_cannot_be_unfused(run, monkeypatch):
    monkeypatch.setattr(
        "fewbit.modeling.experts.in_files", lambda *_: InFiles(fused=False, reason="they are not known")
    )
    message = r"layer .*experts\.0\.\w+ is stored by itself, but .* take apart: they are not known"
    with pytest.raises(CheckpointError, match=message):
        fewbit.load(run[2])


def test_tuning_and_mixed_precision(qwen, tmp_path):
    tuned = fewbit.QuantConfig(bits=2, group_size=16, sym=False, tune=True, tune_steps=2)
    report = fewbit.quantize(qwen, tuned, dataset=DATA, output=tmp_path / "tuned")
    assert all(layer["block_error"] is not None for layer in report.layers)
    mixed = fewbit.QuantConfig(target_bits=4.5, group_size=16)
    report = fewbit.quantize(qwen, mixed, dataset=random_sequences(10, 30), output=tmp_path / "mixed")
    for block in ("0", "1"):
        bits = {layer["bits"] for layer in report.layers if f"layers.{block}.mlp.experts" in layer["name"]}
        assert len(bits) == 1  # engines hold the experts of a block in one tensor
    assert logits(fewbit.load(tmp_path / "mixed")).isfinite().all()
