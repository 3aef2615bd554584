"""One architecture from a tiny random model to a checked checkpoint, with an independent decoder as the judge."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from special_inputs import special_inputs
from tiny_configs import VOCAB, classes, tiny_config
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import fewbit
from fewbit.errors import FewbitError
from fewbit.estimate import estimate
from fewbit.preparation import Preparation
from fewbit.verification import verify

SEQ_LEN, BITS, GROUP_SIZE = 24, 4, 32
CONFIG = fewbit.QuantConfig(bits=BITS, group_size=GROUP_SIZE, num_samples=6, seq_len=SEQ_LEN, dtype="float32")
TOLERANCE = 2e-3  # of the norm of the logits: float32 sums in another order

# Reasons for a weight in 16 bits that are no fault: what GPTQ leaves alone in every tool.
_ORDINARY = re.compile(
    r"router|mixes the parallel streams|output embedding|which reads|"
    r"outside the (language model|repeated blocks)"
)
_OTHER = re.compile(r"is not a linear layer|a parameter that")  # tensors of no linear layer
_EXPERT = re.compile(r"\.\d+(\.((gate|up|down)_proj|linear_gate))?\.(weight|bias)$")
# Llama4ForConditionalGeneration of transformers 5.24 reads this from the output of its language model, which lacks it.
MoeCausalLMOutputWithPast.image_outputs = None


@dataclass
class Row:
    """What became of one architecture.

    Attributes:
        status: "right", "partial" (right, but matrices inside blocks stay in 16 bits), "refused", "failed", or
            "unavailable" where transformers itself cannot run the tiny model.
        reasons: why it is not "right".
        quantized: share of the weights inside blocks of the language model that are quantized, in percent.
    """

    task: str
    model_type: str
    status: str
    reasons: list[str] = field(default_factory=list)
    quantized: float = 0.0


class UnavailableError(Exception):
    """transformers cannot build or run the model."""


def judge(task: str, model_type: str, folder: Path, **settings: Any) -> Row:
    """Quantize a tiny model from its folder and in memory, and compare everything with the independent decode."""
    config = fewbit.QuantConfig(**{**CONFIG.to_dict(), **settings})
    row = Row(task, model_type, "failed")
    try:
        model, cls, inputs = _build(task, model_type, folder / "model")
    except UnavailableError as error:
        row.status, row.reasons = "unavailable", [str(error)]
        return row
    step = "plan"
    try:
        dataset = _dataset(model)
        plan = estimate(folder / "model", config, dataset=dataset, output=folder / "out")
        if plan.problems:
            row.status, row.reasons = "refused", list(plan.problems)
            return row
        step = "quantize"
        report = fewbit.quantize(folder / "model", config, dataset=dataset, output=folder / "out")
        row.quantized, left, silent = _coverage(folder / "model", report)
        step = "verify"
        problems = [f"{p.where}: {p.what}" for p in verify(folder / "out").problems]
        _expect(not problems, "; ".join(problems[:2]))
        step = "decode"
        decoded = _decoded(folder, cls, "out")
        expected = _logits(decoded, inputs)
        step = "load"
        loaded = fewbit.load(folder / "out", dtype=torch.float32)
        _same(_logits(loaded, inputs), expected)
        step = "generate"
        _same_tokens(loaded, decoded, inputs)
        step = "save"
        loaded.save_pretrained(folder / "saved")
        _same(_logits(fewbit.load(folder / "saved", dtype=torch.float32), inputs), expected)
        step = "register"
        fewbit.register()
        registered = cls.from_pretrained(folder / "out", dtype=torch.float32)
        fewbit.unregister()
        _same(_logits(registered, inputs), expected)
        step = "in memory"
        in_memory = fewbit.quantize(
            cls.from_pretrained(folder / "model").eval(),
            fewbit.QuantConfig(**{**config.to_dict(), "dtype": "auto"}),
            dataset=dataset,
        )
        # A tie may go the other way, and with it the router of a mixture of experts.
        _same(_logits(in_memory, inputs), expected, 0.5 if "expert" in str(report.layers) else 0.05)
        own = _logits(in_memory, inputs)
        step = "in memory, save"
        in_memory.save_pretrained(folder / "saved2")
        again = fewbit.load(folder / "saved2", dtype=torch.float32)
        _same(_logits(again, inputs), own)
        _same(_logits(_decoded(folder, cls, "saved2"), inputs), own)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the verdict
        if step == "quantize" and isinstance(error, FewbitError):
            row.reasons = [f"plan said yes, then: {_short(error)}"]
        else:
            row.reasons = [f"{step}: {_short(error)}"]
        return row
    row.status, row.reasons = ("partial" if left or silent else "right"), [*silent, *left]
    return row


def _build(task: str, model_type: str, folder: Path) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    try:
        config_class, cls = classes(task, model_type)
        config = tiny_config(config_class)
        if task == "CAUSAL_LM" and hasattr(config, "is_decoder"):
            config.is_decoder = True
        with torch.device("meta"):
            weights = sum(p.numel() for p in cls(config).parameters())
        if weights > 6_000_000:
            raise UnavailableError(f"the tiny configuration has {weights:,} weights")
        torch.manual_seed(0)
        model = cls(config).float().eval()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # positions that are computed, not stored
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=0.8 / parameter.shape[-1] ** 0.5)
            elif "bias" in name:
                nn.init.normal_(parameter, std=0.05)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0
        inputs = _inputs(model, 0)
        expected = _logits(model, inputs)
        if not torch.isfinite(expected).all():
            raise UnavailableError("the logits of the random model are not finite")
        model.save_pretrained(folder)
        again = _logits(cls.from_pretrained(folder).eval(), inputs)
        if not torch.allclose(again, expected, atol=1e-4):
            raise UnavailableError("transformers does not load what it saved")
        return model, cls, inputs
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(_short(error)) from error


def _inputs(model: nn.Module, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB - 30, (1, SEQ_LEN), generator=g)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    return special_inputs(model, inputs, g)


def _dataset(model: nn.Module) -> list[dict[str, Tensor]]:
    return [_inputs(model, seed) for seed in range(1, CONFIG.num_samples + 1)]


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits.float()


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _same(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((found - expected).norm() / expected.norm())
    _expect(error <= tolerance, f"logits differ by {error:.2g} of their norm")


def _same_tokens(model: Any, decoded: Any, inputs: dict[str, Tensor]) -> None:
    if not hasattr(model, "generate") or not model.can_generate():
        return
    given = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def generated(by: Any) -> Tensor:
        return by.generate(
            **{key: value.clone() for key, value in given.items()}, **options
        )  # BLIP changes them

    try:
        expected = generated(decoded)
    except Exception:  # noqa: BLE001
        return  # transformers itself cannot
    _expect(torch.equal(generated(model), expected), "other tokens are generated")


def _decoded(folder: Path, cls: Any, out: str) -> nn.Module:
    """The model with the weights that an independent decoder reads from the checkpoint `out`, as a dense model."""
    source = {}
    for path in (folder / "model").glob("*.safetensors"):
        source |= load_file(path)
    tensors: dict[str, Tensor] = {}
    for path in (folder / out).glob("*.safetensors"):
        tensors |= load_file(path)
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        weight = decode(
            {part: tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        )
        like = source.get(f"{name}.weight")
        if like is not None and tuple(like.shape) != tuple(weight.shape):
            weight = weight.t() if like.ndim == 2 else weight.reshape(like.shape)
        elif like is not None and like.shape[0] == like.shape[-1] and _is_transposed(weight, like):
            weight = weight.t()
        tensors[f"{name}.weight"] = weight.contiguous()
    target = folder / f"decoded-{out}"
    shutil.copytree(folder / "model", target, ignore=shutil.ignore_patterns("*.safetensors*"))
    experts = {
        name: tensors.pop(name) for name in list(tensors) if name not in source and _EXPERT.search(name)
    }
    unset = {
        k: torch.full_like(v, float("nan"))
        for k, v in source.items()
        if k not in tensors and ".experts." in k
    }
    content = {k: v.clone() for k, v in (tensors | unset).items()}
    save_file(content, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / out / "config.json").read_text())
    config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config))
    model, info = cls.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    for name in info["missing_keys"]:
        model.get_parameter(name).data.fill_(float("nan"))
    _place(model, experts)
    for module in model.modules():
        if getattr(
            module, "zero_expert_num", 0
        ):  # LongCat: rows of experts that return their input are never used
            module.gate_up_proj.data[module.num_routed_experts :].zero_()
    unset_names = [name for name, p in model.named_parameters() if p.isnan().any()]
    _expect(not unset_names, f"the checkpoint lacks {unset_names[:2]}")
    return model.eval()


def _is_transposed(weight: Tensor, like: Tensor) -> bool:
    return float((weight.t() - like).norm()) < float((weight - like).norm())


def _place(model: nn.Module, experts: dict[str, Tensor]) -> None:
    """Write matrices and biases of single experts, which the source holds fused, into the fused parameters."""
    modules = [name for name, _ in model.named_modules()]
    for on_disk, value in experts.items():
        # The files may have another prefix: compare from the number of the block on.
        path, kind = on_disk.rsplit(".", 1)
        block = re.search(r"\.\d+\..*", path)[0]
        parent = block.rsplit(".", 1 if path.rpartition(".")[2].isdigit() else 2)[0]
        (owner,) = (name for name in modules if name.endswith(parent))
        path = owner + block.removeprefix(parent)
        if path.rpartition(".")[2].isdigit():
            parent, number = path.rsplit(".", 1)
            model.get_submodule(parent).weight.data[int(number)] = value
            continue
        parent, number, part = path.replace("linear_gate", "gate_proj").rsplit(".", 2)
        module, e = model.get_submodule(parent), int(number)
        if hasattr(module, "mlp"):  # DBRX
            fused = getattr(module.mlp, {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}[part])
            rows = fused.data.view(module.num_experts, -1, fused.shape[1])[e]
            rows.copy_(value.t() if part == "down_proj" else value)
            continue
        suffix = "_bias" if kind == "bias" else ""
        if part == "down_proj" or not hasattr(module, "gate_up_proj"):
            target = getattr(module, part + suffix).data[e]
        else:
            target = getattr(module, "gate_up_proj" + suffix).data[e]
        transposed = getattr(module, "is_transposed", type(module).__name__.startswith("Llama4"))
        if kind == "weight" and transposed:
            target = target.t()
        if part != "down_proj" and hasattr(module, "gate_up_proj"):
            half = int(part == "up_proj")
            target = target.chunk(2)[half] if getattr(module, "is_concatenated", True) else target[half::2]
        target.copy_(value)


def decode(packed: dict[str, Tensor]) -> Tensor:
    """(out, in) float32 of one 4-bit layer in format "gptq", straight from its definition."""
    shifts = torch.arange(0, 32, BITS)
    codes = (packed["qweight"][:, None, :] >> shifts[None, :, None] & 15).flatten(0, 1).float()  # (in, out)
    zeros = (packed["qzeros"][:, :, None] >> shifts & 15).flatten(1)[:, : codes.shape[1]].float() + 1
    g = packed["g_idx"].long()
    codes = codes[: len(g)]
    return (packed["scales"].float()[g] * (codes - zeros[g])).t()


def _coverage(folder: Path, report: Any) -> tuple[float, list[str], list[str]]:
    """Percent quantized inside the blocks, matrices left in 16 bits with their reasons, and those without a word."""
    from fewbit.context import RunContext
    from fewbit.distributed import open_communicator
    from fewbit.modeling.source import open_source
    from fewbit.profiling import Profiler

    cpu = torch.device("cpu")
    with open_communicator() as comm:
        run = Preparation(RunContext(CONFIG, cpu, comm, Profiler(cpu)), open_source(folder))
        model = run.model
        quantized = {layer["name"] for layer in report.layers}
        skipped = {item["name"]: item["reason"] for item in report.skipped}
    done = total = 0
    left: dict[str, int] = {}
    silent: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = name.removesuffix(".weight")
        if parameter.ndim < 2 or not re.search(r"(^|\.)\d+\.", name):
            continue
        if owner in quantized:
            done += parameter.numel()
            total += parameter.numel()
            continue
        reason = skipped.get(owner, skipped.get(name))
        general = re.sub(r"\d+", "N", owner)
        if reason is None:
            if parameter.numel() > 512:
                silent[f"{general} {tuple(parameter.shape)}"] = 1
                total += parameter.numel()
        elif not _ORDINARY.search(reason) and (not _OTHER.search(reason) or _is_matrix(name, parameter)):
            left[f"{general}: {reason}"] = 1
            total += parameter.numel()
    return 100 * done / max(1, total), list(left), [f"no word on {name}" for name in silent]


def _is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is large in two dimensions, unlike depthwise convolutions and the decay of a state space."""
    return sorted(tensor.shape)[-2] >= 16 and not name.endswith("A_log")


def _short(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:300]
