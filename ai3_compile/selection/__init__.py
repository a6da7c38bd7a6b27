"""Which algorithm runs an operation, and why: pure functions over dataclasses; no graph, no build, no device."""

from .decision import Candidate, Decision, Rejected, System
from .select import select
from .selector import Selector, parse_selector
from .spec import OpSpec, TensorSpec, Use

__all__ = [
    "Candidate",
    "Decision",
    "OpSpec",
    "Rejected",
    "Selector",
    "System",
    "TensorSpec",
    "Use",
    "parse_selector",
    "select",
]
