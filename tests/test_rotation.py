"""Rotating the residual stream: the function of the model stays, or the model is refused."""

from __future__ import annotations

import json

import pytest
import torch
from rotate_all import TOLERANCE, difference, rotated, with_uneven_norms
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import ConfigError, ModelError
from fewbit.modeling.residual_stream import find_residual_stream
from fewbit.modeling.rotation import Rotation
from fewbit.verification import verify
from models import random_sequences, save_tiny, tiny_model

SMALL = {"group_size": 16, "seq_len": 24, "dtype": "float32", "rotate": True}
RIGHT = (
    "llama",
    "qwen2",  # biases behind the norm
    "gemma",  # 1 + weight, scaled embeddings, a tied output layer
    "granite",  # numbers that multiply every output
    "phi3",  # q, k and v in one layer
    "minicpm3",  # latent attention
    "lfm2",  # convolutions
    "mamba",  # a convolution that is used without a call
    "recurrent_gemma",
    "mixtral",  # experts, and a router without a layer
    "qwen2_moe",  # a shared expert behind a gate
    "deepseek_v3",
    "qwen3_next",  # linear attention
    "xlm-roberta-xl",  # a layer with the matrix of the embeddings that does not read the stream
    "cohere",  # LayerNorms without biases, attention and MLP side by side
    "stablelm",  # LayerNorms with biases
    "nemotron",  # LayerNorms with 1 + weight
)
REFUSED = {
    "gemma2": "something that is no layer's output is added to the residual stream",  # norms before the addition
    "gpt_oss": "is no tensor of its own in the files",
    "gpt2": "looks at values",
    "zamba2": "goes through the operation aten.cat",
    "bart": "",
}


@pytest.mark.parametrize("model_type", RIGHT)
def test_the_function_stays(model_type, tmp_path):
    original = with_uneven_norms(model_type, tmp_path)
    model, weights = rotated(tmp_path)
    assert difference(original, model) < TOLERANCE
    # And it was rotated: the embeddings are others of the same lengths.
    tied = original.get_output_embeddings().weight is original.get_input_embeddings().weight
    before, after = (m.get_input_embeddings().weight.detach() for m in (original, model))
    assert not torch.allclose(before, after, atol=0.1 * float(before.std()))
    assert torch.allclose(before.norm(dim=1), after.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert bool(weights.untied) == tied


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_models_are_refused_with_the_reason(model_type, tmp_path):
    with_uneven_norms(model_type, tmp_path)
    with pytest.raises(ModelError, match=f"cannot be rotated: .*{REFUSED[model_type]}"):
        rotated(tmp_path)


def test_an_output_that_goes_elsewhere_too_is_refused():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    attention = layer.self_attn.forward

    def forward(*args, **kwargs):
        y, *rest = attention(*args, **kwargs)
        return (y + 0 * torch.relu(y), *rest)

    layer.self_attn.forward = forward
    with pytest.raises(ModelError, match="no layer's output is added"):
        find_residual_stream(model)
    layer.self_attn.forward = lambda *args, **kwargs: (
        torch.relu(y := attention(*args, **kwargs)[0]).amax() * y,
        None,
    )
    with pytest.raises(
        ModelError, match=r"o_proj.weight is used by aten.relu, not only by the residual stream"
    ):
        find_residual_stream(model)


class Toy(nn.Module):
    """A small model whose parts a test replaces."""

    def __init__(self, **parts):
        super().__init__()
        self.embed = parts.get("embed", nn.Embedding(9, 32))
        self.norm, self.last = parts.get("norm", nn.RMSNorm(32)), nn.RMSNorm(32)
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 9, bias=False)
        self.parts = parts

    def get_input_embeddings(self):
        return self.embed

    def mlp(self, x):
        return self.down(torch.relu(self.up(x)))

    def block(self, h):
        return h + self.mlp(self.norm(h))

    def forward(self, input_ids):
        h = self.parts.get("block", Toy.block)(self, self.embed(input_ids))
        return self.parts.get("output", lambda self, h: self.head(self.last(h)))(self, h)


class Bent(nn.Embedding):
    def forward(self, ids):
        return torch.tanh(super().forward(ids))


class GatedNorm(nn.RMSNorm):
    def forward(self, x, gate):
        return super().forward(x) * gate


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 32))

    def forward(self, x):
        return torch.topk(x @ self.weight.T, 2)


def through(function):
    """A block whose layer reads what `function` makes of the stream behind the norm."""
    return lambda self, h: h + self.mlp(function(self.norm(h)))


