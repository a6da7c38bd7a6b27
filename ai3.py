"""`import ai3`: ai3_compile under its short name, the very same module."""

import sys

import ai3_compile
from ai3_compile import *  # noqa: F403 - for type checkers

for _name in ("errors", "swap_torch", "testing"):
    sys.modules[f"{__name__}.{_name}"] = getattr(ai3_compile, _name)
sys.modules[__name__] = ai3_compile
