"""torch.compile(model, backend="ai3") as a user meets it: numbers, choices, reports, training, shapes, errors."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ai3_compile
from ai3_compile import backend
from ai3_compile.errors import NothingFitsError, SelectorLengthError, StrictError, UnknownOptionError
from ai3_compile.options import check_options
from ai3_compile.report import GraphReport

RESTS = ("inductor", "eager")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block with a change of size: every rule of the passes has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(3, 8, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.avg = nn.AvgPool2d(2)
        self.adaptive = nn.AdaptiveAvgPool2d((2, 2))
        self.fc = nn.Linear(32, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + self.down(x))
        y = self.adaptive(self.avg(self.pool(y)))
        return F.relu(self.fc(torch.flatten(y, 1)))


def block() -> Block:
    return Block().eval()


def image(batch: int = 2, side: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, side, side)


def compiled(model: nn.Module, **options: object):
    return torch.compile(model, backend="ai3", options=options or None)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride()


def chosen() -> dict[str, str]:
    return {row.name: row.algorithm for row in ai3_compile.last_report() if row.operation != "relu"}


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_equals_eager_and_everything_is_fused(rest, mode):
    model, x = block(), image()
    with mode():
        close(compiled(model, rest=rest)(x), model(x))
    rows = {row.name: row for row in ai3_compile.last_report()}
    assert rows["conv1"].fused == ["batch_norm", "relu"]
    assert sorted(rows["conv2"].fused + rows["down"].fused) == ["add", "batch_norm", "relu"]
    assert rows["fc"].fused == ["relu"]
    for name in ("conv1", "conv2", "down", "pool", "avg", "adaptive", "fc"):
        assert rows[name].algorithm.endswith("@cpp"), name
    assert all(row.why for row in rows.values())
    known = {a.qualified for a in ai3_compile.algorithms() if a.operation == "conv2d" and a.device in (None, "cpu")}
    assert {rows["conv1"].algorithm, *rows["conv1"].rejected} == known
    assert all(rows["conv1"].rejected.values())


def test_no_import_of_ai3_is_needed():
    """The entry point names the backend; a new interpreter imports nothing but torch."""
    import subprocess
    import sys

    program = (
        "import torch\n"
        "f = torch.compile(torch.nn.Conv2d(3, 4, 3), backend='ai3', options={'rest': 'eager'})\n"
        "with torch.no_grad(): print(f(torch.randn(1, 3, 8, 8)).shape)\n"
        "import ai3; print(ai3.last_report())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "torch.Size([1, 4, 6, 6])" in done.stdout and "@cpp" in done.stdout, done.stderr


NO_COMPILER = """
import torch
conv, x = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
with torch.no_grad():
    for _ in range(2):
        torch._dynamo.reset()
        f = torch.compile(conv, backend="ai3", options={"rest": "eager"})
        print(torch.equal(f(x), conv(x)))
    import ai3
    print(ai3.last_report())
    torch._dynamo.reset()
    torch.compile(conv, backend="ai3", options={"rest": "eager", "strict": True})(x)
