"""Each pass leaves a well-formed graph that computes the same, and does what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import ai3_compile
from ai3_compile import core, passes, registry
from ai3_compile.ops.activations import NUMBERS
from ai3_compile.options import check_options
from ai3_compile.passes import context as node_tools
from ai3_compile.passes import neighbours, select
from ai3_compile.report import GraphReport
from ai3_compile.selection import Use
from ai3_compile.testing import references

from .test_backend import Awkward, block, image


@pytest.fixture(autouse=True)
def seeded():
    """What is left of a network behind its ReLUs would depend on the tests before: one small number, or none."""
    torch.manual_seed(0)


def capture(model, x, steps=passes.PASSES, **options):
    """Runs passes one by one over a captured inference graph, with a lint and a comparison after each."""
    core.load()
    torch._dynamo.reset()
    seen: dict[str, list[str]] = {}
    with torch.no_grad():
        expected = model(x)

    def compiler(gm: GraphModule, inputs):
        metadata = TracingContext.get().fw_metadata
        context = passes.Context(
            check_options(options), registry.system(), GraphReport(), True, False, metadata.static_input_indices
        )
        for step in steps:
            step(gm.graph, context)
            gm.graph.lint()
            for node in gm.graph.nodes:
                assert node.op == "output" or "val" in node.meta, f"{step.__module__}: {node} has no value"
            seen[step.__module__.rsplit(".")[-1]] = [str(node.target) for node in gm.graph.nodes]
        gm.recompile()
        return torch._functorch.aot_autograd.make_boxed_func(gm.forward)

    def backend(gm, inputs):
        return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)(gm, inputs)

    with torch.no_grad():
        found = torch.compile(model, backend=backend)(x)
    for a, b in zip(
        found if isinstance(found, tuple) else (found,), expected if isinstance(found, tuple) else (expected,)
    ):
        assert references.relative_error(a, b) < 1e-5
        assert a.stride() == b.stride()
    return seen


def until(name: str) -> tuple:
    """The passes up to one, with it."""
    names = [step.__module__.rsplit(".")[-1] for step in passes.PASSES]
    return passes.PASSES[: names.index(name) + 1]


@pytest.mark.parametrize("count", range(1, len(passes.PASSES) + 1))
@pytest.mark.parametrize("make", [block, lambda: Awkward().eval()], ids=["block", "awkward"])
def test_the_graph_is_sound_after_each_pass(make, count):
    """Also when the later passes do not run: each one's result stands on its own."""
    seen = capture(make(), image(), passes.PASSES[:count])
    assert len(seen) == count


def count(targets: list[str], name: str) -> int:
    return sum(name in target for target in targets)


def test_select_puts_ai3s_operations_in_and_nothing_else():
    seen = capture(block(), image(), until("select"))["select"]
    assert count(seen, "ai3.conv2d") == 3 and count(seen, "aten.convolution") == 0
    assert count(seen, "ai3.linear") == 1 and count(seen, "addmm") == 0
    assert count(seen, "batch_norm") == 2 and count(seen, "aten.relu") == 3


class Neighbours(nn.Module):
    """Convolutions and linears by what stands behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.joined, self.alone, self.twice, self.first, self.second, self.gated, self.shared = (
            nn.Conv2d(4, 4, 3, padding=1) for _ in range(7)
        )
        self.pooled, self.activated_pooled, self.otherwise_pooled = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.activated, self.viewed, self.plain, self.normed = (nn.Linear(4, 4) for _ in range(4))
        self.lines = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        joined, twice = self.norm(self.joined(x)).relu(), self.twice(x)
        y = torch.cat([joined, self.alone(x).sin(), twice], 1)
        z = self.viewed(x[0]).view(-1, 4).relu()
        added = (self.other(self.first(x)) + self.second(x)).relu()
        gated, shared = nn.functional.hardswish(self.gated(x) + x[:, :, :1]), self.shared(x) + twice
        lines = self.activated(x[0, 0]).relu(), z, self.plain(x[0, 0]).sin(), self.lines(self.normed(x[0, 0])).relu()
        pool = nn.functional.max_pool2d
        pools = pool(self.pooled(x), 2), pool(self.activated_pooled(x).relu(), 2), pool(self.otherwise_pooled(x), 2, 1)
        return y, added, gated, shared, *lines, *pools


RELU = NUMBERS["relu"]


@pytest.mark.parametrize("relu", ["default", "torch"])
def test_what_stands_behind_an_operation_is_seen_where_auto_measures(monkeypatch, relu):
    seen, joins = {}, {}

    def decide(context, index, spec, node):
        seen[spec.name] = neighbours.use_of(node, spec, context)
        joins[spec.name] = neighbours.is_concatenated(node)
        return original(context, index, spec, node)

    original = select.decide
    monkeypatch.setattr(select, "decide", decide)
    capture(Neighbours().eval(), torch.randn(2, 4, 4, 4), relu=relu)
    assert {name for name, does in joins.items() if does} == {"joined"}
    activation = RELU if relu == "default" else 0
    behind = {name: use for name, use in seen.items() if use != Use(in_graph=True)}
    assert behind == {
        "joined": Use(True, has_norm=True, activation=activation),
        "first": Use(True, has_norm=True, residual=True, activation=activation),
        "shared": Use(True, residual=True),
        "pooled": Use(True, pooled=True),
        **({"activated_pooled": Use(True, activation=RELU, pooled=True)} if activation else {}),
        **({name: Use(True, activation=RELU) for name in ("activated", "viewed")} if activation else {}),
    }


class LeftToOthers(nn.Module):
    """Convolutions by what an algorithm leaves to others: a copy into a concatenation, a batch norm ahead, nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.folded = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.first, self.behind, self.after, self.window = (nn.Conv2d(4, 4, size) for size in (1, 1, 1, 3))
        self.joined, self.also = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.last, self.both = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = torch.cat([self.both(self.last(x.cos()).relu()), x], 1)
        behind = self.behind(self.norm(x.sin()).relu())
        after = self.after(self.folded(self.first(x)).relu())
        joined, also = self.joined(x), self.also(x)
        return behind + after, self.window(x), torch.cat([joined, also, x], 1), torch.cat([x, joined, joined], 1), both


