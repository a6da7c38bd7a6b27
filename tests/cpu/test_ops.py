"""The operations registered with PyTorch: schemas, fakes, gradients, layouts, and what they refuse."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from ai3_compile import core, registry
from ai3_compile.errors import ActivationGradientError
from ai3_compile.ops.activations import NUMBERS
from ai3_compile.testing import harness, references

core.load()
ops = torch.ops.ai3


def identity(operation: str, name: str = "direct") -> int:
    (found,) = [a for a in registry.algorithms() if (a.operation, a.name, a.platform) == (operation, name, "cpp")]
    return found.id


def conv(input, weight, bias=None, stride=1, padding=1, dilation=1, groups=1, algorithm="direct", **rest):
    window = (stride, stride, *(padding,) * 4, dilation, dilation) if isinstance(padding, int) else ()
    if not window:
        window = (stride, stride, *padding, dilation, dilation)
    return ops.conv2d(input, weight, bias, *window, groups, identity("conv2d", algorithm), **rest)


def image(*shape: int, grad: bool = True) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape, requires_grad=grad)


def calls():
    """One call of each operation, and of conv2d and linear with everything a pass can put into them."""
    x, w, b = image(2, 3, 9, 11), image(4, 3, 3, 3), image(4)
    norm = [image(4), image(4), image(4), image(4).detach().abs().add(0.5).requires_grad_()]
    residual = image(2, 4, 9, 11)
    window = (1, 1, 1, 1, 1, 1, 1, 1, 1, identity("conv2d"))
    yield "conv2d", ops.conv2d.default, (x, w, b, *window)
    yield "conv2d-channels-last", ops.conv2d.default, (x, w, b, *window, True)
    yield "conv2d-no-bias-asymmetric", ops.conv2d.default, (x, w, None, 2, 1, 0, 1, 2, 1, 1, 1, 1, identity("conv2d"))
    yield "conv2d-everything", ops.conv2d.default, (x, w, b, *window, True, False, residual, 1, *norm, 1e-3)
    yield "conv2d-unbatched", ops.conv2d.default, (image(3, 9, 11), w, b, *window)
    y = image(5, 7)
    yield "linear", ops.linear.default, (y, image(6, 7), image(6), identity("linear", "gemm"))
    extra = (False, image(5, 6), 1)
    yield "linear-everything", ops.linear.default, (y, image(6, 7), image(6), identity("linear", "gemm"), *extra)
    yield "linear-3d", ops.linear.default, (image(2, 5, 7), image(6, 7), None, identity("linear", "gemm"))
    yield "max_pool2d", ops.max_pool2d.default, (x, 3, 3, 2, 2, 1, 1, 1, 1, True, identity("maxpool2d"), True)
    yield "avg_pool2d", ops.avg_pool2d.default, (x, 3, 3, 2, 2, 1, 1, True, False, 0, identity("avgpool2d"))
    yield "adaptive_avg_pool2d", ops.adaptive_avg_pool2d.default, (x, 4, 3, identity("adaptiveavgpool2d"), True)
    yield "relu", ops.relu.default, (x, identity("relu"))
    yield "flatten", ops.flatten.default, (x, 1, -1, identity("flatten"))
    q, k, v = image(2, 3, 5, 7), image(2, 3, 6, 7), image(2, 3, 6, 4)
    terms = image(3, 5, 6), image(2, 1, 5, 6)
    grad, window = image(2, 4, 5, 6), (2, 2, 1, 1, 1, 1, 1, 1, 1)
    yield "conv2d_grad_input", ops.conv2d_grad_input.default, (grad, w, 9, 11, *window, identity("conv2d.grad_input"))
    last = (identity("conv2d.grad_weight"), True)
    yield "conv2d_grad_weight", ops.conv2d_grad_weight.default, (grad, x, 3, 3, *window, *last)
    yield "attention", ops.attention.default, (q, k, v, None, None, 0.5, False, True, identity("attention"))
    yield "attention-terms", ops.attention.default, (q, k, v, *terms, 0.5, True, False, identity("attention"))


CALLS = {name: (op, args) for name, op, args in calls()}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """PyTorch's own checks: schema, autograd registration, fake against real (strides too), AOT with dynamic shapes."""
    op, args = CALLS[name]
    torch.library.opcheck(op, args)


def test_every_operation_is_checked():
    registered = {op.op_name.split("::")[1] for op in registry.OPERATIONS.values()}
    assert registered == {op._schema.name.split("::")[1] for op, _ in CALLS.values()}


