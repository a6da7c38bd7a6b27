"""Selectors: what a user may pass for an operation, checked before anything is captured."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SelectorCallError, SelectorError, SelectorLengthError, UnknownAlgorithmError
from .decision import Candidate
from .spec import OpSpec

# `default` and `guess` go by estimates, `auto` by measurements.
POLICIES = ("default", "guess", "auto")

Selectable = str | Sequence[str] | Callable[..., str]


def parse_names(operation: str, text: object, known: Sequence[Candidate]) -> tuple[str, ...]:
    """The names in `"winograd|direct|torch"`, in order of preference.

    Raises UnknownAlgorithmError for a name that no algorithm of the operation has.
    """
    if not isinstance(text, str):
        raise SelectorError(message=f"{operation}: expected the name of an algorithm, got {text!r}.")
    names = tuple(part.strip() for part in text.split("|"))
    valid = sorted({c.name for c in known} | {c.qualified for c in known} | set(POLICIES))
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, 1)
            raise UnknownAlgorithmError(
                operation=operation,
                name=name,
                nearest=f" Did you mean {near[0]!r}?" if near else "",
                known=", ".join(sorted({c.name for c in known}) + list(POLICIES)),
            )
    return names


@dataclass(frozen=True)
class Selector:
    """A checked selector of one operation: `names_for` answers for each occurrence in a graph."""

    operation: str
    value: Selectable
    known: tuple[Candidate, ...]
    exact: bool = True
    """Whether a sequence must end with the graph's operations; else entries beyond them are not used."""

    def check_count(self, specs: Sequence[OpSpec]) -> None:
        """Raises SelectorLengthError where a sequence does not name one entry for each occurrence."""
        if isinstance(self.value, str) or callable(self.value) or len(self.value) == len(specs):
            return
        if len(self.value) > len(specs) and not self.exact:
            return
        raise SelectorLengthError(
            operation=self.operation,
            given=len(self.value),
            found=len(specs),
            operations="\n".join(f"  {i}: {spec}" for i, spec in enumerate(specs)),
        )

    def text_for(self, index: int, spec: OpSpec) -> str:
        """The selector string that applies to the index-th occurrence."""
        if isinstance(self.value, str):
            return self.value
        if not callable(self.value):
            return self.value[index]
        try:
            answer = self.value(spec, spec.input_shape) if takes_shape(self.value) else self.value(spec)
        except Exception as error:  # the user's own code: whatever it raises is shown as what it is
            raise SelectorCallError(
                operation=self.operation, selector=self.value, spec=spec, error=f"{type(error).__name__}: {error}"
            ) from error
        parse_names(self.operation, answer, self.known)
        return answer


def parse_selector(operation: str, value: Any, known: Sequence[Candidate], *, exact: bool = True) -> Selector:
    """Checks a selector: a string, a sequence of strings, or a function of `(op)` or `(op, input_shape)`.

    Raises SelectorError for another type or arity and UnknownAlgorithmError for an unknown name.
    """
    if isinstance(value, str):
        parse_names(operation, value, known)
    elif callable(value):
        takes_shape(value, operation)
    elif isinstance(value, Sequence):
        for entry in value:
            parse_names(operation, entry, known)
        value = tuple(value)
    else:
        raise SelectorError(
            message=f"{operation}: a selector is a name, several in order of preference ('winograd|direct'), a "
            f"sequence of names, or a function of the operation; got {type(value).__name__}."
        )
    return Selector(operation, value, tuple(known), exact)


def takes_shape(function: Callable[..., str], operation: str = "") -> bool:
    """Whether a selector function takes (op, input_shape) rather than (op)."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have no signature: they are called with the operation alone
        return False
    for arguments in ((None, None), (None,)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments) == 2
    raise SelectorError(
        message=f"{operation}: a selector function takes (op) or (op, input_shape), but {function!r} takes {signature}."
    )
