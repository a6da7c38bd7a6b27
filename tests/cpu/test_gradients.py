"""The gradients of conv2d by algorithms of the user's choice: numbers, guards, the split of the backward, the report.

Bounds as in references.py: a gradient of the weight adds up as many products as there are pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

import ai3
from ai3_compile import core, errors, registry
from ai3_compile.backends import abi
from ai3_compile.ops import GRADIENTS
from ai3_compile.passes import backward
from ai3_compile.testing import cases, gradients, harness, references
from ai3_compile.testing.references import relative_error

ALGORITHMS = [a for name in GRADIENTS for a in harness.algorithms(name)]
EACH = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: f"{a.operation}-{a.name}")
CONVS = pytest.mark.parametrize("case", cases.CONVS, ids=lambda case: case.id)


@pytest.fixture(autouse=True)
def nothing_compiled():
    core.load()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BOTH = {"conv2d.grad_input": "gemm", "conv2d.grad_weight": "direct"}


def right(found: torch.Tensor, call: gradients.GradientCall) -> None:
    wrong = references.judge(found, call.expected(), references.BOUNDS[call.spec.dtype])[1]
    assert wrong is None, wrong


@EACH
@CONVS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_case_between_guards(algorithm, case, dtype):
    call = gradients.make(algorithm.operation, case, dtype)
    assert algorithm.supports(call.spec) is None
    for threads in (1, 3, 8):
        right(call.through_abi(harness.table_of(algorithm), abi.NHWC, threads), call)


@EACH
@CONVS
def test_every_case_through_pytorch(algorithm, case):
    for channels_last in (False, True):
        call = gradients.make(algorithm.operation, case, channels_last=channels_last)
        found = call.through_torch(algorithm)
        right(found, call)
        order = torch.channels_last if channels_last else torch.contiguous_format
        assert found.stride() == torch.empty(found.shape, memory_format=order).stride()
        assert torch.equal(found, call.through_torch(algorithm)), "the same bits at every call"


@EACH
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_long_sums_keep_the_bound(algorithm, batch):
    """The gradient of the weight sums over 3136 pixels of each image, that of the input over 256 filters and 9 taps."""
    case = cases.Conv("long", 5, (56, 56), 256, batch=batch)
    call = gradients.make(algorithm.operation, case)
    right(call.through_torch(algorithm), call)


@EACH
def test_an_empty_batch(algorithm):
    """The input's gradient is empty; that of the weight is a sum of nothing."""
    case = dataclasses.replace(cases.CONVS[0], batch=0)
    call = gradients.make(algorithm.operation, case)
    found = call.through_torch(algorithm)
    assert found.shape == call.spec.output_shape and not found.any()
    assert algorithm.supports(call.spec) is None
    args, table = harness.native.args_of(call.spec, abi.NHWC), harness.table_of(algorithm)
    assert table.cost(args) >= 0 and table.workspace_bytes(args) >= 0


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(algorithm, dtype):
    assert algorithm.supports(gradients.make(algorithm.operation, cases.CONVS[0], dtype).spec) == (
        "needs float32 or float64"
    )


def test_shapes_that_do_not_fit_are_refused():
    ops = torch.ops.ai3
    grad, image, weight = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    of_input, of_weight = (next(a.id for a in ALGORITHMS if a.operation == name) for name in GRADIENTS)
    window = (1, 1, 1, 1, 1, 1, 1, 1, 1)
    ops.conv2d_grad_input(grad, weight, 5, 5, *window, of_input)
    with pytest.raises(RuntimeError, match="is not that of a convolution of 6x5 images"):
        ops.conv2d_grad_input(grad, weight, 6, 5, *window, of_input)
    with pytest.raises(RuntimeError, match="a gradient of 4 channels does not fit 3 filters"):
        ops.conv2d_grad_input(grad, weight[:3], 5, 5, *window, of_input)
    with pytest.raises(RuntimeError, match="got 3 and 4 dimensions"):
        ops.conv2d_grad_weight(grad[0], image, 3, 3, *window, of_weight)
    with pytest.raises(RuntimeError, match="different dtypes"):
        ops.conv2d_grad_weight(grad, image.double(), 3, 3, *window, of_weight)
    with pytest.raises(RuntimeError, match="3 channels are not 2 groups"):
        ops.conv2d_grad_weight(grad, image, 3, 3, *window[:8], 2, of_weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False)
        self.same = nn.Conv2d(12, 12, (2, 3), padding="same", dilation=2, groups=12)
        self.last = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.stem(x).relu()).relu()
        return self.head(self.last(self.same(x).tanh()).mean((2, 3)))


