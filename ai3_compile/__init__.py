"""Choose, see, prove and invent the algorithms inside neural networks: a torch.compile backend."""

from __future__ import annotations

from . import errors, swap_torch, testing
from .aithree import (
    DEFAULT_ALGOS,
    FROM_BACKEND,
    SUPPORTED_ALGORITHMS,
    SUPPORTED_FROM_BACKENDS,
    swap_backend,
    using_cublas,
    using_cudnn,
    using_mps_and_metal,
    using_sycl,
)
from .core import invalidate
from .eager import AlgorithmicSelector, swap_conv2d, swap_operation
from .model import Model, convert, load
from .options import Option, check_options, options
from .registry import Algorithm, algorithms
from .report import Report, last_report, reports
from .selection import OpSpec
from .tensor import Tensor
from .testing import compare
from .user_algorithms import register_algorithm, unregister_algorithm
from .version import __version__

__all__ = [
    "Algorithm",
    "AlgorithmicSelector",
    "DEFAULT_ALGOS",
    "FROM_BACKEND",
    "Model",
    "OpSpec",
    "Option",
    "Report",
    "SUPPORTED_ALGORITHMS",
    "SUPPORTED_FROM_BACKENDS",
    "Tensor",
    "__version__",
    "algorithms",
    "check_options",
    "compare",
    "convert",
    "errors",
    "invalidate",
    "last_report",
    "load",
    "options",
    "register_algorithm",
    "reports",
    "swap_backend",
    "swap_conv2d",
    "swap_operation",
    "swap_torch",
    "testing",
    "unregister_algorithm",
    "using_cublas",
    "using_cudnn",
    "using_mps_and_metal",
    "using_sycl",
]
