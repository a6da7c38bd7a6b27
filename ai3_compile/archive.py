"""The file of a saved Model: a zip of the exported graphs (JSON), the weights (safetensors), what was chosen, metadata.

Nothing in it is unpickled or run: before a graph is read, the operations it names and the expressions of its sizes are
checked against what a graph may hold.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch._export.serde import serialize
from torch._export.verifier import SpecViolationError

from . import core, registry
from .backends import builder
from .errors import ArchiveError, ModuleError
from .ops import OPERATIONS
from .options import Policy
from .program import Program
from .report import Row
from .selection import Selector
from .version import __version__

if TYPE_CHECKING:
    from .model import Model

log = logging.getLogger(__name__)

FORMAT = 1
METADATA, WEIGHTS = "metadata.json", "weights.safetensors"
# torch.ops.<namespace>.<operation>.<overload>, arithmetic on sizes, and taking items.
_TARGET = re.compile(r"torch\.ops\.[a-z]\w*\.[A-Za-z]\w*\.[A-Za-z]\w*|_operator\.[a-z]+|math\.[a-z]+|torch\.sym_[a-z]+")
_TARGET_WITH_UNDERSCORE = re.compile(r"torch\.ops\.[a-z]\w*\._[a-z]\w*\.[A-Za-z]\w*")
_WORDS = re.compile(r"[A-Za-z_]\w*")
_EXPRESSION = re.compile(r"[\w\s'()+\-*/,=<>]*")
_FUNCTIONS = {
    *("Symbol", "Integer", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "FloorDiv", "CleanDiv", "PythonMod"),
    *("positive", "integer", "nonnegative", "True", "False", "int_oo"),
}


def save(model: Model, path: str | os.PathLike[str] | io.BufferedIOBase) -> None:
    """Writes a Model. A file is written beside and put in its place whole.

    Raises ModuleError where there is nothing to write: no capture by torch.export.
    """
    if not model._programs or len(model._exported()) != len(model._programs):
        raise ModuleError(message=f"only a model captured by torch.export can be saved; this one: {model.capture}.")
    if isinstance(path, io.BufferedIOBase):
        _write(model, path)
        return
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            _write(model, file)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _write(model: Model, file: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    files = {}
    for number, (key, program) in enumerate(model._exported().items()):
        graph = json.loads(_serialized(program))
        graph["guards_code"] = []
        files[f"graph_{number}.json"] = json.dumps(graph)
        tensors |= {f"constant_{number}:{name}": value for name, value in _constants(program).items()}
        entries.append(
            {
                "batch": key.batch,
                "sizes": key.sizes,
                "dtype": str(key.dtype).removeprefix("torch."),
                "device": key.device,
                "counted_batch": program.batch,
                "takes_one": program.takes_one,
                "rows": [_row(row) for row in program.report.rows],
            }
        )
    tensors |= {f"weight:{name}": value for name, value in model._weights.items()}
    stored, same = _without_copies(tensors)
    metadata = {
        "format": FORMAT,
        "ai3": __version__,
        "torch": str(torch.__version__),
        "cpu": builder.cpu_isa(),
        "takes_images": model._takes_images,
        "selectors": {name: s.value for name, s in model._selectors.items() if isinstance(s.value, (str, tuple))},
        "parameters": [n for n, t in model._weights.items() if isinstance(t, torch.nn.Parameter)],
        "programs": entries,
        "same": same,
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(METADATA, json.dumps(metadata, indent=1))
        archive.writestr(WEIGHTS, safetensors.torch.save(stored))
        for name, text in files.items():
            archive.writestr(name, text, zipfile.ZIP_DEFLATED)


def _serialized(program: Program) -> bytes:
    """Raises ModuleError for a graph that torch cannot write, or could not read again."""
    for spec in program.exported.graph_signature.output_specs:
        value = getattr(spec.arg, "value", None)
        if not isinstance(value, (int, float, bool, type(None))):
            raise ModuleError(message=f"the model returns {value!r} beside tensors, which a file cannot hold.")
    try:
        return serialize.serialize(program.exported).exported_program
    except (serialize.SerializeError, SpecViolationError, NotImplementedError) as error:
        raise ModuleError(message=f"the model cannot be saved: {error}") from error


def _row(row: Row) -> dict[str, Any]:
    algorithm = next((a for a in registry.known() if a.operation == row.operation and a.qualified == row.chosen), None)
    return {
        "operation": row.operation,
        "name": row.name,
        "algorithm": row.chosen,
        "selector": row.selector,
        "by_policy": row.by_policy,
        "digest": None if algorithm is None else registry.content_digest(algorithm),
    }


def _constants(program: Program) -> Mapping[str, torch.Tensor]:
    found = {name: value for name, value in program.exported.constants.items() if name not in program.weights}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise ModuleError(message=f"the model holds {name}, a {type(value).__name__}, which a file cannot.")
    return found


def _without_copies(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each tensor once: tied weights are one, and the others are named after it."""
    stored: dict[str, torch.Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() > 0 and place in seen:
            same[name] = seen[place]
            continue
        seen[place] = name
        # safetensors refuses tensors that share memory in other ways.
        stored[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return stored, same


def load(path: str | os.PathLike[str] | io.BufferedIOBase) -> Model:
    if isinstance(path, io.BufferedIOBase):
        return _read(path.read(), "the model")
    return _read(Path(path).read_bytes(), str(path))


def load_bytes(content: bytes) -> Model:
    return _read(content, "the pickled model")


def _read(content: bytes, path: str) -> Model:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}  # checks every member's CRC
        metadata = json.loads(members[METADATA])
        if metadata["format"] != FORMAT:
            raise ArchiveError(
                path=path,
                message=f"its format is {metadata['format']} (ai3 {metadata['ai3']}), and this ai3 "
                f"{__version__} reads {FORMAT}",
            )
        tensors = safetensors.torch.load(members[WEIGHTS])
        tensors |= {name: tensors[other] for name, other in metadata["same"].items()}
        return _build(metadata, tensors, members, path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ArchiveError(path=path, message=f"it is damaged or truncated ({error})") from error
    except (KeyError, ValueError, TypeError, AttributeError, SafetensorError, serialize.SerializeError) as error:
        raise ArchiveError(path=path, message=f"its content is damaged ({type(error).__name__}: {error})") from error


def _build(metadata: Any, tensors: Mapping[str, torch.Tensor], members: Mapping[str, bytes], path: str) -> Model:
    from .model import Kind, Model

    weights = {name.partition(":")[2]: t for name, t in tensors.items() if name.startswith("weight:")}
    devices = {entry["device"] for entry in metadata["programs"]}
    if "cuda" in devices and not torch.cuda.is_available():
        raise ArchiveError(path=path, message="it is of a model on cuda, which is not here: save it after .to('cpu')")
    (device,) = devices
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    for name in metadata["parameters"]:
        weights[name] = torch.nn.Parameter(weights[name], requires_grad=False)
    selectors = {
        name: Selector(name, _value(metadata["selectors"].get(name, "default")), registry.of_operation(name), False)
        for name in OPERATIONS
    }
    model = Model(None, selectors, weights=weights, takes_images=bool(metadata["takes_images"]))
    model.capture = "torch.export"
    differences = [
        f"{what}: {metadata[key]} then, {now} now"
        for what, key, now in (
            ("ai3", "ai3", __version__),
            ("torch", "torch", str(torch.__version__)),
            ("CPU", "cpu", builder.cpu_isa()),
        )
        if metadata[key] != now
    ]
    for number, entry in enumerate(metadata["programs"]):
        prefix = f"constant_{number}:"
        constants = {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}
        graph = _checked(json.loads(members[f"graph_{number}.json"]), path)
        artifact = serialize.SerializedArtifact(json.dumps(graph).encode(), dict(weights), constants, b"")  # type: ignore[arg-type]
        if registry.can_choose():
            core.load()  # the graph of a swapped network names ai3's operations
        exported = serialize.deserialize(artifact)
        names, why = _selectors(entry["rows"], metadata["cpu"] != builder.cpu_isa())
        differences += why
        policy = Policy(
            selectors={
                name: Selector(name, tuple(names.get(name, ())), registry.of_operation(name), True)
                if name in names
                else selectors[name]
                for name in OPERATIONS
            },
            rest="eager",
            strict=False,
            fuse=True,
            left_alone=frozenset(
                name for name in names if all(r["by_policy"] for r in entry["rows"] if r["operation"] == name)
            ),
        )
        program = Program(exported, model._weights, policy, batch=entry["counted_batch"])
        program.takes_one = bool(entry["takes_one"])
        for row, saved in zip(program.report.rows, entry["rows"]):
            if row.chosen == saved["algorithm"]:
                row.selector, row.by_policy = saved["selector"], saved["by_policy"]
                row.why = f"as saved; asked for {saved['selector']!r}" if row.algorithm != "fused" else row.why
        key = Kind(entry["batch"], tuple(entry["sizes"]), getattr(torch, entry["dtype"]), entry["device"])
        model._programs[key] = program
    if differences:
        log.warning("%s was saved elsewhere: %s", path, "; ".join(dict.fromkeys(differences)))
    return model


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _selectors(rows: Any, other_cpu: bool) -> tuple[dict[str, list[str]], list[str]]:
    """For each operation what each of its occurrences is to be computed by, and what is not as it was saved."""
    names: dict[str, list[str]] = {}
    why = []
    for row in rows:
        operation, chosen = row["operation"], row["algorithm"]
        here = next((a for a in registry.of_operation(operation) if a.qualified == chosen), None)
        text = chosen
        if here is None:
            text = row["selector"]
            why.append(f"{operation} {row['name']}: there is no {chosen} here, chosen again by {text!r}")
        elif registry.content_digest(here) != row["digest"]:
            text = row["selector"]
            why.append(f"{operation} {row['name']}: {chosen} has changed, chosen again by {text!r}")
        elif other_cpu and row["by_policy"]:
            text = row["selector"]
            why.append(f"{operation} {row['name']}: chosen again by {text!r} for this CPU")
        if row["selector"]:  # an operation of a swapped module is in the graph with its algorithm
            names.setdefault(operation, []).append(text)
    return names, why


def _checked(graph: Any, path: str) -> Any:
    """The graph, if all that reading it would look up or evaluate is what a graph may hold; without its guards, which
    are code and not used."""

    def nodes(value: Any) -> None:
        if isinstance(value, dict):
            if "target" in value and "inputs" in value and "outputs" in value:
                target = str(value["target"])
                if not _TARGET.fullmatch(target) and not _TARGET_WITH_UNDERSCORE.fullmatch(target):
                    raise ArchiveError(path=path, message=f"its graph calls {target}, which is no operation")
            if "expr_str" in value:
                _check_expression(str(value["expr_str"]), path)
            for item in value.values():
                nodes(item)
        elif isinstance(value, list):
            for item in value:
                nodes(item)

    nodes(graph)
    for symbol in graph["range_constraints"]:
        _check_expression(str(symbol), path)
    return {**graph, "guards_code": []}


def _check_expression(text: str, path: str) -> None:
    words = set(_WORDS.findall(text))
    if not _EXPRESSION.fullmatch(text) or any(w not in _FUNCTIONS and not re.fullmatch(r"[su]\d+", w) for w in words):
        raise ArchiveError(path=path, message=f"its graph has the size {text!r}, which is no expression of sizes")
