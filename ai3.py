"""`import ai3`: ai3_compile under its short name."""

from ai3_compile import *  # noqa: F403
from ai3_compile import __all__, __version__  # noqa: F401
