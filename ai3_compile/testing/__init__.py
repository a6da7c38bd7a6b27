"""Proving and measuring algorithms, ai3's and the user's own."""

from __future__ import annotations

from .check import CheckReport, check_algorithm
from .compare import Comparison, compare

__all__ = ["CheckReport", "Comparison", "check_algorithm", "compare"]