"""


def test_without_a_compiler_operations_stay_with_torch_which_is_said_once_and_strict_refuses(tmp_path):
    import os
    import subprocess
    import sys

    environment = {**os.environ, "CXX": "no-such-compiler", "AI3_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], capture_output=True, text=True, env=environment)
    assert done.stdout.count("True") == 2 and "winograd@cpp: there is no C++ compiler" in done.stdout, done.stderr
    assert done.stderr.count("platform cpp cannot run here") == 1
    assert "StrictError" in done.stderr and "'no-such-compiler' is not a program on PATH" in done.stderr
    assert not list(tmp_path.iterdir()), "and nothing is built"


@pytest.mark.parametrize("rest", RESTS)
def test_without_fusing_every_operation_stays_its_own(rest):
    model, x = block(), image()
    with torch.no_grad():
        close(compiled(model, rest=rest, fuse=False)(x), model(x))
    assert not any(row.fused for row in ai3_compile.last_report())


def test_a_relu_named_by_the_user_is_not_fused():
    model, x = block(), image()
    with torch.no_grad():
        close(compiled(model, relu="direct", rest="eager")(x), model(x))
    relus = [row for row in ai3_compile.last_report() if row.operation == "relu"]
    assert len(relus) == 3 and {row.algorithm for row in relus} == {"direct@cpp"}


@pytest.mark.parametrize("rest", RESTS)
def test_every_operation_can_be_named(rest):
    model, x = block(), image()
    options = {"conv2d": "winograd|gemm", "linear": "gemm", "relu": "direct", "flatten": "direct"}
    options |= {"maxpool2d": "direct", "avgpool2d": "direct", "adaptiveavgpool2d": "direct"}
    with torch.profiler.profile() as profile, torch.no_grad():
        close(compiled(model, rest=rest, **options)(x), model(x))
    assert {row.algorithm for row in ai3_compile.last_report()} == {"winograd@cpp", "gemm@cpp", "direct@cpp"}
    ran = {event.key for event in profile.key_averages() if event.key.endswith("@cpp]")}
    wanted = {"conv2d[winograd", "conv2d[gemm", "linear[gemm", "relu[direct", "flatten[direct"}
    wanted |= {"max_pool2d[direct", "avg_pool2d[direct", "adaptive_avg_pool2d[direct"}
    assert ran == {f"ai3::{name}@cpp]" for name in wanted}


def test_everything_can_be_left_to_torch():
    model, x = block(), image()
    options = {option.name: "torch" for option in ai3_compile.options() if option.type == "selector"}
    with torch.profiler.profile() as profile, torch.no_grad():
        close(compiled(model, rest="eager", **options)(x), model(x))
    assert {row.algorithm for row in ai3_compile.last_report()} == {"torch"}
    assert not any(event.key.startswith("ai3::") for event in profile.key_averages())


def test_selectors_by_order_by_function_and_by_preference():
    model, x = block(), image()
    with torch.no_grad():
        compiled(model, rest="eager", conv2d=["direct", "winograd", "gemm"])(x)
        assert [chosen()[name] for name in ("conv1", "conv2", "down")] == ["direct@cpp", "winograd@cpp", "gemm@cpp"]
        torch._dynamo.reset()
        compiled(model, rest="eager", conv2d=lambda op, shape: "direct" if shape[1] < 8 else "gemm")(x)
        assert [chosen()[name] for name in ("conv1", "conv2", "down")] == ["direct@cpp", "gemm@cpp", "direct@cpp"]
        torch._dynamo.reset()
        compiled(model, rest="eager", conv2d=lambda op: "gemm" if op.kernel_size == (1, 1) else "smm@cpp")(x)
        assert [chosen()[name] for name in ("conv1", "conv2", "down")] == ["smm@cpp", "smm@cpp", "gemm@cpp"]


def inner(error: pytest.ExceptionInfo) -> BaseException:
    """Dynamo wraps what a backend raises."""
    return error.value.inner_exception  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"conv2": "direct"}, UnknownOptionError, "Did you mean 'conv2d'"),
        ({"conv2d": "winograd"}, NothingFitsError, "needs a 3x3 kernel"),
        ({"conv2d": ["direct"]}, SelectorLengthError, "the graph has 3"),
    ],
)
def test_errors_reach_the_user_whole(options, kind, message):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message) as error, torch.no_grad():
        compiled(block(), **options)(image())
    assert isinstance(inner(error), kind)


@pytest.mark.parametrize("rest", RESTS)
def test_training_equals_eager(rest):
    """Two steps of SGD: losses, gradients and batch norm statistics."""
    models = [Block().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    f = compiled(models[0], rest=rest, conv2d="winograd|gemm")
    x = image(4)
    for _ in range(2):
        for model, call in zip(models, (f, models[1])):
            model.zero_grad()
            call(x).square().mean().backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
        pairs = zip(models[0].named_parameters(), models[1].parameters())
        for (name, mine), theirs in pairs:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(models[0].bn1.running_mean, models[1].bn1.running_mean, rtol=1e-4, atol=1e-5)
    assert chosen()["conv2"] == "winograd@cpp"
    assert not any(row.fused for row in ai3_compile.last_report()), "nothing is folded while gradients are asked for"


@pytest.mark.parametrize("rest", RESTS)
def test_eval_mode_with_gradients_equals_eager(rest):
    """Batch norm in eval mode inside a graph that is differentiated."""
    model, x = block(), image().requires_grad_()
    (found,) = torch.autograd.grad(compiled(model, rest=rest)(x).sum(), x)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rest", RESTS)
def test_max_pooling_whose_indices_the_backward_pass_needs_stays_with_torch_and_says_so(rest):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    compiled(model, rest=rest)(image().requires_grad_()).sum().backward()
    (row,) = [row for row in ai3_compile.last_report() if row.operation == "maxpool2d"]
    assert row.algorithm == "torch" and "indices are used" in row.rejected["direct@cpp"]


@pytest.mark.parametrize("rest", RESTS)
def test_batch_size_is_dynamic(rest):
    model = block()
    f = torch.compile(model, backend="ai3", options={"rest": rest}, dynamic=None)
    with torch.no_grad():
        for batch in (2, 3, 5, 7, 17, 1):
            x = image(batch)
            close(f(x), model(x))
    compiles = len(ai3_compile.reports())
    with torch.no_grad():
        for batch in (4, 6, 9):
            f(image(batch))
    assert len(ai3_compile.reports()) == compiles, "other batch sizes need no other graph"


@pytest.mark.parametrize("rest", RESTS)
def test_autocast_leaves_bfloat16_to_torch_and_says_so(rest):
    model, x = block(), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(model, rest=rest)(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    row = next(row for row in ai3_compile.last_report() if row.name == "conv1")
    assert row.algorithm == "torch" and row.dtype == "bfloat16"
    assert all("float" in reason for reason in row.rejected.values())


def test_max_workspace_leaves_out_what_needs_more():
    conv, x = torch.nn.Conv2d(32, 32, 3, padding=1).eval(), torch.randn(1, 32, 16, 16)
    with torch.no_grad():
        close(compiled(conv, conv2d="winograd|direct", max_workspace=0, rest="eager")(x), conv(x))
        (row,) = ai3_compile.last_report()
        assert row.algorithm == "direct@cpp" and "over max_workspace" in row.rejected["winograd@cpp"]
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="bytes of workspace, over max_workspace"):
            compiled(conv, conv2d="winograd", max_workspace=0, rest="eager")(x)


def test_strict_forbids_what_the_policy_would_leave_to_torch():
    model, x = block(), image()
    with torch.no_grad():
        close(compiled(model, strict=True, rest="eager")(x), model(x))
        assert all(row.algorithm.endswith("@cpp") or row.algorithm == "fused" for row in ai3_compile.last_report())
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="strict=True") as error:
            compiled(model.to(torch.bfloat16), strict=True)(x.to(torch.bfloat16))
    assert isinstance(inner(error), StrictError)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@pytest.mark.parametrize("rest", RESTS)
def test_graph_breaks_give_one_report(rest):
    model, x = Broken().eval(), image()
    with torch.no_grad():
        close(compiled(model, rest=rest)(x), model(x))
    report = ai3_compile.last_report()
    assert [row.name for row in report] == ["first", "second"] and len(report.graphs) == 2


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.relu(self.conv(x)))


@pytest.mark.parametrize("rest", RESTS)
def test_a_module_used_twice_is_two_rows(rest):
    model, x = Reused(), image()
    with torch.no_grad():
        close(compiled(model, rest=rest, conv2d=["winograd", "smm"])(x), model(x))
    rows = [(row.name, row.algorithm) for row in ai3_compile.last_report() if row.operation == "conv2d"]
    assert rows == [("conv", "winograd@cpp"), ("conv", "smm@cpp")]


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("algorithm", ["smm", "winograd"])
def test_a_channels_last_model_stays_one(rest, algorithm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(), nn.Conv2d(8, 4, 3)).to(
        memory_format=torch.channels_last
    )
    x = image().to(memory_format=torch.channels_last)
    with torch.no_grad():
        close(compiled(model, rest=rest, conv2d=algorithm)(x), model(x))


class Awkward(nn.Module):
    """Views, concatenation, padding and outputs that depend on memory layout right behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(12, 4, 3, padding="same")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = self.a(x), self.b(x)
        joined = torch.cat([a, F.silu(b)], 1)
        shuffled = joined.view(x.shape[0], 2, 6, *x.shape[2:]).transpose(1, 2).reshape(joined.shape)
        c = self.c(shuffled)
        return a, c, c.permute(0, 2, 3, 1).contiguous(), c.view(x.shape[0], -1), torch.flatten(c * 2, 2)


