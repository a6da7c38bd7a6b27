"""`auto`: what is measured is kept and decides; tests plant times instead of trusting the clock."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ai3
from ai3_compile import core, registry, tuning
from ai3_compile.testing import harness
from ai3_compile.testing.references import relative_error


@pytest.fixture(autouse=True)
def nothing_known(empty_cache, monkeypatch):
    """An empty store, beside the kernels that are loaded already."""
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "folder", lambda: empty_cache / "tuning")
    torch._dynamo.reset()


@pytest.fixture
def planted(monkeypatch):
    """The time of a call by the algorithm: smm is the fastest of all."""
    measured = []

    def measure(spec, candidates, use):
        measured.append((spec.operation, spec.input_shape, use.in_graph))
        return {a.qualified: (1.0 if a.name == "smm" else 2.0) for a in candidates}

    monkeypatch.setattr(tuning, "_measure", measure)
    return measured


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()


def image() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 9, 10)


def test_every_operation_can_be_measured():
    shapes = {
        "conv2d": (nn.Conv2d(4, 6, 3, padding="same", groups=2), (2, 4, 8, 9)),
        "linear": (nn.Linear(7, 5), (3, 7)),
        "maxpool2d": (nn.MaxPool2d(2), (2, 4, 8, 9)),
        "avgpool2d": (nn.AvgPool2d(2), (2, 4, 8, 9)),
        "adaptiveavgpool2d": (nn.AdaptiveAvgPool2d((2, None)), (2, 4, 8, 9)),
        "relu": (nn.ReLU(), (5, 6)),
        "flatten": (nn.Flatten(), (2, 3, 4)),
    }
    for operation, (module, shape) in shapes.items():
        x = torch.randn(shape)
        expected = module(x)
        (row,) = ai3.swap_operation(operation, module, "auto", shape)
        assert row.why.startswith("auto: fastest of") and row.by_policy
        assert any("measured" in reason for reason in row.rejected.values())
        assert relative_error(module(x), expected) < 5e-6
        known = [set(times) for times in tuning._known.values()][-1]
        offered = {a.qualified for a in harness.algorithms(operation) if a.only_by_name is None} | {"torch"}
        assert "torch" in known and known == offered - ({"winograd@cpp"} - known)
        assert "winograd6@cpp" not in known


@pytest.mark.parametrize("way", ["eager", "inductor", "convert", "swap"])
def test_every_entry_goes_by_what_is_measured(way, planted):
    model, x = net(), image()
    with torch.no_grad():
        expected = model(x)
        if way == "swap":
            report = ai3.swap_operation("conv2d", model, "auto", (2, 3, 9, 10))
            found = model(x)
        elif way == "convert":
            converted = ai3.convert(model, {"conv2d": "auto"}, (2, 3, 9, 10))
            found, report = converted(x), converted.report
        else:
            found = torch.compile(model, backend="ai3", options={"conv2d": "auto", "rest": way})(x)
            report = ai3.last_report()
    assert [row.algorithm for row in report if row.operation == "conv2d"] == ["smm@cpp"] * 2
    assert relative_error(found, expected) < 2e-5
    assert set(planted) == {("conv2d", shape, way != "swap") for shape in ((2, 3, 9, 10), (2, 8, 9, 10))}


def test_what_was_measured_is_kept_and_not_measured_again(planted, monkeypatch):
    for _ in range(2):
        ai3.swap_operation("conv2d", net(), "auto", (2, 3, 9, 10))
        monkeypatch.setattr(tuning, "_known", {})
    assert len(planted) == 2 and len(list(tuning.folder().iterdir())) == 2
    assert json.loads(next(tuning.folder().iterdir()).read_text())["seconds"]["smm@cpp"] == 1.0


def test_a_damaged_store_is_measured_again(planted, monkeypatch, caplog):
    ai3.swap_operation("conv2d", net(), "auto", (2, 3, 9, 10))
    for path in tuning.folder().iterdir():
        path.write_text("{}")
    monkeypatch.setattr(tuning, "_known", {})
    ai3.swap_operation("conv2d", net(), "auto", (2, 3, 9, 10))
    assert len(planted) == 4 and "is damaged" in caplog.text


def test_another_algorithm_is_measured_too(planted):
    ai3.swap_operation("relu", nn.ReLU(), "auto", (2, 3))
    ai3.register_algorithm("relu", "mine", lambda x: x.clamp(min=0))
    try:
        (row,) = ai3.swap_operation("relu", nn.ReLU(), "auto", (2, 3))
    finally:
        ai3.unregister_algorithm("relu", "mine")
    assert "mine@python" in row.rejected and len(planted) == 2


def test_weights_are_packed_once_while_measuring():
    """As in a network: a weight that were packed at every call would be measured with its packing."""
    conv = nn.Conv2d(4, 6, 3)
    library = core.load()
    made = library.ai3_core_packs_made()
    ai3.swap_operation("conv2d", conv, "auto", (1, 4, 8, 8))
    assert library.ai3_core_packs_made() - made <= len(registry.for_device("conv2d", "cpu"))
    made = library.ai3_core_packs_made()
    ai3.compare("conv2d", [((1, 4, 8, 8), (6, 4, 3, 3))], rounds=5)
    assert library.ai3_core_packs_made() - made <= 2 * len(registry.for_device("conv2d", "cpu"))


def test_convolutions_that_cut_tf32s_factors_off_are_not_measured(caplog):
    """What the sums of a depthwise window are as TF32 makes them of random numbers of either sign, with a ReLU."""
    torch.manual_seed(0)
    x, w = torch.randn(3000, 16, 9), torch.randn(16, 9)

    def in_tf32(t: torch.Tensor, rounds: bool) -> torch.Tensor:
        return ((t.view(torch.int32) + (0x1000 if rounds else 0)) & ~0x1FFF).view(torch.float32)

    def sums(of_x: bool, of_w: bool) -> torch.Tensor:
        return (in_tf32(x, of_x) * in_tf32(w, of_w)).sum(-1).relu()

    def fails() -> torch.Tensor:
        raise RuntimeError("no memory")

    calls = {
        "direct@cuda": lambda: (x * w).sum(-1).relu(),
        "rounds": lambda: sums(True, True),
        "cuts": lambda: sums(False, False),
        "cuts one": lambda: sums(True, False),
        "fails": fails,
    }
    made = {name: (call, []) for name, call in calls.items()}
    spec = SimpleNamespace(operation="conv2d", allow_tf32=True)
    assert list(tuning._rounding(spec, made)) == ["direct@cuda", "rounds", "fails"]
    assert "cuts is left out" in caplog.text and "cuts one is left out" in caplog.text
    strict = SimpleNamespace(operation="conv2d", allow_tf32=False)
    assert tuning._rounding(strict, made) is made
    without = {name: call for name, call in made.items() if name != "direct@cuda"}
    assert tuning._rounding(spec, without) is without
