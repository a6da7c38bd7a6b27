"""Choose, see, prove and invent the algorithms inside neural networks: a torch.compile backend."""

from __future__ import annotations

from . import errors
from .core import invalidate
from .options import Option, check_options, options
from .registry import Algorithm, algorithms
from .report import Report, last_report, reports
from .selection import OpSpec
from .version import __version__

__all__ = [
    "Algorithm",
    "OpSpec",
    "Option",
    "Report",
    "__version__",
    "algorithms",
    "check_options",
    "errors",
    "invalidate",
    "last_report",
    "options",
    "reports",
]