@pytest.mark.parametrize("rest", RESTS)
def test_layout_changes_nothing_a_user_can_see(rest):
    model, x = Awkward().eval(), image()
    with torch.no_grad():
        for found, expected in zip(compiled(model, rest=rest)(x), model(x)):
            close(found, expected)


def test_threads_may_share_a_compiled_model():
    from concurrent.futures import ThreadPoolExecutor

    model = block()
    f = compiled(model, rest="eager")
    images = [image() for _ in range(8)]

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # a mode of each thread
            return f(x)

    call(images[0])
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        for found, x in zip(pool.map(call, images), images):
            close(found, model(x))


def test_height_and_width_may_be_dynamic():
    model = block()
    f = torch.compile(model, backend="ai3", options={"rest": "eager"}, dynamic=True)
    with torch.no_grad():
        for height, width in ((16, 21), (20, 33), (9, 48)):
            x = torch.randn(2, 3, height, width)
            close(f(x), model(x))
    assert len(ai3_compile.reports()) == 1


UNUSUAL = {
    "linear-without-inputs": (nn.Linear(1, 4).weight[:, :0], lambda w, x: F.linear(x[:, 0, 0, :0], w)),
    "linear-with-a-broadcast-bias": (torch.ones(6, 16), lambda w, x: F.linear(x, w, w[0, :1])),
    "mean-of-no-pixels": (torch.ones(1), lambda w, x: (x[:, :, :0] * w).mean((2, 3), keepdim=True)),
    "padding-of-a-dynamic-size": (torch.ones(4, 3, 3, 3), lambda w, x: F.conv2d(x, w, padding=x.shape[2] // 4)),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_no_algorithm_can_take_is_left_to_torch(name):
    weight, function = UNUSUAL[name]
    f = torch.compile(lambda x: function(weight, x), backend="ai3", options={"rest": "eager"}, dynamic=True)
    x = torch.randn(2, 3, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(f(x), function(weight, x), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3)], ids=str
)
def test_an_unbatched_image_is_a_batch_of_one(pool, rest):
    x = torch.randn(3, 8, 8)
    with torch.no_grad():
        found = compiled(pool, rest=rest)(x)
        close(found, pool(x))
    (row,) = ai3_compile.last_report()
    assert row.algorithm == "direct@cpp" and row.input_shape == (1, 3, 8, 8) and found.shape == pool(x).shape


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("sizes", [(1, 8, 4), (2, 3, 1), (5, 1, 7)], ids=str)
def test_small_linears_are_not_taken_apart_before_they_are_seen(sizes, rest):
    rows, inputs, outputs = sizes
    layer, x = nn.Linear(inputs, outputs), torch.randn(rows, inputs)
    with torch.no_grad():
        close(compiled(layer, rest=rest, strict=True)(x), layer(x))
    (row,) = ai3_compile.last_report()
    assert row.algorithm == "gemm@cpp"


def test_a_product_with_a_transposed_weight_is_a_linear():
    weight, x = torch.randn(6, 5), torch.randn(4, 5)
    with torch.no_grad():
        close(compiled(lambda x: x @ weight.transpose(0, 1), rest="eager")(x), x @ weight.t())
    (row,) = ai3_compile.last_report()
    assert row.algorithm == "gemm@cpp"


def test_relu_keeps_any_order_of_dimensions():
    x = torch.randn(4, 5, 6).permute(2, 0, 1)
    with torch.no_grad():
        found = compiled(nn.ReLU(), rest="eager", relu="direct")(x)
    assert found.stride() == x.stride() and torch.equal(found, x.relu())


def test_inductors_freezing_does_not_take_the_choice_away():
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled(block(), conv2d="winograd|gemm")(image())
    assert chosen()["conv2"] == "winograd@cpp"


def test_a_weight_whose_storage_was_freed_is_an_error():
    conv = nn.Conv2d(3, 4, 3)
    f = compiled(conv, rest="eager", conv2d="winograd")
    with torch.no_grad():
        f(image())
        conv.weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="its storage was freed"):
            f(image())


def test_a_functional_weight_that_is_an_input_is_not_kept():
    def f(x, w):
        return F.conv2d(x, w)

    g = torch.compile(f, backend="ai3", options={"conv2d": "winograd", "rest": "eager"})
    x = image()
    with torch.no_grad():
        for _ in range(3):
            w = torch.randn(4, 3, 3, 3)
            close(g(x, w), f(x, w))


def test_a_transposed_or_one_dimensional_convolution_is_left_alone():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten(2), nn.Conv1d(4, 2, 3))
    x = image()
    with torch.no_grad():
        close(compiled(model, rest="eager")(x), model(x))
    assert not [row for row in ai3_compile.last_report() if row.operation == "conv2d"]


