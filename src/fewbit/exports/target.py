"""What a target is: how it stores a quantized layer, whether that is exact, and what its configuration says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checkpoint.layout import Shaped
from ..quantized_matrix import QuantizedMatrix


@dataclass(frozen=True)
class LayerGrid:
    """A quantized layer without its codes: enough to decide whether a target can hold it.

    Attributes:
        name: full name of the layer.
        shape: (out, in).
        bits: 2, 3, 4 or 8.
        group_size: inputs per group, −1 for one group.
        scales: float (out, groups).
        zeros: int16 (out, groups).
        act_order: whether groups are anything other than consecutive inputs.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    scales: Tensor
    zeros: Tensor
    act_order: bool

    @property
    def sym(self) -> bool:
        """Whether all zero points are in the middle of the codes."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    @property
    def uneven(self) -> bool:
        """Whether the last group is shorter."""
        return self.group_size != -1 and self.shape[1] % self.group_size != 0


@dataclass(frozen=True)
class Verdict:
    """Whether a target can hold a layer.

    Attributes:
        refused: why it cannot; None if it can.
        error: largest change of a weight, as a share of the step of its grid; 0 if the layer is exact.
        reason: why it is not exact.
    """

    refused: str | None = None
    error: float = 0.0
    reason: str = ""


EXACT = Verdict()


class Target(ABC):
    """A format of another engine, in safetensors files beside the model's config.json.

    Attributes:
        name: name on the command line.
        title: format and engines.
        metadata: ``format`` in the header of the files.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metadata: ClassVar[str] = "pt"

    @abstractmethod
    def judge(self, grid: LayerGrid) -> Verdict:
        """Decide whether the format can hold a layer."""

    def judge_all(self, grids: Iterable[LayerGrid]) -> str | None:
        """Return why the format cannot hold these layers in one model; None if it can."""
        return None

    @abstractmethod
    def planned(self, grid: LayerGrid) -> dict[str, Shaped]:
        """Return dtype and shape of the layer's tensors by their short names."""

    @abstractmethod
    def tensors(self, codes: QuantizedMatrix) -> dict[str, Tensor]:
        """Return the layer's tensors by their short names."""

    @abstractmethod
    def config(
        self, config: Mapping[str, Any], grids: Sequence[LayerGrid], plain: Sequence[str]
    ) -> dict[str, Any]:
        """Return the content of config.json.

        Args:
            config: the source's, without its ``quantization_config``.
            grids: all quantized layers.
            plain: full names of the layers that are not quantized.
        """

    def notes(self, grids: Sequence[LayerGrid]) -> list[str]:
        """Return sentences for the user."""
        return []


def refuse_order_and_short_groups(grid: LayerGrid) -> Verdict | None:
    """The refusals that most formats have in common."""
    if grid.act_order:
        return Verdict("act-order: groups must be consecutive inputs (quantize with --act-order group)")
    if grid.uneven:
        return Verdict(f"{grid.shape[1]} inputs are no multiple of the group size {grid.group_size}")
    return None


def most_common(values: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the value that occurs most often, the first of several."""
    return max(dict.fromkeys(values), key=values.count)