def expected_of(name: str, args: tuple) -> torch.Tensor:
    """What a call computes, written with PyTorch's operations."""
    x = args[0]
    if name == "conv2d_grad_input":
        return torch.nn.grad.conv2d_input((2, 3, 9, 11), args[1], x, 2, 1)
    if name == "conv2d_grad_weight":
        return torch.nn.grad.conv2d_weight(args[1], (4, 3, 3, 3), x, 2, 1)
    if name.startswith("conv2d"):
        w, b, sh, sw, top, bottom, left, right, dh, dw, groups = args[1:12]
        residual, activation, gamma, beta, mean, var, eps = (*args[15:22], None, 0, *(None,) * 4, 0.0)[:7]
        out = F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, (sh, sw), 0, (dh, dw), groups)
        if mean is not None:
            column = [t.view(-1, 1, 1) for t in (gamma, beta, mean, var)]
            out = (out - column[2]) / torch.sqrt(column[3] + eps) * column[0] + column[1]
        out = out if residual is None else out + residual
        return out.relu() if activation else out
    if name.startswith("linear"):
        w, b, _, _, residual, activation = (*args[1:], False, None, 0)[:6] if len(args) == 4 else args[1:]
        out = F.linear(x, w, b)
        out = out if residual is None else out + residual
        return out.relu() if activation else out
    if name.startswith("attention"):
        q, k, v, bias, mask, scale, is_causal = args[:7]
        scores = scale * q @ k.mT + sum(term for term in (bias, mask) if term is not None)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(later, -torch.inf) if is_causal else scores).softmax(-1) @ v
    if name == "max_pool2d":
        return F.max_pool2d(x, args[1:3], args[3:5], args[5:7], args[7:9], args[9])
    if name == "avg_pool2d":
        return F.avg_pool2d(x, args[1:3], args[3:5], args[5:7], args[7], args[8])
    return {
        "adaptive_avg_pool2d": lambda: F.adaptive_avg_pool2d(x, args[1:3]),
        "relu": x.relu,
        "flatten": lambda: x.flatten(1),
    }[name]()


@pytest.mark.parametrize("name", CALLS)
def test_values_and_every_gradient_equal_pytorchs(name):
    """In float64, so that the bound is about the formulas: 1e-12 of each gradient's norm."""
    op, given = CALLS[name]

    def doubled(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().double().requires_grad_()

    args = tuple(doubled(value) for value in given)
    out, expected = op(*args), expected_of(name, args)
    assert references.relative_error(out, expected) < 1e-13
    wanted = [value for value in args if isinstance(value, torch.Tensor)]
    torch.manual_seed(7)
    grad = torch.randn_like(expected)
    for found, right in zip(torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad)):
        assert references.relative_error(found, right) < 1e-12


@pytest.mark.parametrize("operation", ["conv2d", "linear"])
def test_an_activation_without_a_gradient_is_named(operation):
    """No pass makes such a call: activations other than relu are fused in inference alone."""
    if operation == "conv2d":
        out = conv(image(1, 3, 8, 8), image(4, 3, 3, 3), activation=NUMBERS["hardswish"])
    else:
        out = ops.linear(image(5, 7), image(6, 7), None, identity("linear", "gemm"), activation=NUMBERS["hardswish"])
    with pytest.raises(ActivationGradientError, match=f"ai3::{operation} has no gradient through hardswish"):
        out.sum().backward()


@pytest.mark.parametrize("number", [-1, len(NUMBERS)])
def test_an_unknown_activation_is_refused(number):
    with pytest.raises(RuntimeError, match=f"no activation has the number {number}"):
        conv(image(1, 3, 8, 8), image(4, 3, 3, 3), activation=number)


def test_gradients_of_gradients():
    x, w = image(1, 2, 5, 5).double().detach().requires_grad_(), image(3, 2, 3, 3).double().detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: conv(x, w), (x, w))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "strided": lambda t: torch.repeat_interleave(t, 2, 3)[..., ::2],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("algorithm", harness.algorithms("conv2d"), ids=lambda a: a.qualified)
@pytest.mark.parametrize("channels_last", [False, True], ids=["to-contiguous", "to-channels-last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv2d_takes_and_gives_any_layout(algorithm, layout, channels_last):
    x, w = LAYOUTS[layout](image(2, 6, 8, 10, grad=False)), image(5, 6, 3, 3, grad=False)
    residual = LAYOUTS[layout](image(2, 5, 8, 10, grad=False))
    out = conv(x, w, algorithm=algorithm.name, channels_last=channels_last, residual=residual, activation=1)
    expected = (F.conv2d(x.double(), w.double(), padding=1) + residual.double()).relu()
    assert references.relative_error(out, expected) < 5e-6
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert out.stride() == torch.empty(out.shape, memory_format=memory_format).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "relu", "flatten"])
def test_other_operations_take_any_layout(name, layout):
    op, args = CALLS[name]
    x = LAYOUTS[layout](args[0].detach())
    assert references.relative_error(op(x, *args[1:]), expected_of(name, (x, *args[1:])).double()) < 1e-6