def test_a_warm_inductor_cache_still_has_its_report(tmp_path, monkeypatch):
    """On a hit no pass runs; the report comes from the store, and is made anew where the store has lost it."""
    from ai3_compile.report import store

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = block(), image()
    texts = []
    torch._dynamo.utils.counters.clear()
    for lose in (False, False, True):
        torch._dynamo.reset()
        if lose:
            for path in store.folder().glob("*.json"):
                path.unlink()
        with torch.no_grad():
            close(compiled(model, rest="inductor")(x), model(x))
        texts.append(str(ai3_compile.last_report()))
    assert texts[0] == texts[1] == texts[2] and "conv1" in texts[0]
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == 2


def test_graphs_on_disk_are_kept_apart_by_autocast():
    step = backend._Ai3Pass(check_options({}), GraphReport(), False)
    keys = [step.uuid()]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.append(step.uuid())
    assert None not in keys and len(set(keys)) == 3 and step.uuid() == keys[0]


def test_each_decision_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="ai3_compile"), torch.no_grad():
        compiled(block(), rest="eager")(image())
    assert any("conv2d conv1 2x3x16x16" in message and "not " in message for message in caplog.messages)


def test_torch_logs_shows_each_decision():
    import os
    import subprocess
    import sys

    program = (
        "import torch\n"
        "f = torch.compile(torch.nn.Conv2d(3, 4, 3), backend='ai3', options={'rest': 'eager'})\n"
        "with torch.no_grad(): f(torch.randn(1, 3, 8, 8))"
    )
    environment = {**os.environ, "TORCH_LOGS": "+ai3_compile"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "conv2d  1x3x8x8" in done.stderr and "torch: comes after" in done.stderr, done.stderr


def test_mode_goes_to_inductor_and_is_refused_without_it():
    model, x = block(), image()
    with torch.no_grad():
        close(torch.compile(model, backend="ai3", mode="max-autotune-no-cudagraphs")(x), model(x))


def test_double_precision():
    model, x = block().double(), image().double()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, rest="eager")(x), model(x), rtol=1e-11, atol=1e-11)
    assert chosen()["conv1"].endswith("@cpp")


def test_last_report_before_any_compilation_says_what_to_do():
    torch.compiler.reset()
    with pytest.raises(LookupError, match="when the model is first called"):
        ai3_compile.last_report()
