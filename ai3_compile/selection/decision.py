"""Decision: the algorithm chosen for an operation, and for every other one of its device the reason against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from .spec import OpSpec


class Candidate(Protocol):
    """What `select` needs to know of an algorithm on a platform."""

    @property
    def operation(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def platform(self) -> str: ...
    @property
    def device(self) -> str | None:
        """The type of the devices that it computes on; None for any."""

    @property
    def qualified(self) -> str:
        """`algorithm@platform`."""

    def supports(self, spec: OpSpec) -> str | None:
        """None where it can run the operation, else the reason in a few words."""

    def cost(self, spec: OpSpec) -> float | None:
        """Estimated time in arbitrary units, the same for all algorithms of an operation; None without an estimate."""

    @property
    def only_by_name(self) -> str | None:
        """Why no policy chooses it, only a user who names it; None where they may. Asked where its platform can run."""

    @property
    def fusions(self) -> int:
        """How many kinds of its neighbours' work it can take in, or save: the more, the better for the whole graph."""

    def workspace(self, spec: OpSpec) -> int:
        """Bytes of scratch memory that one call asks for; 0 where it asks for none, or where nobody knows (torch)."""


@dataclass(frozen=True)
class System:
    """The machine as selection sees it: for each platform None where it can run, else the reason why it cannot."""

    platforms: Mapping[str, str | None]


@dataclass(frozen=True)
class Rejected:
    algorithm: str
    """`algorithm@platform`."""
    reason: str


@dataclass(frozen=True)
class Decision:
    spec: OpSpec
    selector: str
    """The selector that applied to this operation, as the user wrote it."""
    chosen: Candidate
    why: str
    rejected: tuple[Rejected, ...]
    by_policy: bool
    """Whether `default` or `guess` chose, not the user by name."""
