"""How much of a GPU's memory the activations of paused batches may have, and about how much they want; and how many
experts of a layer it can hold the inputs and the matrices of at a time.

Contract: arithmetic on what the device says is free before the pass. The budget is what remains when the weights, the
matrices of the solver and the forward of one batch have theirs; some of it is lost to holes. What the batches want is
an estimate on the safe side: it only decides whether they have to be watched, which takes time. Those that are watched
are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mode

import torch
from torch import nn

from ..modeling.experts import DOWN, UnfusedExperts, unfused_modules
from ..modeling.layers import is_layer, matrix_shape
from ..planning import Plan, block_of
from .expert_calibration import TOKENS_PER_FEATURE
from .solving import MOST_ROWS
from .statistics import PROBE_TOKENS, Rows
from .streaming import Weights

# Storages that stay when something outside of the jobs, such as a Hessian, goes through them all.
RESIDENT_STORAGES = 8

# n × n matrices in float32 that a layer needs: H, its factor, what makes it, and those kept of the Hessian before; in
# two streams also C and the factor for the correction.
_MATRICES = {1: 5, 2: 9}

# Bytes in float32 and in codes for every weight of the layer that is solved.
_SOLVER_BYTES = {1: 15, 2: 26}

# The same where layers are solved as one batch. In the sweep: the weight, the target, the batch of targets, and for
# each of three grids the errors, and codes in two orders. While targets are judged: the weight and the target.
_BATCH_SWEEP, _BATCH_JUDGED = 30, 8

# Values for every token that a paused batch holds at most: of the widest layer's input or output, a gate beside it, and
# of states between layers (the residual, the layer's input, queries, keys).
_WIDEST, _STATES = 1.5, 4

# Share of a GPU's free memory that is not counted on.
FRAGMENTATION = 0.1

# Share of the room that a company of experts may have for its inputs and its matrices. A larger company saves little,
# and activations that find no room travel twice at every meeting point.
COMPANY_SHARE = 0.25

# Tokens of a company's experts, as a multiple of what would be theirs if all experts got the same; with those that the
# full-precision stream computes besides.
_UNEVEN = 3


@dataclass(frozen=True)
class ActivationBudget:
    """For activations of paused batches on a device.

    Attributes:
        bytes: that they may have. needed: that they are thought to want at most.
        pinned: whether memory of the host has to be pinned for copies that nobody waits for.
    """

    bytes: int
    needed: int
    pinned: bool


def activation_budget(
    model: nn.Module,
    plan: Plan,
    weights: Weights,
    batches: Sequence[Rows],
    streams: int,
    companies: Mapping[str, int] | None = None,
) -> ActivationBudget | None:
    """The room that a GPU has for the activations of these batches; None on devices that do not say what is free.

    Args:
        model: whose weights may still be on the meta device. batches: of this process.
        streams: forward passes of every batch, 1 or 2.
        companies: module of experts → how many of them run together; those that are not named run alone.
    """
    free = free_device_bytes(weights.device)
    if free is None:
        return None
    shapes = [matrix_shape(m) for name, m in model.named_modules() if is_layer(m) and block_of(name) != name]
    shapes = shapes or [(layer.out_features, layer.in_features) for layer in plan.layers]
    itemsize = next(model.parameters()).dtype.itemsize
    tokens = [max(batch.counts, default=1) for batch in batches]
    widest, states = max(map(max, shapes)), mode(n for _, n in shapes)
    of_token = round(_WIDEST * widest + _STATES * states) * itemsize
    together = [
        (CompanyCost.of(model, name, batches, streams), size) for name, size in (companies or {}).items()
    ]
    needed = streams * sum(tokens) * of_token + max((cost.inputs(size) for cost, size in together), default=0)
    most = max(tokens, default=0)
    # Norms and activations compute in float32.
    forward = 2 * most * of_token * max(1, 4 // itemsize) + RESIDENT_STORAGES * most * widest * itemsize
    solver = max([solver_bytes(plan, streams), *(cost.matrices(size) for cost, size in together)])
    taken = weights.pending_bytes() + solver + forward
    return ActivationBudget(
        max(0, round((1 - FRAGMENTATION) * free) - taken), needed, weights.device.type == "cuda"
    )


def companies_on_device(
    model: nn.Module, plan: Plan, weights: Weights, batches: Sequence[Rows], streams: int
) -> dict[str, int]:
    """Module of experts → how many of them run together: as many as fill a GPU, if it can hold them; none on devices
    that do not say what is free.

    Arguments are those of `activation_budget`.
    """
    room = activation_budget(model, plan, weights, batches, streams)
    if room is None:
        return {}
    allowed = COMPANY_SHARE * room.bytes
    if room.needed <= room.bytes:  # companies are to be no reason to watch activations, and to move them
        allowed = min(allowed, room.bytes - room.needed)
    planned = {layer.name.rsplit(".", 2)[0] for layer in plan.layers if layer.settings.method == "gptq"}
    sizes = {}
    for name, experts in unfused_modules(model).items():
        cost, E = CompanyCost.of(model, name, batches, streams), experts.num_experts
        useful = range(2, min(E, MOST_ROWS // cost.rows) + 1 if name in planned else 0)
        fitting = [G for G in useful if cost.inputs(G) + cost.matrices(G) <= allowed]
        if fitting:
            companies = -(-E // fitting[-1])
            sizes[name] = -(-E // companies)  # about equal ones
    return sizes


@dataclass(frozen=True)
class CompanyCost:
    """What experts of one layer take in memory while they run and are solved together.

    Attributes:
        experts: E, of the layer. choices: experts that a token is sent to. tokens: of all batches.
        width: H. widest: the larger of the inputs of the two halves. itemsize: of activations. streams: 1 or 2.
        rows: of the weights that one expert adds to a solve; of the larger half.
        solver: bytes for the matrices of one expert.
    """

    experts: int
    choices: int
    tokens: int
    width: int
    widest: int
    itemsize: int
    streams: int
    rows: int
    solver: int

    @classmethod
    def of(cls, model: nn.Module, name: str, batches: Sequence[Rows], streams: int) -> CompanyCost:
        """Of the module of experts `name`."""
        module = model.get_submodule(name)
        assert isinstance(module, UnfusedExperts)
        expert = module.expert(0)
        shapes = {layer: matrix_shape(child) for layer, child in expert.named_children()}
        H, inner = module.hidden_size, shapes[DOWN][1]
        halves = [(sum(shapes[layer][0] for layer in expert.first), H), (H, inner)]
        probe = 4 * PROBE_TOKENS if streams == 2 else 0  # bytes for each input or output of its tokens
        return cls(
            experts=module.num_experts,
            choices=_choices(model, module.num_experts),
            tokens=sum(max(batch.counts, default=1) for batch in batches),
            width=H,
            widest=max(H, inner),
            itemsize=next(module.parameters()).dtype.itemsize,
            streams=streams,
            rows=max(rows for rows, _ in halves),
            solver=max(
                _MATRICES[streams] * 4 * n**2
                + 2 * probe * n
                # The probes as a batch, and three products of each with the weights.
                + max(_BATCH_SWEEP * n * rows, _BATCH_JUDGED * n * rows + probe * (2 * n + 3 * rows))
                for rows, n in halves
            ),
        )

    def inputs(self, size: int) -> int:
        """Bytes that all batches hold for `size` experts: inputs of their first layers, or of the down projections.

        A token is among the inputs of as many of them as it was sent to; starved ones get some more.
        """
        sent = self.tokens * min(size, self.choices, _UNEVEN * self.choices * size / self.experts)
        added = size * TOKENS_PER_FEATURE * self.width
        return round(self.streams * (sent + added) * self.widest * self.itemsize)

    def matrices(self, size: int) -> int:
        """Bytes that the solver needs for `size` experts: nothing is shared by two of them."""
        return size * self.solver


def _choices(model: nn.Module, experts: int) -> int:
    """Experts that a token is sent to; where the configuration does not say, all."""
    config = getattr(model, "config", None)
    known = getattr(config.get_text_config(), "num_experts_per_tok", None) if config is not None else None
    return known if isinstance(known, int) else experts


def free_device_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA device that this process could still fill; None on others, which do not say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def solver_bytes(plan: Plan, streams: int) -> int:
    """What the layer that takes most needs while it is solved."""
    sizes = (
        _MATRICES[streams] * 4 * layer.in_features**2
        + _SOLVER_BYTES[streams] * layer.in_features * layer.out_features
        for layer in plan.layers
    )
    return max(sizes, default=0)