TWO_WAYS = "is used in two ways"
OPERATION = "goes through the operation aten"
WRONG = {
    "returns the stream": ({"output": lambda self, h: self.last(h)}, "returns the residual stream"),
    "returns the stream beside logits": (
        {"output": lambda self, h: (self.head(self.last(h)), h)},
        "returns the residual stream",
    ),
    "the embeddings as output layer": (
        {"output": lambda self, h: self.head(h) + F.linear(self.last(h), self.embed.weight)},
        f"embed.weight {TWO_WAYS}",
    ),
    "the embeddings behind another layer": (
        {"output": lambda self, h: torch.relu(self.head(self.last(h))) + self.embed.weight[:, 0]},
        f"embed.weight {TWO_WAYS}",
    ),
    "a matrix that is not transposed": (
        {"block": lambda self, h: h + self.down(torch.relu(self.norm(h) @ self.up.weight + self.up.bias))},
        f"{OPERATION}.mm",
    ),
    "a matrix of another layer": (
        {"block": lambda self, h: Toy.block(self, h) + self.down(torch.ones(32) @ self.down.weight)},
        f"down.weight {TWO_WAYS}",
    ),
    "a layer that reads something else first": (
        {"block": lambda self, h: h + self.mlp(torch.ones(1, 4, 32)) + self.mlp(self.norm(h))},
        f"up.weight {TWO_WAYS}",
    ),
    "a norm of something else": (
        {"block": lambda self, h: h + self.down(self.norm(torch.relu(self.up(self.norm(h)))))},
        f"norm.weight {TWO_WAYS}",
    ),
    "a norm with a gate": (
        {"norm": GatedNorm(32), "block": lambda self, h: h + self.mlp(self.norm(h, torch.ones(32)))},
        "another tensor enter one layer or norm",
    ),
    "a router that reads the stream": (
        {"norm": Router(), "block": lambda self, h: h + self.mlp(self.last(h)) * self.norm(h)[0].sum()},
        "returns more than one tensor",
    ),
    "embeddings that are bent": ({"embed": Bent(9, 32)}, f"{OPERATION}.tanh"),
    "rounding": ({"block": through(lambda x: torch.div(x, 0.1, rounding_mode="floor"))}, "goes through"),
    "integers": ({"block": through(lambda x: x.to(torch.int8).float())}, f"{OPERATION}._to_copy"),
    "features in another order": ({"block": through(lambda x: x.flip(-1))}, f"{OPERATION}.flip"),
    "features by heads": (
        {"block": through(lambda x: x.view(1, 4, 2, 16).transpose(2, 3).reshape(1, 4, 32))},
        f"{OPERATION}.view",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_would_change_the_function_is_refused(case):
    parts, message = WRONG[case]
    assert set(find_residual_stream(Toy()).reads) == {"up.weight", "head.weight"}
    with pytest.raises(ModelError, match=f"Toy cannot be rotated: .*{message}"):
        find_residual_stream(Toy(**parts))


def test_a_norm_that_cannot_be_tried_is_refused():
    class Strange(nn.RMSNorm):
        def forward(self, x):
            if x.device.type == "cpu":
                raise TypeError("needs more")
            return super().forward(x)

    with pytest.raises(ModelError, match="is no RMSNorm or LayerNorm"):
        find_residual_stream(Toy(norm=Strange(32)))


@pytest.mark.parametrize("settings", [{"rotate": True}, {"lm_head": True}, {"rotate": True, "lm_head": True}])
@pytest.mark.parametrize("model_type", ["xlm-roberta-xl", "gemma", "ernie4_5"])
def test_tied_models_are_read_back(model_type, settings, tmp_path):
    original = with_uneven_norms(model_type, tmp_path / "model")
    options = {"bits": 8, "group_size": -1, "method": "rtn", "dtype": "float32", **settings}
    fewbit.quantize(tmp_path / "model", output=tmp_path / "out", **options)
    assert difference(original, fewbit.load(tmp_path / "out", dtype=torch.float32)) < 0.05


def test_tensors_of_no_layer_are_refused(tmp_path):
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.layers.2.eh_proj.weight": torch.ones(48, 96)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"does not run model\.layers\.2\.eh_proj\.weight"):
        rotated(tmp_path)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("width", [1, 7, 48, 64, 576, 640, 4096])
def test_q_is_the_kronecker_product_and_orthogonal(width, keeps_mean):
    rotation = Rotation.random(width, 3, keeps_mean=keeps_mean)
    F = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        F = torch.kron(F, factor.double())
    Q = rotation.signs.double()[:, None] * F
    if keeps_mean:
        Q = F @ Q
        torch.testing.assert_close(Q.sum(0), torch.ones(width, dtype=torch.float64), rtol=0, atol=1e-4)
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.of_rows(x), (x.double() @ Q).float(), rtol=1e-5, atol=2e-5)
    if width < 1000:
        torch.testing.assert_close(Q @ Q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-5)
        assert width < 40 or Q.abs().max() < 5 * width**-0.5  # nothing stays where it was


def test_a_bias_behind_a_weight_of_zero_is_refused(tmp_path):
    model = with_uneven_norms("stablelm", tmp_path)
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"input_layernorm has weights of 0 and a bias"):
        rotated(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_checkpoint(tied, tmp_path):
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    data = random_sequences(20)
    report = fewbit.quantize(folder, bits=8, dataset=data, output=tmp_path / "out", **SMALL)
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert report.model["parameters"] == sum(p.numel() for p in original.parameters())
    assert any("23.0 kB" in note for note in report.notes) == tied
    assert not verify(tmp_path / "out").problems
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys()
    assert torch.equal(tensors["model.norm.weight"], torch.ones(48))
    ids = torch.stack([item["input_ids"] for item in random_sequences(4, seed=9)])
    expected = original(input_ids=ids).logits
    for model in (fewbit.load(tmp_path / "out", dtype=torch.float32), _dense(tmp_path)):
        assert (model(input_ids=ids).logits - expected).norm() < 0.03 * expected.norm()
    assert "residual stream rotated" in (tmp_path / "out/README.md").read_text()


def _dense(folder):
    fewbit.export(folder / "out", folder / "dense", to="dense")
    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)


