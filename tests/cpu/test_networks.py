"""Whole networks against eager, with every convolution algorithm, by the report and by the profiler."""

from __future__ import annotations

import functools

import pytest
import torch

import ai3_compile
from ai3_compile import zoo

from .. import harness

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


@functools.lru_cache(maxsize=1)
def network(name: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A network, an image and the eager output; the tests of one network run in sequence."""
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
    with torch.inference_mode():
        return model, image, model(image)


def run(name: str, options: dict[str, object]) -> set[str]:
    """Compiles and compares a network; returns the labels of ai3's kernels that the profiler saw."""
    torch._dynamo.reset()
    model, image, expected = network(name)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="ai3", options=options)
        compiled(image)
        with torch.profiler.profile() as profile:
            found = compiled(image)
    # A network amplifies the rounding of its layers: 1e-6 a layer (Winograd 5e-6), some hundred layers deep.
    assert harness.relative_error(found, expected) < 1e-4
    assert found.stride() == expected.stride()
    return {event.key for event in profile.key_averages() if event.key.startswith("ai3::") and "[" in event.key}


def labels_of_report() -> set[str]:
    names = {name: op.op_name for name, op in ai3_compile.registry.OPERATIONS.items()}
    rows = [row for row in ai3_compile.last_report() if "@" in row.algorithm]
    return {f"{names[row.operation]}[{row.algorithm}]" for row in rows}


@pytest.mark.parametrize("algorithm", harness.algorithms("conv2d"), ids=lambda a: a.qualified)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_algorithm(name, algorithm):
    selector = f"{algorithm.qualified}|default"
    ran = run(name, {"conv2d": selector, "rest": "eager"})
    assert ran == labels_of_report()
    rows = [row for row in ai3_compile.last_report() if row.operation == "conv2d"]
    assert rows
    for row in rows:
        # Where the first choice did not run, its row must say that it cannot, and why.
        assert row.algorithm == algorithm.qualified or row.rejected[algorithm.qualified].startswith("needs"), row
    if algorithm.name != "winograd":
        assert {row.algorithm for row in rows} == {algorithm.qualified}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "vit_b_16"])
def test_with_inductor_for_the_rest(name):
    assert run(name, {"rest": "inductor"}) == labels_of_report() != set()
