"""What the layers that share a Hessian compute once: its factorizations, and the direction of the correction."""

from __future__ import annotations

from ..config import LayerSettings
from ..errors import SolverError
from .cholesky import FactoredHessian, prepare
from .correction import Drift, drifts_of
from .hessian import Hessian


class FactorCache:
    """The factorizations and the drift of one Hessian, kept beside it for the layers that share it.

    Layers with the same act_order, group_size and damp get the same factorization. Drop the cache
    together with its Hessian, and never add tokens after the first use.
    """

    def __init__(self) -> None:
        self._hessian: Hessian | None = None
        self._prepared: dict[tuple[str, int, float], FactoredHessian] = {}
        self._drift: Drift | None = None

    def get(self, hessian: Hessian, settings: LayerSettings) -> FactoredHessian:
        """The factorization for these settings, computed at the first request.

        Raises:
            SolverError: the cache belongs to another Hessian.
        """
        self._belongs_to(hessian)
        if not self.has(settings):
            prepared = prepare(hessian, settings.group_size, settings.act_order, settings.damp)
            self._prepared[_key(settings)] = prepared
        return self._prepared[_key(settings)]

    def has(self, settings: LayerSettings) -> bool:
        """Whether the factorization for these settings is there."""
        return _key(settings) in self._prepared

    def put(self, hessian: Hessian, settings: LayerSettings, prepared: FactoredHessian) -> None:
        """Keep a factorization that was computed together with others.

        Raises:
            SolverError: the cache belongs to another Hessian.
        """
        self._belongs_to(hessian)
        self._prepared[_key(settings)] = prepared

    def drift(self, hessian: Hessian) -> Drift:
        """The direction of the correction, computed at the first request.

        Raises:
            SolverError: the cache belongs to another Hessian.
        """
        self._belongs_to(hessian)
        if self._drift is None:
            [self._drift] = drifts_of([hessian])
        return self._drift

    @property
    def has_drift(self) -> bool:
        """Whether the direction of the correction is there."""
        return self._drift is not None

    def put_drift(self, hessian: Hessian, drift: Drift) -> None:
        """Keep a direction that was computed together with others.

        Raises:
            SolverError: the cache belongs to another Hessian.
        """
        self._belongs_to(hessian)
        self._drift = drift

    def _belongs_to(self, hessian: Hessian) -> None:
        if self._hessian is not None and self._hessian is not hessian:
            raise SolverError("this FactorCache belongs to another Hessian; make one cache per Hessian")
        self._hessian = hessian


def _key(settings: LayerSettings) -> tuple[str, int, float]:
    return settings.act_order, settings.group_size, settings.damp
