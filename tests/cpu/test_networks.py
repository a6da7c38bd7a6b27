"""Whole networks against eager, with every convolution algorithm, by the report and by the profiler."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch

import ai3_compile
from ai3_compile import backend, passes, zoo
from ai3_compile.ops import OPERATIONS
from ai3_compile.report import GraphReport, Row
from ai3_compile.testing import harness, references

# Side of the input image; smaller than usual where the architecture allows it, for time.
NETWORKS = {
    "alexnet": 96,
    "vgg16": 32,
    "resnet18": 64,
    "resnet152": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "squeezenet1_1": 64,
    "mobilenet_v3_large": 64,
    "vit_b_16": 32,
    "swin_b": 64,
}


@dataclass
class Network:
    """A network compiled once by torch.compile, and the graph it became, for the other algorithms to be put into."""

    expected: torch.Tensor
    found: torch.Tensor
    report: ai3_compile.Report
    ran: set[str]
    module: torch.fx.GraphModule
    graph: torch.fx.Graph
    context: passes.Context
    inputs: list[torch.Tensor]


@functools.lru_cache(maxsize=1)
def network(name: str) -> Network:
    """The tests of one network run in sequence, so one is kept."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    side = NETWORKS[name]
    if name == "vit_b_16":
        model = zoo.torchvision_models().vit_b_16(image_size=side).eval()
        torch.nn.init.normal_(model.heads.head.weight)  # zero as created, and then no error would show
    else:
        model = zoo.load_model(f"torchvision:{name}")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training: statistics that folding must get right
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.25)
    image = torch.randn(2, 3, side, side)
    kept: dict = {}
    run_passes, box = passes.run, backend.make_boxed_func

    def keep_graph(graph: torch.fx.Graph, context: passes.Context) -> None:
        kept.update(module=graph.owning_module, graph=copy.deepcopy(graph), context=context)
        run_passes(graph, context)

    def keep_inputs(forward):
        def call(*args):
            kept["inputs"] = list(args)
            return forward(*args)

        return box(call)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(passes, "run", keep_graph)
        patch.setattr(backend, "make_boxed_func", keep_inputs)
        compiled = torch.compile(model, backend="ai3", options={"rest": "eager"})
        found, ran = profiled(lambda: compiled(image))
        return Network(model(image), found, ai3_compile.last_report(), ran, **kept)


def profiled(call) -> tuple[torch.Tensor, set[str]]:
    """The result of a second call, and the labels of ai3's kernels that the profiler saw in it."""
    call()
    with torch.profiler.profile() as profile:
        result = call()
    return result, {event.key for event in profile.key_averages() if event.key.startswith("ai3::") and "[" in event.key}


def check(found: torch.Tensor, expected: torch.Tensor, rows: Iterable[Row], ran: set[str]) -> None:
    # A network amplifies the rounding of its layers: 1e-6 a layer (Winograd 5e-6, or 2e-5 with 6x6 tiles), some hundred
    # layers deep.
    assert references.relative_error(found, expected) < 1e-4
    assert found.stride() == expected.stride()
    labels = {f"{OPERATIONS[row.operation].op_name}[{row.algorithm}]" for row in rows if "@" in row.algorithm}
    assert ran == labels != set()


# The default beside them, so that each network is compiled once.
@pytest.mark.parametrize(
    "algorithm", [None, *harness.algorithms("conv2d")], ids=lambda a: "default" if a is None else a.qualified
)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_algorithm(name, algorithm):
    net = network(name)
    if algorithm is None:
        check(net.found, net.expected, net.report, net.ran)
        return
    report, graph = GraphReport(), copy.deepcopy(net.graph)
    policy = ai3_compile.check_options({"conv2d": f"{algorithm.qualified}|default", "rest": "eager"})
    with torch.inference_mode():
        passes.run(graph, dataclasses.replace(net.context, policy=policy, report=report, algorithms={}))
        module = torch.fx.GraphModule(net.module, graph)
        (found,), ran = profiled(lambda: module(*net.inputs))
    check(found, net.expected, report.rows, ran)
    rows = [row for row in report.rows if row.operation == "conv2d"]
    assert rows
    for row in rows:
        # Where the first choice did not run, its row must say that it cannot, and why.
        assert row.algorithm == algorithm.qualified or row.rejected[algorithm.qualified].startswith("needs"), row
    if algorithm.name not in ("winograd", "winograd6"):
        assert {row.algorithm for row in rows} == {algorithm.qualified}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large"])
def test_with_inductor_for_the_rest(name):
    torch._dynamo.reset()
    model, image = zoo.load_model(f"torchvision:{name}"), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="ai3")
        found, ran = profiled(lambda: compiled(image))
        check(found, model(image), ai3_compile.last_report(), ran)
