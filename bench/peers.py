"""The sides of the models bench: eager, Inductor, ONNX Runtime and OpenVINO as their documentation has it, and ai3."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ai3_compile as ai3
from ai3_compile import zoo

from . import machine

COMPILED, CONVERTED = "ai3", "ai3.convert"
_OPSET = 17


@dataclass
class Network:
    """What every side runs: a model in eval mode and an input."""

    model: torch.nn.Module
    image: torch.Tensor
    folder: Path
    """Where files made for it may lie."""
    onnx: Path | None = None

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def load(name: str, batch: int, folder: Path) -> Network:
    """A torchvision model with random weights, and images of its size."""
    model = zoo.load_model(f"torchvision:{name}")
    if name.startswith("vit"):
        torch.nn.init.normal_(model.heads.head.weight)  # type: ignore[union-attr,arg-type]  # zero, and so every output
    return Network(model, torch.randn(batch, *zoo.default_shape(name)[1:]), folder)


Make = Callable[[Network], Callable[[], Any]]


@dataclass(frozen=True)
class Peer:
    """One side: `make` prepares it, with its first call, and gives what is timed; outputs are what its users get."""

    name: str
    packages: tuple[str, ...]
    configuration: str
    make: Make

    def missing(self) -> str | None:
        """None where it is installed, else what is missing."""
        absent = [package for package in self.packages if machine.version(package) is None]
        return f"not installed: pip install {' '.join(absent)}" if absent else None


def describe(without: Sequence[str] = ()) -> dict[str, dict[str, object]]:
    """Every side by name: versions and configuration, and for those that are not measured the reason."""
    found: dict[str, dict[str, object]] = {}
    for peer in (*PEERS, *OURS):
        versions = {package: machine.version(package) for package in peer.packages}
        found[peer.name] = {"versions": versions, "configuration": peer.configuration}
        reason = "left out by --without" if peer.name in without else peer.missing()
        if reason is not None:
            found[peer.name]["not measured"] = reason
    return found


def _eager(network: Network) -> Callable[[], Any]:
    model, image = network.model, network.image
    return lambda: model(image)


def _channels_last(network: Network) -> Callable[[], Any]:
    with torch.inference_mode(False):
        model = copy.deepcopy(network.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        image = network.image.contiguous(memory_format=torch.channels_last)
    return lambda: model(image)


def _inductor(network: Network) -> Callable[[], Any]:
    compiled, image = torch.compile(network.model), network.image
    with torch._inductor.config.patch(freezing=True):
        compiled(image)
    return lambda: compiled(image)


def _onnxruntime(network: Network) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(str(_exported(network)), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: network.image.numpy()}
    return lambda: session.run(None, feed)[0]


def _openvino(network: Network) -> Callable[[], Any]:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(str(_exported(network)), "CPU", settings).create_infer_request()
    feed = {0: network.image.numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]


def _exported(network: Network) -> Path:
    """The model as an ONNX file, written once."""
    if network.onnx is None:
        path = network.folder / "model.onnx"
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # its fused operations have no ONNX form
        try:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that this exporter is the older one, and what tracing holds constant
                torch.onnx.export(network.model, (network.image,), str(path), dynamo=False, opset_version=_OPSET)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
        network.onnx = path
    return network.onnx


def _compiled(network: Network) -> Callable[[], Any]:
    compiled, image = torch.compile(network.model, backend="ai3"), network.image
    return lambda: compiled(image)


def _converted(network: Network) -> Callable[[], Any]:
    image = network.image
    converted = ai3.convert(network.model, sample_input_shape=tuple(image.shape))
    return lambda: converted(image)


_THREADS = "as many threads as torch"
_ONNX = f"exported by torch.onnx.export(dynamo=False, opset_version={_OPSET})"
PEERS = (
    Peer("eager", ("torch",), "inference_mode", _eager),
    Peer("channels_last", ("torch",), "inference_mode, model and input in channels_last", _channels_last),
    Peer("inductor", ("torch",), "torch.compile with torch._inductor.config.freezing", _inductor),
    Peer(
        "onnxruntime",
        ("onnxruntime", "onnx"),
        f"CPUExecutionProvider, ORT_ENABLE_ALL, {_THREADS}, {_ONNX}",
        _onnxruntime,
    ),
    Peer(
        "openvino",
        ("openvino", "onnx"),
        f"CPU, PERFORMANCE_HINT LATENCY, INFERENCE_PRECISION_HINT f32, {_THREADS}, inputs and outputs shared, {_ONNX}",
        _openvino,
    ),
)
OURS = (
    Peer(COMPILED, ("torch",), 'torch.compile(model, backend="ai3")', _compiled),
    Peer(CONVERTED, ("torch",), "ai3.convert(model, sample_input_shape=...)", _converted),
)


def named(names: Sequence[str]) -> list[Peer]:
    """The sides of these names, in their usual order."""
    return [peer for peer in (*PEERS, *OURS) if peer.name in names]