def image(batch: int = 4) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 10, 11)


def grads(forward, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    forward(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def compiled(model: nn.Module, **options) -> nn.Module:
    return torch.compile(model, backend="ai3", options=options)


def rows(operation: str) -> list[tuple[str, str]]:
    return [(row.name, row.algorithm) for row in ai3.last_report() if row.operation == operation]


LAYERS = ["last", "same", "wide", "stem"]
REST = pytest.mark.parametrize("rest", ["eager", "inductor"])
CHOSEN = [("gemm", "gemm"), ("direct", "direct"), ("gemm", "torch"), ("torch", "direct")]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# By Inductor, which compiles for seconds, each choice in one of the layouts.
EITHER_WAY = [("eager", names, layout) for names in CHOSEN for layout in LAYOUTS]
EITHER_WAY += [("inductor", names, layout) for names, layout in zip(CHOSEN, [*LAYOUTS, *reversed(LAYOUTS)])]


@pytest.mark.parametrize(("rest", "names", "layout"), EITHER_WAY, ids=str)
def test_gradients_equal_eagers(rest, names, layout):
    model, x = Net().to(memory_format=layout), image().contiguous(memory_format=layout)
    expected = grads(model, model, x)
    chosen = dict(zip(GRADIENTS, names))
    found = grads(compiled(model, rest=rest, **chosen), model, x)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    named = {name: name if name == "torch" else f"{name}@cpp" for name in names}
    # No gradient of the image is asked for, so the first layer has none.
    assert rows("conv2d.grad_input") == [(layer, named[names[0]]) for layer in LAYERS[:3]]
    assert rows("conv2d.grad_weight") == [(layer, named[names[1]]) for layer in LAYERS]


@REST
def test_what_is_left_runs_in_torch(rest, monkeypatch):
    """The bias alone is a sum; one gradient alone is asked of torch with the bias, and the others are not computed."""
    left, sums = [], []
    run = backward.run

    def noted(graph, context):
        run(graph, context)
        split = torch.ops.aten.convolution_backward.default
        left.extend(tuple(node.args[-1]) for node in graph.find_nodes(op="call_function", target=split))
        sums.extend(graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList))

    model = Net()
    expected = grads(model, model, image())
    monkeypatch.setattr(backward, "run", noted)
    with inductor_config.patch(force_disable_caches=True):
        found = grads(compiled(model, rest=rest, **{"conv2d.grad_weight": "gemm"}), model, image())
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    # On the CPU torch computes the bias together with the input; the first layer needs the bias alone.
    assert left == [(True, False, True), (True, False, True), (True, False, False)]
    assert any(node.args[1] == [0, 2, 3] for node in sums)


@REST
def test_the_gradient_of_the_image(rest):
    x = image().requires_grad_()
    model = Net()
    model(x).square().mean().backward()
    expected, x.grad = x.grad, None
    compiled(model, rest=rest, **BOTH)(x).square().mean().backward()
    assert relative_error(x.grad, expected) < 1e-5
    assert [name for name, _ in rows("conv2d.grad_input")] == LAYERS


def test_nothing_changes_unless_asked(monkeypatch):
    prepared = []
    real = registry.prepare
    monkeypatch.setattr(registry, "prepare", lambda wanted: prepared.extend(w := list(wanted)) or real(w))
    model = Net()
    for rest in ("eager", "inductor"):
        for strict in (False, True):
            torch._dynamo.reset()
            options = {"flatten": "torch", "relu": "torch", "strict": strict, "rest": rest}
            grads(compiled(model, **options), model, image())
            assert not any(row.operation in GRADIENTS for row in ai3.last_report())
            assert len(ai3.last_report().graphs) == 1
    assert not {operation for operation, _ in prepared} & set(GRADIENTS)


def test_the_report_gives_reasons():
    model = Net()
    step = compiled(model, rest="eager", **{"conv2d.grad_input": "direct|torch"})
    loss = step(image()).square().mean()
    report = ai3.last_report()
    assert not any(row.operation in GRADIENTS for row in report), "not compiled yet"
    loss.backward()
    found = [row for row in report if row.operation == "conv2d.grad_input"]
    assert [row.algorithm for row in found] == ["direct@cpp"] * 3 and report is ai3.last_report()
    for row in found:
        assert row.why == "named 'direct'" and row.selector == "direct|torch" and not row.by_policy
        assert row.rejected["gemm@cpp"] == "not named by 'direct|torch'"
        others = {a.qualified for a in registry.for_device(row.operation, "cpu")} - {"direct@cpp"}
        assert set(row.rejected) == others
    assert found[0].input_shape == (4, 5, 5, 6) and found[0].output_shape == (4, 12, 5, 6)
    text = str(report)
    assert "backward of" in text and text.count("conv2d.grad_input") == 3


@pytest.mark.parametrize("policy", ["guess", "auto"])
def test_policies_choose(policy, monkeypatch, tmp_path):
    from ai3_compile import tuning

    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path / "tuning")
    model = Net()
    expected = grads(model, model, image())
    found = grads(compiled(model, rest="eager", **dict.fromkeys(GRADIENTS, policy)), model, image())
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    chosen = [row for row in ai3.last_report() if row.operation in GRADIENTS]
    assert len(chosen) == 7 and all(row.by_policy and row.why.startswith(f"{policy}: ") for row in chosen)
    if policy == "auto":
        known = {name for times in tuning._known.values() for name in times}
        assert known == {"gemm@cpp", "direct@cpp", "torch"}


