"""Layers that share an input are solved together from the second block on, and get what they would get alone."""

import weakref

import pytest
import torch

import fewbit
from fewbit.pipeline import quantize_layers as run
from fewbit.pipeline import solving
from fewbit.pipeline.kin import Kin, gains_from_company
from models import random_sequences, tiny_model, tiny_tokenizer
from moe_models import tiny_moe


class Input:
    """Stands for a Hessian."""


def test_what_came_together_in_one_block_is_expected_in_the_next():
    kin = Kin()
    first, second = Input(), Input()
    for name, given in (
        ("layers.0.attn.q", first),
        ("layers.0.attn.k", first),
        ("layers.0.attn.v", first),
        ("layers.0.attn.o", second),
    ):
        assert kin.expected(name) == []
        kin.met(name, given)
    assert kin.expected("layers.7.attn.q") == ["layers.7.attn.k", "layers.7.attn.v"]
    assert kin.expected("layers.7.attn.k") == []
    assert kin.expected("layers.7.attn.o") == []
    assert kin.expected("other.7.attn.q") == []


def test_experts_of_one_block_learn_from_each_other():
    kin, given = Kin(), Input()
    kin.met("layers.0.experts.0.gate", given)
    kin.met("layers.0.experts.0.up", given)
    assert kin.expected("layers.0.experts.1.gate") == ["layers.0.experts.1.up"]


def test_layers_of_other_blocks_that_share_an_input_are_no_kin():
    kin, encoder_output = Kin(), Input()
    kin.met("decoder.0.cross.k", encoder_output)
    kin.met("decoder.1.cross.k", encoder_output)
    assert kin.expected("decoder.1.cross.k") == []


def test_an_input_is_not_kept():
    kin, given = Kin(), Input()
    known = weakref.ref(given)
    kin.met("layers.0.q", given)
    del given
    assert known() is None
    kin.met("layers.0.k", Input())
    assert kin.expected("layers.1.q") == []


def test_names_with_braces_stay_as_they_are():
    kin, given = Kin(), Input()
    kin.met("a{0}.1.q", given)
    kin.met("a{0}.1.k", given)
    assert kin.expected("a{0}.2.q") == ["a{0}.2.k"]


def test_on_the_cpu_every_layer_is_solved_alone():
    assert not gains_from_company(torch.device("cpu"))


@pytest.fixture
def company(monkeypatch):
    """As on a GPU; returns the names of the layers that are solved together."""
    together = []
    solve = solving.LayerSolver._together

    def spy(self, families):
        [family] = families
        together.append([layer.name for layer in family.layers])
        return solve(self, families)

    monkeypatch.setattr(solving, "gains_from_company", lambda device: True)
    monkeypatch.setattr(solving.LayerSolver, "_together", spy)
    return together


def quantized(model, **options):
    config = fewbit.QuantConfig(group_size=16, seq_len=24, **options)
    return fewbit.quantize(model, config, dataset=random_sequences(8), tokenizer=tiny_tokenizer())


OPTIONS = {
    "plain": {"fast": True},
    "two streams": {"bits": 3, "sym": False, "correction": "auto", "refit": True},
    "another k in block 1": {"fast": True, "override": {r".*1\.self_attn\.k_proj": {"bits": 8}}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_walk_in_company_gives_the_bytes_of_one_without(options, monkeypatch, company):
    with monkeypatch.context() as alone:
        alone.setattr(solving, "gains_from_company", gains_from_company)
        expected = quantized(tiny_model("llama"), **options)
    assert all(len(layers) == 1 for layers in company)
    company.clear()
    model = quantized(tiny_model("llama"), **options)

    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    kin = ["q_proj", "v_proj"] if "override" in options else ["q_proj", "k_proj", "v_proj"]
    assert [f"{attention}{name}" for name in kin] in company
    assert [f"{mlp}gate_proj", f"{mlp}up_proj"] in company
    assert all(len(layers) == 1 for layers in company if ".0." in layers[0])
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for layer, other in zip(model.fewbit_report.layers, expected.fewbit_report.layers, strict=True):
        assert layer["seconds"] > 0
        assert {**layer, "seconds": 0} == {**other, "seconds": 0}


def test_a_wrong_guess_costs_time_and_nothing_else(monkeypatch, company):
    expected = quantized(tiny_model("llama"), fast=True)
    monkeypatch.setattr(Kin, "expected", lambda self, name: [name.replace("q_proj", "o_proj")])
    model = quantized(tiny_model("llama"), fast=True)
    assert any(layers[1:] and "o_proj" in layers[1] for layers in company)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_experts_gates_and_ups_are_solved_together(company):
    model = tiny_moe("qwen3_moe")
    quantized(model, fast=True)
    pairs = [layers for layers in company if len(layers) > 1 and "experts" in layers[0]]
    assert pairs
    assert all([name.rpartition(".")[2] for name in pair] == ["gate_proj", "up_proj"] for pair in pairs)


def test_a_gpu_without_the_kernels_is_told_of_once(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(run, "why_no_triton", lambda device: f"on {device} they give wrong results")
    assert run._solver_notes(gpu, 7) == [
        "the solver's Triton kernels were not used in any of 7 layers (on cuda:0 they give wrong results): many times "
        "slower"
    ]
    monkeypatch.setattr(run, "why_no_triton", lambda device: "")
    assert run._solver_notes(gpu, 7) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_second_block_is_solved_in_company(monkeypatch):
    together = []
    solve = solving.LayerSolver._together

    def spy(self, families):
        together.extend([layer.name.rpartition(".")[2] for layer in family.layers] for family in families)
        return solve(self, families)

    monkeypatch.setattr(solving.LayerSolver, "_together", spy)
    losses = {
        device: [layer["loss"] for layer in quantized(tiny_model("llama").to(device)).fewbit_report.layers]
        for device in ("cpu", "cuda")
    }
    assert ["q_proj", "k_proj", "v_proj"] in together
    assert ["gate_proj", "up_proj"] in together
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)
