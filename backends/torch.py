"""Platform torch: the operation stays a PyTorch operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..registry import Algorithm
    from ..selection import OpSpec, Use


class TorchPlatform:
    name = "torch"
    description = "PyTorch's own operations"
    ending = None
    device = None
    casts_parameters = False

    def unavailable(self) -> str | None:
        return None

    def load(self, algorithms: Sequence[Algorithm]) -> None:
        """Nothing to load."""

    def supports(self, algorithm: Algorithm, spec: OpSpec) -> str | None:
        return None

    def cost(self, algorithm: Algorithm, spec: OpSpec) -> float | None:
        return None

    def only_by_name(self, algorithm: Algorithm) -> str | None:
        return None

    def workspace(self, algorithm: Algorithm, spec: OpSpec) -> int:
        return 0

    def search(self, algorithms: Sequence[Algorithm], spec: OpSpec, use: Use) -> None:
        """Nothing to search."""

    def announce(self, algorithms: Sequence[Algorithm], spec: OpSpec) -> None:
        """Nothing to make ready."""

    def prefers_channels_last(self, algorithm: Algorithm) -> bool:
        return False

    def writes_slices(self, algorithm: Algorithm) -> bool:
        return False

    def reads_slices(self, algorithm: Algorithm) -> bool:
        return False

    def applies_prologues(self, algorithm: Algorithm, activation: int) -> bool:
        return False

    def adds_in_place(self, algorithm: Algorithm) -> bool:
        return False

    def is_default(self, algorithm: Algorithm) -> bool:
        return False


PLATFORM = TorchPlatform()
