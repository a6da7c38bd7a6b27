"""Every error ai3 raises: a class with a message template that says what was asked, what was found and what to do."""

from __future__ import annotations


class Ai3Error(RuntimeError):
    """Base of ai3's errors. A subclass's `template` is formatted with the keyword arguments, kept as attributes."""

    template = "{message}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.template.format(**fields))

    def __getattr__(self, name: str) -> object:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.fields)


def _rebuild(cls: type[Ai3Error], fields: dict[str, object]) -> Ai3Error:
    return cls(**fields)


class OptionError(Ai3Error):
    """An option of the backend has a wrong name, type or value."""

    template = "{message}"


class UnknownOptionError(OptionError):
    template = "ai3 has no option {name!r}.{nearest} ai3.options() lists all of them."


class OptionValueError(OptionError):
    template = "option {name!r}: expected {expected}, got {found}."


class SelectorError(Ai3Error):
    """A selector is malformed, or does not fit the graph it is applied to."""

    template = "{message}"


class UnknownAlgorithmError(SelectorError):
    template = (
        "{operation}: there is no algorithm {name!r}.{nearest}\nKnown for {operation}: {known}.\n"
        "`python -m ai3_compile list` describes them."
    )


class SelectorLengthError(SelectorError):
    template = (
        "{operation}: the selector names {given} algorithms, one for each {operation} in the order of the graph, "
        "but the graph has {found}:\n{operations}\n"
        "Give {found}, or a single name, or a function of the operation."
    )


class SelectorCallError(SelectorError):
    template = "{operation}: the selector {selector} failed on {spec}: {error}"


class NothingFitsError(Ai3Error):
    """No algorithm that the selector allows can run an operation; the message holds the reason for each one."""

    template = (
        "{operation} {where}: the selector {selector!r} does not fit this operation.\n{trace}\n"
        "To let something else step in, name it after a bar, in order of preference: {way_out!r}."
    )


class StrictError(Ai3Error):
    template = (
        "{operation} {where}: strict=True, and {selector!r} would leave this operation to torch.\n{trace}\n"
        'Pass strict=False, or say that torch may run it: options={{"{operation}": "{selector}|torch"}}.'
    )


class KernelLoadError(Ai3Error):
    template = "{source}: {message}"


class CoreLibraryError(Ai3Error):
    template = "ai3's core library {path} cannot be used: {message}"


class ModelNameError(Ai3Error):
    template = "model {name!r}: {message}."


class BuildError(Ai3Error):
    """A native source does not compile, or does not link."""

    template = "{name} cannot be built:\n{output}\nThe command was:\n{command}"


class NoCompilerError(BuildError):
    template = "{name} is not built yet, and cannot be built here: {reason}."


class CacheNotWritableError(BuildError):
    template = (
        "{name} is not built yet, and ai3's cache folder {folder} takes no writes ({reason}).\n"
        "Set the environment variable AI3_CACHE_DIR to a folder that does."
    )


class BuildTimeoutError(BuildError):
    template = (
        "{name}: another process has been building it for more than {seconds:g} s; it holds the lock {lock}.\n"
        "End that process, or set AI3_BUILD_TIMEOUT to wait longer."
    )