@pytest.mark.parametrize(
    "name", [n for n in CALLS if not any(word in n for word in ("unbatched", "everything", "attention", "grad"))]
)
def test_an_empty_batch_gives_an_empty_output(name):
    op, args = CALLS[name]
    args = (args[0][:0], *args[1:])
    out = op(*args)
    assert out.shape == expected_of(name, args).shape and out.numel() == 0


@pytest.mark.parametrize("algorithm", harness.algorithms("conv2d"), ids=lambda a: a.qualified)
def test_an_unbatched_image_is_a_batch_of_one(algorithm):
    x, w = image(3, 7, 9, grad=False), image(4, 3, 3, 3, grad=False)
    out = conv(x, w, algorithm=algorithm.name)
    assert out.shape == (4, 7, 9)
    assert torch.equal(out, conv(x[None], w, algorithm=algorithm.name)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": image(2, 5, 8, 8)}, "5 channels does not fit a weight of 4x3"),
        ({"input": image(8, 8)}, "got 2 dimensions"),
        ({"weight": image(4, 3, 3)}, "expected a weight"),
        ({"bias": image(3)}, "expected a bias of 4"),
        ({"weight": image(4, 3, 3, 3).double()}, "different dtypes"),
        ({"stride": 0}, "must be positive"),
        ({"padding": -1}, "negative padding"),
        ({"padding": 0, "dilation": 9}, "larger than the padded input"),
        ({"groups": 2}, "groups"),
        ({"residual": image(2, 4, 8, 9)}, "residual does not have the output's shape"),
    ],
)
def test_conv2d_refuses_what_does_not_fit(change, message):
    given = {"input": image(2, 3, 8, 8), "weight": image(4, 3, 3, 3), "bias": None, **change}
    with pytest.raises(RuntimeError, match=message):
        conv(**given)


def test_an_algorithm_outside_its_domain_refuses_by_name():
    with pytest.raises(RuntimeError, match=r"conv2d\[winograd@cpp\] cannot run here: .*3x3"):
        conv(image(1, 3, 8, 8), image(4, 3, 4, 4), algorithm="winograd")


def test_an_unknown_id_is_refused():
    with pytest.raises(RuntimeError, match="no algorithm has the id 12345"):
        ops.relu(image(3), 12345)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing_but_time(threads):
    """Each algorithm splits its outputs, never a sum: results are the same to the bit."""
    x, w = image(2, 16, 13, 11, grad=False), image(24, 16, 3, 3, grad=False)
    before = torch.get_num_threads()
    try:
        for algorithm in harness.algorithms("conv2d"):
            torch.set_num_threads(1)
            alone = conv(x, w, algorithm=algorithm.name)
            torch.set_num_threads(threads)
            assert torch.equal(alone, conv(x, w, algorithm=algorithm.name)), algorithm.qualified
    finally:
        torch.set_num_threads(before)


def test_concurrent_calls_from_threads_do_not_meet():
    """Workspaces are a thread's own: the outputs of calls that run at once are those of calls alone."""
    from concurrent.futures import ThreadPoolExecutor

    weights = [image(8 + i, 6, 3, 3, grad=False) for i in range(4)]
    x = image(2, 6, 20, 20, grad=False)
    work = list(itertools.product([a.name for a in harness.algorithms("conv2d")], weights)) * 3
    alone = [conv(x, w, algorithm=name) for name, w in work]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(lambda job: conv(x, job[1], algorithm=job[0]), work), alone):
            assert torch.equal(found, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_tables_of_many_image_sizes_are_let_go():
    """A plan of 7x7 offsets for a 300x320 image is 19 MB; sizes that never repeat must not add up."""
    weight = image(4, 3, 7, 7, grad=False)

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident()
    for height in range(300, 330):
        conv(image(1, 3, height, 320, grad=False), weight, padding=3, algorithm="implicit precomp gemm")
    assert resident() - before < 300e6, "30 plans are 560 MB; the table holds 128 MiB"


def test_the_algorithms_name_is_in_the_profilers_trace():
    with torch.profiler.profile() as profile:
        conv(image(1, 3, 8, 8, grad=False), image(4, 3, 3, 3, grad=False), algorithm="winograd")
    assert "ai3::conv2d[winograd@cpp]" in {event.key for event in profile.key_averages()}
