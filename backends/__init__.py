"""The platforms, one module each: what computes an algorithm. A module that defines PLATFORM is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..registry import Algorithm
    from ..selection import OpSpec, Use


class Platform(Protocol):
    name: str
    description: str
    ending: str | None
    """How its kernel files end, after the algorithm's name; None where it has no files."""
    device: str | None
    """The type of the devices that it computes on; None for any."""
    casts_parameters: bool
    """Whether its algorithms take parameters of float32 beside an input of halves, cast once."""

    def unavailable(self) -> str | None:
        """None where this machine can run it, else the reason."""

    def load(self, algorithms: Sequence[Algorithm]) -> None:
        """Builds and loads these algorithms, those that are not loaded yet."""

    def supports(self, algorithm: Algorithm, spec: OpSpec) -> str | None:
        """None where the algorithm can run the operation, else the reason."""

    def cost(self, algorithm: Algorithm, spec: OpSpec) -> float | None:
        """The algorithm's estimate, corrected by what was measured of it, with what its layout costs the operations
        around it; None without one."""

    def only_by_name(self, algorithm: Algorithm) -> str | None:
        """Why no policy may choose the algorithm, only a user who names it; None where they may."""

    def workspace(self, algorithm: Algorithm, spec: OpSpec) -> int:
        """Bytes of scratch memory that one call asks ai3 for, on this process's threads; 0 where it asks for none."""

    def search(self, algorithms: Sequence[Algorithm], spec: OpSpec, use: Use) -> None:
        """Before these algorithms are measured, or run: finds the fastest of the ways that any of them has."""

    def announce(self, algorithms: Sequence[Algorithm], spec: OpSpec) -> None:
        """These will run the operation soon: what only that needs may be made ready in the background."""

    def prefers_channels_last(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm works on channels_last images without converting them."""

    def writes_slices(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm can write its result into some channels of a larger image, in channels_last."""

    def reads_slices(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm reads an input that is some channels of a larger image as it lies, in channels_last."""

    def applies_prologues(self, algorithm: Algorithm, activation: int) -> bool:
        """Whether the algorithm applies a batch norm and the activation of this number to its input as it reads it."""

    def pools(self, algorithm: Algorithm, spec: OpSpec, activation: int) -> bool:
        """Whether a convolution that ends with this activation takes in a max pooling of 2x2 pixels behind it, and in
        less time than the two take."""

    def adds_in_place(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm can add its result to an image, in channels_last, that lies where it is written."""

    def is_default(self, algorithm: Algorithm) -> bool:
        """Whether its author wants it to be what `default` takes first."""
