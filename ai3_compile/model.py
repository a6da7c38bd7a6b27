"""convert: a network that ai3 manages, as an ai3.Model."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from . import registry
from .eager import AlgorithmicSelector, check_module, run_sample, swap_operation
from .errors import InputError, ModuleError, OptionValueError, SelectorError, UnsupportedCallableError
from .ops import GRADIENTS, OPERATIONS
from .options import Policy
from .report import Report, history
from .selection import OpSpec, Selector, parse_selector
from .selection.selector import takes_shape
from .tensor import convert as convert_tensor
from .tensor import is_read_only, to_torch

if TYPE_CHECKING:
    from .program import Program

log = logging.getLogger(__name__)

_IMAGE_MODULES = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def convert(
    module: nn.Module,
    algos: Mapping[str, AlgorithmicSelector] | None = None,
    sample_input_shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    strict: bool = False,
) -> Model:
    """A copy of a network, for inference, in which every operation is computed by the algorithm chosen for it.

    The network is captured as a graph with torch.export, batch norms are folded, residuals and activations fused, and
    channels_last kept between operations; what ai3 has no algorithm for runs in PyTorch. A network that torch.export
    cannot capture (control flow that depends on data) is captured by torch.compile instead: `Model.capture` says which,
    and why.

    Args:
        module: the network; it stays as it is. The Model computes as it does in eval mode, without gradients.
        algos: for each operation (conv2d, linear, maxpool2d, ...) an AlgorithmicSelector; `default` for those that are
            not named. A function gets the module, or an OpSpec where a function call is no module's.
        sample_input_shape: shape of an input, with its batch, such as (1, 3, 224, 224): the network is captured now.
            Without it, it is captured when it is first called.
        dtype: of the Model's weights and inputs; the network's own by default.
        strict: refuse a network in which anything is left to PyTorch.

    Raises:
        ModuleError, SampleShapeError: the network or the sample; UnsupportedCallableError: strict, with the list of
        what would be left; OptionValueError, SelectorError, UnknownAlgorithmError, NothingFitsError: the selectors.
    """
    check_module(module)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionValueError(name="dtype", expected="a floating-point torch.dtype", found=repr(dtype))
    if not isinstance(strict, bool):
        raise OptionValueError(name="strict", expected="True or False", found=repr(strict))
    selectors = _selectors(algos)
    for name, selector in selectors.items():
        if callable(selector.value) and takes_shape(selector.value) and sample_input_shape is None:
            raise SelectorError(
                message=f"{name}: the selector function takes the input shape as well, so convert needs "
                "sample_input_shape: the shape of an input of the model, such as (1, 3, 224, 224)."
            )
    with torch.inference_mode(False):  # weights made in inference mode do not count their changes, and are never kept
        try:
            network = copy.deepcopy(module).eval()
        except Exception as error:  # the network's own code: whatever it raises is shown as what it is
            raise ModuleError(message=f"the model cannot be copied: {type(error).__name__}: {error}") from error
        network.requires_grad_(False)
        model = Model(network if dtype is None else network.to(dtype), selectors, strict)
        if sample_input_shape is not None:
            sample = run_sample(network, sample_input_shape)
            with torch.no_grad(), torch.autocast(sample.device.type, enabled=False):
                model._program_for(sample.unsqueeze(0) if model._is_image_without_batch(sample) else sample)
    return model


def _selectors(algos: object) -> dict[str, Selector]:
    algos = {} if algos is None else algos
    if not isinstance(algos, Mapping):
        raise OptionValueError(
            name="algos", expected="a dict from operations to selectors, {'conv2d': 'direct'}", found=repr(algos)
        )
    for name in algos:
        if registry.check_operation(name) in GRADIENTS:
            raise UnsupportedCallableError(
                message=f"Unsupported callable: {name} is of training, and a converted model only predicts; "
                f"torch.compile(model, backend='ai3', options={{{name!r}: ...}}) trains with it."
            )
    return {
        name: parse_selector(name, algos.get(name, "default"), registry.of_operation(name), exact=False)
        for name in OPERATIONS
    }


def load(path: str | os.PathLike[str] | io.BufferedIOBase) -> Model:
    """Reads a Model that `Model.save` wrote. What was chosen is taken over, without choosing or measuring again;
    where the file is of another CPU, or of another version of an algorithm, the rows concerned are chosen again by
    the selectors they had, which the log and the report say.

    Raises FileNotFoundError, ArchiveError for a damaged file or one of another kind, UnknownAlgorithmError where it
    names an algorithm of the user's own that is not registered here.
    """
    from . import archive  # torch.export takes a second to import

    return archive.load(path)


class Kind(NamedTuple):
    """What the inputs of one capture have in common."""

    batch: int | None
    """None for any."""
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        return "x".join(map(str, ("N" if self.batch is None else self.batch, *self.sizes)))


class Model:
    """A network that computes with the algorithms chosen for it; `convert` and `load` make one."""

    def __init__(
        self,
        network: nn.Module | None,
        selectors: Mapping[str, Selector],
        strict: bool = False,
        weights: Mapping[str, torch.Tensor] | None = None,
        takes_images: bool = False,
    ) -> None:
        self._network, self._selectors, self._strict = network, selectors, strict
        self._weights: dict[str, torch.Tensor] = dict(weights or {})
        self._takes_images = takes_images
        if network is not None:
            self._weights = _tensors(network)
            self._takes_images = any(isinstance(child, _IMAGE_MODULES) for child in network.modules())
        self._programs: dict[Kind, Callable[[torch.Tensor], Any]] = {}
        self._reports: list[Report] = []
        self._as_given: set[Kind] = set()
        self._lock = threading.RLock()
        self.capture = "not captured yet: call the model once, or pass sample_input_shape to convert"
        """How the network was captured: torch.export, or torch.compile and why."""

    def __call__(self, input: Any) -> Any:
        """The output for an input, as the input's type: torch.Tensor, numpy.ndarray, ai3.Tensor, or anything whose
        library has `from_dlpack`. A Model takes one tensor, [N, ...] of any N; an image [C, H, W] that the network does
        not take is a batch of one. Autocast does not reach into a Model."""
        return self.predict(input, type(input))

    def predict(self, input: Any, out_type: Any = None) -> Any:
        """The output for an input, as `out_type`: a type (torch.Tensor, numpy.ndarray), its name, or ai3.Tensor for
        None. The input's memory is used as it is, not copied.

        Raises TensorTypeError for an input or output of another kind, InputError for one that does not fit.
        """
        tensor = to_torch(input)
        with torch.no_grad(), _without_autocast(tensor.device.type):
            unbatched = self._is_image_without_batch(tensor)
            tensor = tensor.unsqueeze(0) if unbatched else tensor
            program = self._program_for(tensor)
            if getattr(program, "writes_input", True) and is_read_only(input):
                tensor = tensor.clone()
            output = program(tensor)
        if unbatched:
            output = pytree.tree_map_only(torch.Tensor, lambda t: t.squeeze(0), output)
        return pytree.tree_map_only(torch.Tensor, lambda t: convert_tensor(t, out_type), output)

    @property
    def report(self) -> Report:
        """What was chosen for every operation, and why."""
        merged = Report()
        for key, program in self._exported().items():
            program.report.name = f"input {key}"
            merged.graphs.append(program.report)
        for report in self._reports:
            merged.graphs.extend(report.graphs)
        return merged

    def to(self, device: str | torch.device) -> Model:
        """Moves the weights, and chooses again for the device; returns this model."""
        from torch.export.passes import move_to_device_pass

        from .program import Program

        place = torch.device(device)
        if self._network is not None:
            self._network.to(place)
            self._weights = _tensors(self._network)
        else:
            self._weights = {name: tensor.to(place) for name, tensor in self._weights.items()}
        exported, self._programs, self._reports = self._exported(), {}, []
        for key, program in exported.items():
            moved = move_to_device_pass(program.exported, place)
            again = Program(moved, self._weights, self._policy(), batch=program.batch)
            again.takes_one = program.takes_one
            self._programs[key._replace(device=place.type)] = again
        return self

    def save(self, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
        """Writes the model to a file: graph, weights, and the chosen algorithms. `ai3.load` reads it.

        Raises ModuleError for a model that was not captured by torch.export.
        """
        from . import archive

        archive.save(self, path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        network = copy.deepcopy(self._network, memo)
        weights = {name: tensor.clone() for name, tensor in self._weights.items()} if network is None else None
        made = Model(network, self._selectors, self._strict, weights, self._takes_images)
        made.capture, made._reports = self.capture, list(self._reports)
        made._programs = {key: p.with_weights(made._weights) for key, p in self._exported().items()}
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        from . import archive

        if self._programs and len(self._exported()) == len(self._programs):
            buffer = io.BytesIO()
            archive.save(self, buffer)
            return archive.load_bytes, (buffer.getvalue(),)
        return Model, (self._network, self._selectors, self._strict)

    def __repr__(self) -> str:
        shapes = ", ".join(map(str, self._programs))
        return f"ai3.Model(captured by {self.capture}; inputs {shapes or 'none yet'})"

    def _exported(self) -> dict[Kind, Program]:
        """The programs that torch.export captured."""
        return {key: program for key, program in self._programs.items() if hasattr(program, "exported")}  # type: ignore[misc]

    def _is_image_without_batch(self, input: torch.Tensor) -> bool:
        """Whether [C, H, W] is to be taken as a batch of one: where the network itself does not take it."""
        if not self._takes_images or input.dim() != 3 or _kind(input) in self._programs:
            return False
        if self._network is None or _kind(input.unsqueeze(0))._replace(batch=None) in self._programs:
            return _kind(input) not in self._as_given
        if self._refusal(input) is None:
            self._as_given.add(_kind(input))
        return _kind(input) not in self._as_given

    def _refusal(self, input: torch.Tensor) -> Exception | None:
        """What the network itself says against an input."""
        assert self._network is not None
        try:
            with torch.random.fork_rng(devices=()):
                copy.deepcopy(self._network)(input.clone())
        except Exception as error:  # the network's own code: whatever it raises is shown as what it is
            return error
        return None

    def _program_for(self, input: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        """What computes inputs like this one, captured first where there is none."""
        with self._lock:
            kind = _kind(input)
            general = self._programs.get(kind._replace(batch=None))
            if general is not None and (kind.batch != 1 or getattr(general, "takes_one", True)):
                return general
            return self._programs.get(kind) or self._captured(input)

    def _captured(self, input: torch.Tensor) -> Callable[[torch.Tensor], Any]:
        kind = _kind(input)
        if self._network is None:
            known = ", ".join(map(str, self._programs))
            raise InputError(
                message=f"the saved model takes inputs of {known} {next(iter(self._programs)).dtype}, not "
                f"{'x'.join(map(str, input.shape))} {input.dtype} on {input.device.type}: convert the network again, "
                "call it with such an input, and save it."
            )
        refusal = self._refusal(input)
        if refusal is not None:
            raise InputError(message=self._explained(input, refusal)) from refusal
        from .program import Program, export, same_operations, why

        reason = ""
        batched = input.dim() > 1 and (input.dim() != 3 or not self._takes_images)
        takes_one = not batched or same_operations(self._network, input)
        for dynamic in (True, False) if batched and (kind.batch != 1 or takes_one) else (False,):
            try:
                with torch.inference_mode(False):
                    exported = export(self._network, input.detach().clone(), dynamic)
            except Exception as error:  # torch.export runs the network's own code, and raises whatever that does
                reason = why(error)
                continue
            program = Program(exported, self._weights, self._policy(), batch=kind.batch, strict=self._strict)
            program.takes_one = takes_one
            self._programs[kind._replace(batch=None) if dynamic else kind] = program
            self.capture = "torch.export"
            history.add(program.report, continues=False)
            return program
        log.warning("torch.export cannot capture the model (%s); torch.compile does", reason)
        compiled = self._with_compile()
        self._programs[kind._replace(batch=None)] = compiled
        self.capture = f"torch.compile, since torch.export cannot ({reason})"
        return compiled

    def _explained(self, input: torch.Tensor, refusal: Exception) -> str:
        """The network's words, and what to do where the input is of another dtype or device than the weights."""
        text = f"the model does not take an input of {'x'.join(map(str, input.shape))} {input.dtype}: {refusal}"
        weight = next((t for t in self._weights.values() if t.is_floating_point()), None)
        if weight is not None and input.device != weight.device:
            text += f"\nThe model is on {weight.device}, and the input on {input.device}: move one with .to(device)."
        elif weight is not None and input.dtype != weight.dtype:
            text += (
                f"\nThe model computes in {weight.dtype}: convert the input (.to({weight.dtype})), or the model "
                f"(ai3.convert(..., dtype={input.dtype}))."
            )
        return text

    def _with_compile(self) -> Callable[[torch.Tensor], Any]:
        assert self._network is not None
        options: dict[str, Any] = {"rest": "eager", "strict": self._strict}
        for name, selector in self._policy().selectors.items():
            if isinstance(selector.value, str) or callable(selector.value):
                options[name] = selector.value
            else:
                # The graphs of a broken network do not know their places in it: a sequence goes by its modules.
                swap_operation(name, self._network, list(selector.value))
        compiled = torch.compile(self._network, backend="ai3", options=options)

        def run(input: torch.Tensor) -> Any:
            before = history.mark()
            output = compiled(input)
            self._reports.extend(history.since(before))
            return output

        return run

    def _policy(self) -> Policy:
        """The selectors as the passes take them; a function gets the module where there is one."""
        selectors = {}
        for name, selector in self._selectors.items():
            value = selector.value
            if callable(value):
                takes = takes_shape(value)
                value = functools.partial(_ask_with_shape if takes else _ask, value, self._network)
            selectors[name] = Selector(name, value, selector.known, selector.exact)
        return Policy(selectors=selectors, rest="eager", strict=self._strict, fuse=True)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast is the caller's, and not the Model's: it computes in the dtype of its weights."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _kind(input: torch.Tensor) -> Kind:
    sizes = tuple(input.shape)
    return Kind(sizes[0] if sizes else None, sizes[1:], input.dtype, input.device.type)


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by all their names; a tied one has several."""
    parameters = network.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(network.named_buffers(remove_duplicate=False))}


def _module_of(network: nn.Module | None, op: OpSpec) -> Any:
    try:
        found = None if network is None or not op.name else network.get_submodule(op.name)
    except AttributeError:
        return op
    return found if isinstance(found, OPERATIONS[op.operation].modules) else op


def _ask(function: Callable[..., str], network: nn.Module | None, op: OpSpec) -> str:
    return function(_module_of(network, op))


def _ask_with_shape(function: Callable[..., str], network: nn.Module | None, op: OpSpec, shape: Sequence[int]) -> str:
    return function(_module_of(network, op), shape)
