"""How modules of fused experts hold their weights: one entry for each form that transformers' models use.

`layout_of` recognizes the form by the parameters of a module. The rest of the package sees the matrices of single
experts only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from .. import transformers_internals

Activation = Callable[[Tensor], Tensor]

# Attributes that transformers defines on every class of fused experts.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_GATE_UP, _UP, _DOWN = "gate_up_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class FusedParameter:
    """One fused parameter of a module of experts.

    Attributes:
        name: name in the module, such as ``gate_up_proj``.
        parts: projections that it concatenates along their outputs.
        transposed: whether a matrix is (in, out).
        interleaved: whether the outputs of the parts alternate.
        bias: name of the parameter with their biases (E, out), if there is one.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    bias: str | None = None

    def divide(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Divide a tensor (out, …) of one expert into views for the parts."""
        count = len(self.parts)
        if self.interleaved:
            return tuple(outputs[part::count] for part in range(count))
        return outputs.chunk(count)

    def matrices(self, weight: Tensor, experts: int, number: int) -> dict[str, Tensor]:
        """Return the matrices (out, in) of expert `number`: views of the fused `weight`."""
        matrix = (weight if weight.ndim == 3 else weight.view(experts, -1, weight.shape[-1]))[number]
        return dict(zip(self.parts, self.divide(matrix.t() if self.transposed else matrix), strict=True))


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of one module.

    Attributes:
        experts: E, number of experts.
        hidden_size: H, number of inputs.
        parameters: the fused parameters; together they are all parameters of the module, except for the norm's.
        forward: what the forward gets. "routed": all tokens with the router's choice. "batched": one row of tokens for
            each expert, 0 where the token was not sent to it. "sorted": the tokens sorted by expert, with their counts.
        activation: maps the concatenated outputs of gate and up, or of up alone, to the input of down.
        norm: name of the norm after each expert, if there is one.
        identities: number of further experts that return their input.
    """

    experts: int
    hidden_size: int
    parameters: tuple[FusedParameter, ...]
    forward: Literal["routed", "batched", "sorted"] = "routed"
    activation: Activation | None = None
    norm: str | None = None
    identities: int = 0


def layout_of(module: nn.Module) -> ExpertLayout | str | None:
    """Return the layout of fused experts, the reason why it is not known, or None for another kind of module."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    cubes = {name for name, parameter in own.items() if parameter.ndim == 3}
    if isinstance(module, nn.Conv1d) or not (cubes or hasattr(module, "num_experts")):
        return None
    if all(hasattr(module, flag) for flag in _FLAGS):
        return _standard(module, own)
    for layout in (_batched, _sorted, _stacked, _with_identities, _plain):
        found = layout(module, own)
        if found is not None:
            return found
    if not cubes or not ("expert" in type(module).__name__.lower() or hasattr(module, "num_experts")):
        return None
    return f"{type(module).__name__} holds a weight of three dimensions that is not one of transformers' fused experts"


def _standard(module: nn.Module, own: Mapping[str, Tensor]) -> ExpertLayout | str:
    """transformers' own form: ``gate_up_proj`` (E, 2I, H) or ``up_proj`` (E, I, H), and ``down_proj`` (E, H, I)."""
    first = _GATE_UP if module.has_gate else _UP
    parts = ("gate_proj", _UP) if module.has_gate else (_UP,)
    transposed = bool(module.is_transposed)
    bias = {name: f"{name}_bias" if module.has_bias else None for name in (first, _DOWN)}
    norm = "post_expert_norm" if getattr(module, "has_post_expert_norm", False) else None
    expected = {first, _DOWN, *(name for name in bias.values() if name)}
    if set(own) != expected:
        return f"{type(module).__name__} holds other weights than {first} and {_DOWN}"
    E, outputs, H = _shape(own[first], transposed)
    if _shape(own[_DOWN], transposed) != (E, H, outputs // len(parts)) or outputs % len(parts):
        return f"{type(module).__name__} holds other weights than {first} (E, {len(parts)}I, H) and {_DOWN} (E, H, I)"
    interleaved = len(parts) > 1 and not module.is_concatenated
    return ExpertLayout(
        E,
        H,
        (
            FusedParameter(first, parts, transposed, interleaved, bias[first]),
            FusedParameter(_DOWN, (_DOWN,), transposed, bias=bias[_DOWN]),
        ),
        activation=transformers_internals.expert_activation(module),
        norm=norm,
    )


def _batched(module: nn.Module, own: Mapping[str, Tensor]) -> ExpertLayout | None:
    """Llama 4: ``gate_up_proj`` (E, H, 2I) and ``down_proj`` (E, I, H), applied to one row of tokens per expert."""
    act_fn = getattr(module, "act_fn", None)
    if set(own) != {_GATE_UP, _DOWN} or not callable(act_fn) or hasattr(module, "num_routed_experts"):
        return None
    E, H, outputs = own[_GATE_UP].shape
    if own[_DOWN].shape != (E, outputs // 2, H):
        return None
    parameters = (
        FusedParameter(_GATE_UP, ("gate_proj", _UP), transposed=True),
        FusedParameter(_DOWN, (_DOWN,), transposed=True),
    )
    return ExpertLayout(E, H, parameters, "batched", _gated(act_fn))


def _sorted(module: nn.Module, own: Mapping[str, Tensor]) -> ExpertLayout | None:
    """JetMoE and the older Granite models: one linear layer for each expert, ``weight`` (E, out, in)."""
    sizes = [getattr(module, name, None) for name in ("num_experts", "output_size", "input_size")]
    if set(own) != {"weight"} or list(own["weight"].shape) != sizes:
        return None
    E, _, inputs = own["weight"].shape
    return ExpertLayout(E, inputs, (FusedParameter("weight", ("linear",)),), "sorted")


def _stacked(module: nn.Module, own: Mapping[str, Tensor]) -> ExpertLayout | None:
    """DBRX: ``mlp.w1``, ``mlp.v1`` and ``mlp.w2``, each (E·I, H), ; the module has no other parameters."""
    mlp = getattr(module, "mlp", None)
    weights = {} if own or not isinstance(mlp, nn.Module) else dict(mlp.named_parameters())
    act_fn, E = getattr(mlp, "activation_fn", None), getattr(module, "num_experts", 0)
    if set(weights) != {"w1", "v1", "w2"} or not callable(act_fn):
        return None
    parameters = (
        FusedParameter("mlp.w1", ("gate_proj",)),
        FusedParameter("mlp.v1", (_UP,)),
        FusedParameter("mlp.w2", (_DOWN,), transposed=True),
    )
    return ExpertLayout(E, weights["w1"].shape[1], parameters, activation=_gated(act_fn))


def _with_identities(module: nn.Module, own: Mapping[str, Tensor]) -> ExpertLayout | None:
    """LongCat: experts as in transformers' own form, and choices beyond them that return their input."""
    routed, act_fn = getattr(module, "num_routed_experts", None), getattr(module, "act_fn", None)
    if set(own) != {_GATE_UP, _DOWN} or routed is None or not callable(act_fn):
        return None
    E, H, _ = own[_DOWN].shape
    if routed != E or own[_GATE_UP].shape[0] < E:
        return None
    parameters = (FusedParameter(_GATE_UP, ("gate_proj", _UP)), FusedParameter(_DOWN, (_DOWN,)))
    identities = int(getattr(module, "zero_expert_num", 0))
    return ExpertLayout(E, H, parameters, activation=_gated(act_fn), identities=identities)


def _plain(module: nn.Module, own: Mapping[str, Tensor]) -> ExpertLayout | None:
    """Step 3.7: as transformers' own form, without its attributes; recognized by the arguments of its forward."""
    arguments = list(inspect.signature(module.forward).parameters)
    act_fn = getattr(module, "act_fn", None)
    if set(own) != {_GATE_UP, _DOWN} or arguments != ["hidden_states", "top_k_index", "top_k_weights"]:
        return None
    E, H, inner = own[_DOWN].shape
    if own[_GATE_UP].shape != (E, 2 * inner, H) or not callable(act_fn):
        return None
    parameters = (FusedParameter(_GATE_UP, ("gate_proj", _UP)), FusedParameter(_DOWN, (_DOWN,)))
    return ExpertLayout(E, H, parameters, activation=getattr(module, "_apply_gate", None) or _gated(act_fn))


def _shape(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    E, rows, columns = weight.shape
    return (E, columns, rows) if transposed else (E, rows, columns)


def _gated(act_fn: Activation) -> Activation:
    def activation(outputs: Tensor) -> Tensor:
        gate, up = outputs.chunk(2, dim=-1)
        return act_fn(gate) * up

    return activation
