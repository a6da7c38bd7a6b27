"""The gradients of conv2d by cuDNN's own calls: every named algorithm on every case, refusals with reasons, training.

Bounds as in test_kernels.py. cuDNN's named algorithms add up float32 in plain sums: 6e-8 * sqrt(n) of n products.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ai3
from ai3_compile import core, registry
from ai3_compile.backends import abi
from ai3_compile.ops import GRADIENTS
from ai3_compile.testing import cases, gradients, harness, references
from ai3_compile.testing.references import relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ALGORITHMS = [a for name in GRADIENTS for a in registry.of_operation(name) if a.platform == "cudnn"]
EACH = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.operation}-{a.name}")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
HALVES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
TF32 = 1e-3
TRANSFORMED = {"winograd": 2e-5, "winograd nonfused": 2e-5, "fft": 5e-6, "fft tiling": 5e-6}


@pytest.fixture(autouse=True)
def strict():
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    core.load()
    core.follow_numerics()
    torch._dynamo.reset()
    yield
    settings.fp32_precision = before
    core.follow_numerics()
    torch._dynamo.reset()


def terms(call: gradients.GradientCall) -> int:
    """How many products are added up for one element of the result."""
    n, filters, height, width = call.grad.shape
    return n * height * width if call.spec.operation == "conv2d.grad_weight" else filters * call.weight[0, 0].numel()


def bound(algorithm: registry.Algorithm, call: gradients.GradientCall, tf32: bool = False) -> float:
    dtype = call.spec.dtype
    if dtype in HALVES:
        return HALVES[dtype]
    if tf32:
        return TF32
    if dtype == torch.float64:
        return references.BOUNDS[dtype]
    least = max(references.BOUNDS[dtype], references.ROUNDING * math.sqrt(terms(call)))
    return max(least, TRANSFORMED.get(algorithm.name, 0.0))


def refusal(algorithm: registry.Algorithm, call: gradients.GradientCall, layout: int) -> str | None:
    args = harness.gpu.set_device(harness.native.args_of(call.spec, layout))
    reason = harness.table_of(algorithm).supports(args)
    return None if reason is None else reason.decode()


@EACH
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"])
def test_every_case_between_guards(algorithm, dtype):
    """Right where it is taken, and refused with a reason elsewhere."""
    tf32, table, wrong, computed = dtype == "tf32", harness.table_of(algorithm), [], 0
    if tf32:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        core.follow_numerics()
    for case in cases.CONVS:
        for layout in (abi.NCHW, abi.NHWC):
            if not table.flags & layout:
                continue
            kind = DTYPES.get(dtype, torch.float32)
            call = gradients.make(algorithm.operation, case, kind, "cuda", layout == abi.NHWC, tf32)
            reason = refusal(algorithm, call, layout)
            if reason is not None:
                assert reason.strip(), case.id
                continue
            computed += 1
            found = call.through_abi(table, layout, allow_tf32=tf32).cpu()
            problem = references.judge(found, call.expected(), bound(algorithm, call, tf32))[1]
            if problem is not None:
                wrong.append(f"{case.id} layout {layout}: {problem}")
    assert not wrong, "\n".join(wrong[:8])
    if algorithm.name in ("algo 0", "algo 1") and dtype != "bfloat16":
        assert computed


@EACH
def test_every_case_through_pytorch(algorithm):
    """Copied to a layout that the algorithm takes where it takes no other; the result lies as asked."""
    for case in cases.CONVS:
        for channels_last in (False, True):
            call = gradients.make(algorithm.operation, case, device="cuda", channels_last=channels_last)
            if channels_last and call.image.is_contiguous():
                continue  # it lies both ways, and counts as contiguous
            if algorithm.supports(call.spec) is not None:
                with pytest.raises(RuntimeError, match="cannot run here: "):
                    call.through_torch(algorithm)
                continue
            found = call.through_torch(algorithm)
            order = torch.channels_last if channels_last else torch.contiguous_format
            assert found.stride() == torch.empty(found.shape, memory_format=order).stride()
            problem = references.judge(found.cpu(), call.expected(), bound(algorithm, call))[1]
            assert problem is None, f"{case.id}: {problem}"


@pytest.mark.parametrize("operation", GRADIENTS)
def test_an_empty_batch(operation):
    case = cases.Conv("empty", 16, (8, 8), 64, batch=0)
    (algorithm,) = [a for a in ALGORITHMS if (a.operation, a.name) == (operation, "algo 1")]
    call = gradients.make(operation, case, device="cuda")
    found = call.through_torch(algorithm)
    assert found.shape == call.spec.output_shape and found.is_cuda and not found.any()


def test_what_is_not_deterministic_is_refused():
    case = cases.Conv("plain", 16, (8, 8), 64)
    torch.use_deterministic_algorithms(True)
    try:
        for algorithm in ALGORITHMS:
            reason = algorithm.supports(gradients.make(algorithm.operation, case, device="cuda").spec)
            adds_in_any_order = algorithm.name == "algo 0" or algorithm.qualified == "algo 3@cudnn"
            assert (reason == "is not deterministic") == adds_in_any_order, algorithm.label
    finally:
        torch.use_deterministic_algorithms(False)


class Net(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        self.activation = activation
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm, self.c = nn.BatchNorm2d(64), nn.Conv2d(64, 16, 1, stride=2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.norm(self.b(self.activation(self.a(x)))))
        return self.head(self.c(inner).mean((2, 3)))


def rows(operation: str) -> list[tuple[str, str]]:
    return [(row.name, row.algorithm) for row in ai3.last_report() if row.operation == operation]


def gradients_of(forward, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    forward(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@EACH
@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_gradients_equal_eagers(algorithm, rest, layout):
    model = Net().cuda().to(memory_format=layout)
    torch.manual_seed(1)
    x = torch.randn(4, 3, 16, 16, device="cuda").contiguous(memory_format=layout)
    expected = gradients_of(model, model, x)
    options = {"rest": rest, algorithm.operation: f"{algorithm.qualified}|torch"}
    found = gradients_of(torch.compile(model, backend="ai3", options=options), model, x)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(found, expected))
    layers = ["c", "b", "a"] if algorithm.operation == "conv2d.grad_weight" else ["c", "b"]
    assert [name for name, _ in rows(algorithm.operation)] == layers
    for row in [row for row in ai3.last_report() if row.operation == algorithm.operation]:
        assert row.algorithm == algorithm.qualified or row.rejected[algorithm.qualified].strip()


@pytest.mark.parametrize(
    "options",
    [
        {"conv2d.grad_input": "winograd nonfused|algo 1|torch", "conv2d.grad_weight": "algo 1|torch"},
        {"conv2d.grad_input": "torch", "conv2d.grad_weight": "algo 1"},
        {"conv2d.grad_input": "auto", "conv2d.grad_weight": "auto"},
        {"conv2d.grad_input": "guess", "conv2d.grad_weight": "guess"},
    ],
    ids=["named", "one", "auto", "guess"],
)
@pytest.mark.parametrize("rest", ["eager", "inductor", "reduce-overhead"])
def test_training_goes_as_in_eager(options, rest):
    model = Net().cuda()
    reference = copy.deepcopy(model)
    mode = {"mode": rest} if rest == "reduce-overhead" else {"rest": rest}
    losses: list[list[float]] = []
    for net, forward in (
        (reference, reference),
        (model, torch.compile(model, backend="ai3", options={**options, **mode})),
    ):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for step in range(8):
            torch.manual_seed(step)
            x, labels = torch.randn(8, 3, 16, 16, device="cuda"), torch.randint(4, (8,), device="cuda")
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(x), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert max(abs(a - b) / b for a, b in zip(*losses)) < 1e-3
    assert [name for name, _ in rows("conv2d.grad_weight")] == ["c", "b", "a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """The gradients are of halves, which cuDNN takes: no worse than eager's, which rounds as often but elsewhere.
    Scaled, as a GradScaler would: the smallest halves have few bits. With an activation whose slope is continuous: of a
    ReLU's argument rounding can change the sign, and no bound on rounding holds what that does to a gradient."""
    torch.manual_seed(0)
    model = Net(nn.functional.silu).cuda()
    twin = copy.deepcopy(model).cpu().double()
    torch.manual_seed(1)
    x = torch.randn(4, 3, 16, 16, device="cuda")

    def through(forward):
        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cuda", dtype):
                return 32 * forward(x).float()

        return call

    expected = gradients_of(through(model), model, x)
    step = torch.compile(model, backend="ai3", options={"conv2d.grad_weight": "algo 1|torch"})
    found = gradients_of(through(step), model, x)
    exact = gradients_of(lambda x: 32 * twin(x), twin, x.cpu().double())
    rounding = torch.finfo(dtype).eps
    for mine, eagers, truth in zip(found, expected, exact):
        assert relative_error(mine.cpu(), truth) < 2 * relative_error(eagers.cpu(), truth) + 4 * rounding
    assert "algo 1@cudnn" in {algorithm for _, algorithm in rows("conv2d.grad_weight")}
