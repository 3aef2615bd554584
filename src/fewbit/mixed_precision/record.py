"""The choice on disk, beside the journal, so that a resumed run neither pays for it again nor changes it.

``OUT/.fewbit/allocation.json``: the run's fingerprint, the settings of every layer and the sentences about
them, with a checksum. A file that is damaged, or from other inputs, counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic_io import write_whole
from ..errors import OutputError, ResumeError
from .units import Choice

NAME = "allocation.json"


@dataclass(frozen=True)
class Allocation:
    """Bits and group size of every layer, and sentences about the choice."""

    layers: dict[str, Choice]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class BudgetStore:
    """Where the choice of one run is kept.

    Attributes:
        folder: of the journal. fingerprint: of everything that decides the result.
        finished: records of the layers that are already solved, with their bits and group sizes.
    """

    folder: Path
    fingerprint: Mapping[str, str]
    finished: Mapping[str, Mapping[str, Any]]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / NAME

    def read(self) -> Allocation | None:
        """The stored choice; None where there is none that can be used."""
        if not self.path.is_file():
            return None
        checksum, _, text = self.path.read_bytes().decode(errors="replace").partition("\n")
        if checksum != _checksum(text):
            return None
        try:
            values = json.loads(text)
            if values["fingerprint"] != dict(self.fingerprint):
                return None
            layers = {name: Choice(*choice) for name, choice in values["layers"].items()}
            return Allocation(layers, tuple(values["notes"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, allocation: Allocation) -> None:
        """Store a choice.

        Raises:
            ResumeError: it differs from what the finished layers have.
            OutputError: the disk is full or cannot be written.
        """
        for name, record in self.finished.items():
            if allocation.layers[name] != (record["bits"], record["group_size"]):
                raise ResumeError(
                    f"{self.path} was lost, and choosing again gives {name} other bits than it already has: "
                    f"delete {self.folder} to start again"
                )
        values = {
            "fingerprint": dict(self.fingerprint),
            "layers": allocation.layers,
            "notes": allocation.notes,
        }
        text = json.dumps(values, indent=1)
        try:
            write_whole(self.path, f"{_checksum(text)}\n{text}".encode())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}. Make room and run the same command again"
            ) from error


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