def test_what_an_algorithm_leaves_to_others_counts(monkeypatch):
    registry.prepare([("conv2d", "cpu")])
    measured, seen = {"gemm@cpp": 1e-6, "direct@cpp": 1e-6, "torch": 1e-6}, {}

    def decide(context, index, spec, node):
        if spec.operation == "conv2d":
            seen[spec.name] = {
                name for name, s in select._with_passes(measured, spec, node, context).items() if s > 2e-6
            }
        return original(context, index, spec, node)

    original = select.decide
    monkeypatch.setattr(select, "decide", decide)
    capture(LeftToOthers().eval(), torch.randn(2, 4, 6, 6), relu="torch")
    assert seen["behind"] == set()  # the ReLU stays the operation that was asked for
    capture(LeftToOthers().eval(), torch.randn(2, 4, 6, 6))
    assert seen.pop("behind") == {"direct@cpp", "torch"}
    assert seen.pop("both") == {"gemm@cpp", "direct@cpp", "torch"}
    assert seen.pop("joined") == seen.pop("also") == {"torch"}
    assert seen == {"first": set(), "after": set(), "window": set()}


def test_fold_takes_the_batch_norms():
    seen = capture(block(), image(), until("fold"))
    assert count(seen["select"], "batch_norm") == 2 and count(seen["fold"], "batch_norm") == 0


def test_fuse_takes_the_addition_and_the_relus():
    seen = capture(block(), image(), until("fuse"))
    assert count(seen["fold"], "aten.relu") == 3 and count(seen["fold"], "aten.add") == 1
    assert count(seen["fuse"], "aten.relu") == 0 and count(seen["fuse"], "aten.add") == 0


def test_fuse_takes_the_padding_of_an_even_kernel():
    class Even(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, (4, 2), padding="same")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.nn.functional.pad(x, (1, 0, 0, 2)))

    seen = capture(Even().eval(), image(), until("fuse"))
    assert count(seen["fold"], "constant_pad_nd") > 0 and count(seen["fuse"], "constant_pad_nd") == 0


def test_padding_with_another_value_stays():
    class Padded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.nn.functional.pad(x, (1, 1, 1, 1), value=2.0))

    assert count(capture(Padded().eval(), image())["fuse"], "constant_pad_nd") == 1


def test_layout_converts_once_on_the_way_in_and_not_between():
    """The image is converted once for both convolutions that read it, and at most once back for the view."""
    seen = capture(block(), image(), conv2d="winograd|direct")
    assert count(seen["layout"], "aten.clone") <= 2