def test_outliers_cost_less(tmp_path):
    folder = save_tiny(tmp_path / "model", hidden_size=128, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():  # features that are large in all layers, as large models have them
        if tensor.shape[-1] == 128 and "layers" in name and tensor.ndim == 2:
            tensor[:, ::31] *= 12
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    data = random_sequences(40)
    kl = {}
    for rotate in (False, True):
        settings = {**SMALL, "rotate": rotate, "group_size": 64, "bits": 3, "method": "rtn"}
        fewbit.quantize(folder, dataset=data, output=tmp_path / str(rotate), **settings)
        quantized = fewbit.load(tmp_path / str(rotate), dtype=torch.float32)
        original = AutoModelForCausalLM.from_pretrained(folder)
        windows = torch.stack([item["input_ids"] for item in random_sequences(8, seed=9)])
        kl[rotate] = fewbit.evaluate(quantized, windows, against=original).kl
    assert kl[True] < 0.7 * kl[False]


def test_blocks_of_a_rotated_model_are_tuned(tmp_path):
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=False)
    options = {**SMALL, "bits": 4, "tune": True, "tune_steps": 12, "num_samples": 20}
    report = fewbit.quantize(folder, dataset=random_sequences(20), output=tmp_path / "out", **options)
    assert any(layer["tuned"] for layer in report.layers)
    ids = torch.stack([item["input_ids"] for item in random_sequences(4, seed=9)])
    expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    found = fewbit.load(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_resumes_to_the_same_bytes_and_distills(tmp_path):
    folder = save_tiny(tmp_path / "model")
    config = fewbit.QuantConfig(
        **{**SMALL, "seq_len": 48, "num_samples": 12}, bits=2, distill=True, distill_tokens=2048
    )
    data = random_sequences(40, 48)
    report = fewbit.quantize(folder, config, dataset=data, output=tmp_path / "straight")
    assert report.distillation["after"] < report.distillation["before"]

    class KilledError(Exception):
        pass

    def kill(phase, done, total):
        if phase == "quantize" and done > total // 2:
            raise KilledError

    with pytest.raises(KilledError):
        fewbit.quantize(folder, config, dataset=data, output=tmp_path / "out", progress=kill)
    again = fewbit.quantize(folder, config, dataset=data, output=tmp_path / "out")
    assert again.resumed_layers
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_model_in_memory_is_refused():
    with pytest.raises(ConfigError, match="rotate changes weights while they are read from safetensors"):
        fewbit.quantize(
            tiny_model("llama"), rotate=True, group_size=16, seq_len=24, dataset=random_sequences(20)
        )
