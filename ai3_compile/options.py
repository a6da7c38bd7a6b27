"""Every option of the backend: name, type, default, choices and a line on what it does."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OptionValueError, UnknownOptionError
from .ops import OPERATIONS
from .selection import Selector, parse_selector


@dataclass(frozen=True)
class Option:
    """One entry of `torch.compile(..., backend="ai3", options={...})`."""

    name: str
    type: str
    default: Any
    choices: tuple[Any, ...]
    """The values it can have; empty where they are not a fixed set."""
    description: str


REST = "rest"
MODE = "mode"
STRICT = "strict"
FUSE = "fuse"
MAX_WORKSPACE = "max_workspace"

_SELECTOR = (
    "a name, 'first|second' in order of preference, a sequence of these, or a function of (op) or (op, input_shape)"
)

OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        *(
            Option(
                name=operation.name,
                type="selector",
                default="default",
                choices=(),
                description=f"algorithm of every {operation.name}: {_SELECTOR}; "
                f"default is {operation.default}: {operation.default_reason}",
            )
            for operation in OPERATIONS.values()
        ),
        Option(
            REST,
            "str",
            "auto",
            ("auto", "inductor", "eager"),
            "what runs the operations that ai3 does not; auto is eager in inference where few of them are left, else "
            "inductor, and the report says which",
        ),
        Option(
            MODE,
            "str or None",
            None,
            (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
            "Inductor's mode, as torch.compile's argument of this name, which cannot be given together with options; "
            "reduce-overhead replays CUDA graphs",
        ),
        Option(STRICT, "bool", False, (True, False), "refuse to leave an operation to torch unless it is named"),
        Option(
            FUSE,
            "bool",
            True,
            (True, False),
            "in inference, fold batch norms into convolutions, run additions, activations and poolings inside "
            "operations, and leave out the copies that linears and attention can do without",
        ),
        Option(
            MAX_WORKSPACE,
            "int or None",
            None,
            (),
            "bytes of scratch memory that a call of an algorithm may ask for; one that asks for more does not fit "
            "(what torch's own needs is not known)",
        ),
    )
}


@dataclass(frozen=True)
class Policy:
    """The options of one compilation, checked."""

    selectors: Mapping[str, Selector]
    rest: str
    strict: bool
    fuse: bool
    mode: str | None = None
    max_workspace: int | None = None
    left_alone: frozenset[str] = frozenset()
    """Operations that their selectors name only because a saved model says what was chosen by default."""

    def is_default(self, operation: str) -> bool:
        """Whether the user left the operation to the policy."""
        return operation in self.left_alone or self.selectors[operation].value == "default"


def options() -> tuple[Option, ...]:
    """All options of the backend."""
    return tuple(OPTIONS.values())


def check_options(given: Mapping[str, Any] | None) -> Policy:
    """Checks options as the backend does when the first graph reaches it; nothing is captured or built.

    Raises UnknownOptionError for a name that is no option, OptionValueError for a value that an option cannot have, and
    SelectorError or UnknownAlgorithmError for a selector that is malformed or names no algorithm.
    """
    from .registry import of_operation

    given = given or {}
    if not isinstance(given, Mapping):
        raise OptionValueError(name="options", expected="a dict", found=repr(given))
    for name in given:
        if name not in OPTIONS:
            near = difflib.get_close_matches(str(name), OPTIONS, 1)
            raise UnknownOptionError(name=name, nearest=f" Did you mean {near[0]!r}?" if near else "")
    for name in (REST, MODE, STRICT, FUSE):
        option = OPTIONS[name]
        # `in` alone would take 1 for True.
        if name in given and not any(
            given[name] is c or (c == given[name] and isinstance(c, str)) for c in option.choices
        ):
            raise OptionValueError(
                name=name, expected=" or ".join(repr(c) for c in option.choices), found=repr(given[name])
            )
    workspace = given.get(MAX_WORKSPACE)
    if workspace is not None and (type(workspace) is not int or workspace < 0):
        raise OptionValueError(name=MAX_WORKSPACE, expected="a number of bytes or None", found=repr(workspace))
    return Policy(
        selectors={
            name: parse_selector(name, given.get(name, OPTIONS[name].default), of_operation(name))
            for name in OPERATIONS
        },
        **{name: given.get(name, OPTIONS[name].default) for name in (REST, MODE, STRICT, FUSE)},
        max_workspace=workspace,
    )
