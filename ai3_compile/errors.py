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


class UnknownOperationError(SelectorError):
    template = "ai3 has no operation {name!r}.{nearest} It has: {known}."


class AlgorithmError(Ai3Error):
    """The user's own algorithm failed, or says what cannot be."""

    template = "{label}: {message}"


class ActivationGradientError(Ai3Error):
    """A gradient is asked for through an activation that only inference fuses."""

    template = (
        "{operation} has no gradient through {activation}, which it was called with as its activation: only relu has. "
        "Call it without an activation, and torch's {activation} behind it."
    )


class PrologueGradientError(Ai3Error):
    """A gradient is asked for through a prologue, which only inference fuses."""

    template = (
        "{operation} has no gradient through the batch norm of its input, which it was called with as its prologue. "
        "Call it without one, and torch's batch norm before it."
    )


class RegistrationError(Ai3Error):
    """An algorithm cannot be registered as it is."""

    template = "{operation} {name!r} cannot be registered: {message}."


class UnsupportedCallableError(Ai3Error):
    """Something was to be swapped or converted that ai3 has no algorithm for."""

    template = "{message}"


class ModuleError(Ai3Error):
    """What was to be swapped or converted is no module, or not one that can be used as it is."""

    template = "{message}"


class SampleShapeError(ModuleError):
    template = (
        "the model does not run on a sample of shape {shape}: {error}\n"
        "Pass as sample_input_shape the shape of an input that the model takes, with its batch: (1, 3, 224, 224)."
    )


class InputError(Ai3Error):
    """An input does not fit the Model."""

    template = "{message}"


class TensorTypeError(Ai3Error):
    template = (
        "{found} cannot be used{reason}: ai3 takes and gives torch.Tensor, numpy.ndarray, ai3.Tensor and the arrays of "
        "libraries that speak DLPack."
    )


class ArchiveError(Ai3Error):
    """A saved model cannot be read."""

    template = "{path} is no model that ai3 can read: {message}."


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


class KernelMemoryError(Ai3Error):
    """An algorithm wrote where it must not, or did not write where it must."""

    template = "{buffer}: {what}"


class AlgorithmCheckError(Ai3Error):
    """An algorithm is wrong on cases of its operation; `report` holds all of them."""

    template = "{operation} {name!r} is not right.\n{failures}\n\n{report}"


class ShapeError(Ai3Error):
    """A shape to compare algorithms on cannot be one."""

    template = "{operation}: {given!r} is not a shape to compare on: {message}.\nWrite it as {example}."


class MissingPackageError(Ai3Error):
    template = "{purpose} needs {package}: pip install {package}"