def test_layout_restores_any_order_of_dimensions_with_dynamic_sizes():
    """A transposed image makes outputs whose strides are neither of the two layouts; sizes are symbols here."""

    class Transposed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x.transpose(2, 3)) + x.transpose(2, 3)
            return y, (y * 2)[:, :, ::2]

    model = Transposed().eval()
    for rest in ("eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="ai3", options={"rest": rest, "conv2d": "direct"}, dynamic=True)
        aot = torch.compile(model, backend="aot_eager")
        for shape in ((2, 3, 8, 10), (3, 3, 7, 9)):
            x = torch.randn(shape)
            with torch.no_grad():
                for found, expected in zip(compiled(x), aot(x)):
                    assert references.relative_error(found, expected) < 1e-6
                    assert rest == "inductor" or found.stride() == expected.stride()


def test_a_convolution_whose_algorithm_is_torch_is_not_touched():
    seen = capture(block(), image(), conv2d="torch")
    assert count(seen["layout"], "aten.convolution") == 3 and count(seen["layout"], "batch_norm") == 2


@pytest.mark.parametrize("steps, calls", [(passes.PASSES[:-1], 7), (passes.PASSES, 2)], ids=["single", "sequence"])
def test_values_of_inserted_nodes_have_the_strides_of_the_real_ones(steps, calls):
    """Inductor allocates by the fake strides, so a graph is run node by node and compared."""
    core.load()
    torch._dynamo.reset()
    compared = []

    def compiler(gm: GraphModule, inputs):
        metadata = TracingContext.get().fw_metadata
        policy = check_options({})
        context = passes.Context(policy, registry.system(), GraphReport(), True, False, metadata.static_input_indices)
        for step in steps:
            step(gm.graph, context)

        class Compare(torch.fx.Interpreter):
            def run_node(self, node):
                value = super().run_node(node)
                if node_tools.is_ai3(node):
                    compared.append(node.name)
                    real, fake = ([t.stride() for t in tree_leaves(v)] for v in (value, node.meta["val"]))
                    assert real == fake, node.name
                return value

        return torch._functorch.aot_autograd.make_boxed_func(lambda *args: Compare(gm).run(*args))

    def backend(gm, inputs):
        return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)(gm, inputs)

    with torch.no_grad():
        torch.compile(block(), backend=backend)(image())
    assert len(compared) == calls


def _cloned(function):
    """How many copies are left of a function of an image, in order of the passes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self, x)

    torch.manual_seed(0)
    seen = capture(Model().eval(), image())
    return count(seen["rows"], "aten.clone"), count(seen["copies"], "aten.clone")


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda m, x: m.second(nn.functional.dropout(m.first(x), training=False)), 0),
        (lambda m, x: m.second(x.clone()), 0),
        (lambda m, x: (y := m.first(x), m.second(y.clone()) + y)[1], 0),
        (lambda m, x: (y := m.first(x), z := y.clone(), m.second(y) + y, z * 2)[2:], 0),
        (lambda m, x: m.first(x).clone(), 1),
        (lambda m, x: (m.first(x), x.clone()), 1),
        (lambda m, x: (m.first(x), x.clone().view(-1)), 1),
        (lambda m, x: m.second(m.first(x).clone(memory_format=torch.channels_last).flip(3)), 1),
        (lambda m, x: m.first(x).transpose(2, 3).clone(memory_format=torch.contiguous_format).sin(), 1),
    ],
    ids=["dropout", "input", "residual", "kept", "output", "input and output", "view", "layout", "transposed"],
)
def test_copies_that_nothing_can_tell_apart_are_left_out(function, left):
    before, after = _cloned(function)
    assert before == 1 and after == left


def test_a_copy_of_an_input_that_is_returned_is_no_alias():
    f = torch.compile(lambda x: x.clone(), backend="ai3")
    x = image()
    with torch.no_grad():
        found = f(x)
    found.zero_()
    assert x.abs().sum() > 0


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda m, x: m.second(m.pool(m.first(x))), 0),
        (lambda m, x: m.pool(m.first(x)).flatten(1), 0),
        (lambda m, x: m.second(m.pool(m.first(x)[:, :, 1:])), 1),
        (lambda m, x: m.pool(x), 1),
        (lambda m, x: nn.functional.adaptive_avg_pool2d(x[:, :, 1:], (x.shape[2] - 1, x.shape[3])), 1),
        (lambda m, x: (y := m.first(x), m.pool(y) + y)[1], 1),
    ],
    ids=["equal", "equal, flattened", "below", "input", "view of the input", "others read it"],
)
def test_a_pooling_to_the_size_that_the_image_has_is_left_out(function, left):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
            self.pool = nn.AdaptiveAvgPool2d(tuple(image().shape[2:]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self, x)

    torch.manual_seed(0)
    model = Model().eval()
    x = image()
    assert sum("adaptive_avg_pool2d" in target for target in capture(model, x)["copies"]) == left
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="ai3")(x), model(x))
    (row,) = (row for row in ai3_compile.last_report() if row.operation == "adaptiveavgpool2d")
    assert (row.algorithm == "fused") == (row.why == "left out: the image has that size already") == (not left)


def test_a_pooling_whose_algorithm_is_named_stays():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(tuple(image().shape[2:]))).eval()
    with torch.no_grad():
        torch.compile(model, backend="ai3", options={"adaptiveavgpool2d": "direct"})(image())
    assert ai3_compile.last_report().graphs[0].rows[-1].algorithm == "direct@cpp"
