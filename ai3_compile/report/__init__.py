"""What was chosen for every operation, and why: rows, collected graph by graph and shown as a table."""

from __future__ import annotations

from .history import last_report, reports
from .rows import GraphReport, Report, Row

__all__ = ["GraphReport", "Report", "Row", "last_report", "reports"]