def test_a_sequence_names_the_layers_from_the_last_on():
    model = Net()
    names = ["gemm", "direct", "torch", "direct"]
    grads(compiled(model, rest="eager", **{"conv2d.grad_weight": names}), model, image())
    assert rows("conv2d.grad_weight") == list(zip(LAYERS, ["gemm@cpp", "direct@cpp", "torch", "direct@cpp"]))
    torch._dynamo.reset()
    with pytest.raises(errors.SelectorLengthError, match="3"):
        grads(compiled(model, rest="eager", **{"conv2d.grad_weight": names[:3]}), model, image())


def test_a_function_selects():
    """It reads what a convolution has, as one written for conv2d does."""
    seen = []

    def choose(op, input_shape) -> str:
        seen.append((op.name, input_shape, op.weight.shape, op.in_channels, op.out_channels, op.kernel_size, op.groups))
        return "direct" if op.groups > 1 else "torch"

    model = Net()
    expected = grads(model, model, image())
    found = grads(compiled(model, **{"conv2d.grad_input": choose}), model, image())
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    algorithms = ["torch", "direct@cpp", "direct@cpp"]
    assert rows("conv2d.grad_input") == list(zip(LAYERS, algorithms))
    assert seen[0] == ("last", (4, 5, 5, 6), (5, 12, 1, 1), 12, 5, (1, 1), 1)


def test_wrong_names_are_refused():
    with pytest.raises(errors.UnknownAlgorithmError, match="conv2d.grad_input: there is no algorithm 'winogard'"):
        ai3.check_options({"conv2d.grad_input": "winogard"})
    with pytest.raises(errors.UnknownAlgorithmError, match="'smm'"):
        ai3.check_options({"conv2d.grad_weight": "smm"})
    with pytest.raises(errors.UnknownOptionError, match="Did you mean 'conv2d.grad_input'"):
        ai3.check_options({"conv2d.grad_inputs": "gemm"})
    for name in GRADIENTS:
        with pytest.raises(errors.UnsupportedCallableError, match="is no module"):
            ai3.swap_operation(name, Net(), "gemm")
        with pytest.raises(errors.UnsupportedCallableError, match="of training"):
            ai3.convert(Net(), {name: "gemm"})


def test_what_cannot_run_raises_with_the_reasons():
    model, x = Net().bfloat16(), image().bfloat16()
    step = compiled(model, rest="eager", **{"conv2d.grad_input": "gemm"})
    with pytest.raises(errors.NothingFitsError, match="needs float32 or float64"):
        step(x).square().mean().backward()
    torch._dynamo.reset()
    expected = grads(model, model, x)
    found = grads(compiled(model, rest="eager", **{"conv2d.grad_input": "gemm|torch"}), model, x)
    assert all(relative_error(a, b) < 5e-2 for a, b in zip(found, expected))
    assert {algorithm for _, algorithm in rows("conv2d.grad_input")} == {"torch"}


def test_a_limit_on_workspace_holds():
    model = Net()
    options = {"max_workspace": 0, "rest": "eager", "conv2d.grad_weight": "gemm|torch"}
    grads(compiled(model, **options), model, image())
    found = [row for row in ai3.last_report() if row.operation == "conv2d.grad_weight"]
    assert {row.algorithm for row in found} == {"torch"}
    assert all("over max_workspace" in row.rejected["gemm@cpp"] for row in found)


def losses(forward, model: nn.Module, steps: int = 8) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        x, labels = torch.randn(8, 3, 10, 11), torch.randint(4, (8,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@REST
def test_training_goes_as_in_eager(rest):
    model = Net()
    reference = copy.deepcopy(model)
    expected = losses(reference, reference)
    found = losses(compiled(model, rest=rest, **BOTH), model)
    assert max(abs(a - b) / b for a, b in zip(found, expected)) < 1e-4
    assert all(relative_error(a, b) < 1e-3 for a, b in zip(model.parameters(), reference.parameters()))


@REST
def test_any_batch(rest):
    """Sizes that change with the input reach the operations as they are at each call."""
    model = Net()
    step = torch.compile(model, backend="ai3", dynamic=True, options={"rest": rest, **BOTH})
    for shape in ((4, 3, 10, 11), (7, 3, 13, 9), (2, 3, 8, 16)):
        x = torch.randn(shape)
        expected = grads(model, model, x)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(grads(step, model, x), expected))


def test_other_convolutions_stay_with_torch():
    """Of one dimension, of three, transposed: none of them is a conv2d, forward or backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten(2), nn.Conv1d(2, 3, 3))
    expected = grads(model, model, image())
    found = grads(compiled(model, **BOTH), model, image())
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    assert [name for name, _ in rows("conv2d.grad_weight")] == ["1"]


@pytest.mark.parametrize("swaps", [False, True])
def test_an_unbatched_image_and_uneven_paddings(swaps):
    """PyTorch makes a batch of one of it; a swapped module pads unevenly itself, and its gradient is cropped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(3, 1)), nn.ReLU(), nn.Conv2d(4, 2, 2))
    x = image()[0]
    expected = grads(model, model, x)
    if swaps:
        ai3.swap_operation("conv2d", model, "direct")
    found = grads(compiled(model, rest="eager", **BOTH), model, x)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
    assert len(rows("conv2d.grad_weight")) == 2


def test_gradients_inside_a_graph():
    """torch.func.grad leaves no backward graph: the gradients are in the forward, and are chosen there."""
    weight = torch.randn(4, 3, 3, 3)

    def gradient(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda w: nn.functional.conv2d(x, w, padding=1).square().mean())(w)

    x = image()
    with torch.no_grad():
        found = torch.compile(gradient, backend="ai3", options=BOTH)(x, weight)
        assert relative_error(found, gradient(x, weight)) < 1e-5
    assert [algorithm for _, algorithm in rows("conv2d.grad_weight")] == ["direct@cpp"]


def test_an_algorithm_of_the_users_own():
    """A function gets what the one of torch.nn.grad for the same gradient gets."""
    called = []

    def mine(*args):
        called.append(args[1:2])
        return torch.nn.grad.conv2d_weight(*args)

    ai3.register_algorithm("conv2d.grad_input", "theirs", torch.nn.grad.conv2d_input)
    ai3.register_algorithm("conv2d.grad_weight", "mine", mine)
    try:
        model = Net()
        expected = grads(model, model, image())
        step = compiled(model, **{"conv2d.grad_input": "theirs", "conv2d.grad_weight": "mine"})
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(grads(step, model, image()), expected))
        assert len(called) == 4
    finally:
        ai3.unregister_algorithm("conv2d.grad_input", "theirs")
        ai3.unregister_algorithm("conv2d.grad_weight", "mine")


PROGRAM = """
import sys, torch, ai3
sys.path.insert(0, {root!r})
from tests.cpu.test_gradients import BOTH, Net, compiled, grads, image, relative_error
from ai3_compile.passes import backward
ran = []
real = backward.run
backward.run = lambda *args: ran.append(1) or real(*args)
model = Net()
expected = grads(model, model, image())
found = grads(compiled(model, rest="inductor", **BOTH), model, image())
assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected))
print(len(ran), [r.algorithm for r in ai3.last_report() if r.operation.startswith("conv2d.")])
"""


def test_a_warm_cache_of_inductors_shows_the_report(tmp_path, monkeypatch):
    """Both graphs come from the cache in the second process: no pass runs, and the rows are there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    root = str(harness.registry.KERNELS.parent)
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(root=root)], capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip().split(" ", 1))
    assert int(said[0][0]) > 0 and said[1][0] == "0"
    assert said[0][1] == said[1][1] and said[0][1].count("gemm@cpp") == 3 and said[0][1].count("direct@cpp") == 4
