"""Networks on a GPU through every entry: numbers, weights that change, CUDA graphs, and bad input."""

from __future__ import annotations

import copy
import ctypes
import itertools

import pytest
import torch
from torch import nn

import ai3_compile as ai3
from ai3_compile import core, registry
from ai3_compile.backends import gpu
from ai3_compile.errors import NothingFitsError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PLATFORMS = ("cuda", "cudnn", "cublas")
CONVOLUTIONS = [a.qualified for a in registry.of_operation("conv2d") if a.platform in PLATFORMS]
LIMIT = 1e-5
"""Of max|y - reference| / max|reference| in strict float32: a few convolutions behind one another, one by Winograd."""


@pytest.fixture(autouse=True)
def strict():
    torch.manual_seed(0)
    with gpu.precision(tf32=False):
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    """What the passes fold and fuse: batch norms, a residual, activations, a concatenation, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Hardswish())
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 24, 3, padding=1)
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Sigmoid())
        self.depthwise = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(32 * 25, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.body(x) + x
        x = torch.cat([self.left(x).relu(), self.right(x).relu()], 1)
        x = self.depthwise(x * self.scale(x)).relu()
        return self.head(self.pool(x).flatten(1))


def net() -> Net:
    made = Net().cuda().eval()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made


def image(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 20, 20, device="cuda")


def error(found: torch.Tensor, model: nn.Module, x: torch.Tensor) -> float:
    """Against float64 on the CPU: PyTorch's hardswish on a GPU multiplies by a sixth in float32."""
    with torch.no_grad():
        expected = copy.deepcopy(model).cpu().double()(x.cpu().double())
    return ((found.cpu().double() - expected).abs().max() / expected.abs().max()).item()


WAYS = {
    "eager": {"rest": "eager"},
    "inductor": {"rest": "inductor"},
    "reduce-overhead": {"mode": "reduce-overhead"},
}


def compiled(model: nn.Module, way: str, **options: object):
    run = torch.compile(model, backend="ai3", options={**WAYS[way], **options})

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(x).clone()

    return call


# Through Inductor without CUDA graphs only those that are reached otherwise: the rest is the same.
@pytest.mark.parametrize(
    ("algorithm", "way"),
    [
        *itertools.product([*CONVOLUTIONS, "default", "guess"], ["eager", "reduce-overhead"]),
        *itertools.product(["default", "direct@cuda", "auto@cudnn"], ["inductor"]),
    ],
)
def test_numbers_follow_weights_however_they_change(algorithm, way):
    model, x = net(), image()
    with torch.no_grad():
        run = compiled(model, way, conv2d=f"{algorithm}|torch")
        for _ in range(3):
            found = run(x)
        assert error(found, model, x) < LIMIT
        rows = [row for row in ai3.last_report() if row.operation == "conv2d"]
        assert len(rows) == 6
        if algorithm == "direct@cuda":
            assert {row.algorithm for row in rows} == {algorithm}
        model.stem[0].weight.mul_(1.5)
        assert error(run(x), model, x) < LIMIT
        model.stem[1].running_mean.add_(0.3)
        assert error(run(x), model, x) < LIMIT
        model.body[1].weight.add_(0.5)
        assert error(run(x), model, x) < LIMIT
        model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})
        assert error(run(x), model, x) < LIMIT
        model.right.weight = nn.Parameter(model.right.weight * 1.1)
        model.body[1].bias = nn.Parameter(torch.randn(16, device="cuda"))  # beside a weight that stays
        for _ in range(3):
            found = run(x)
        assert error(found, model, x) < LIMIT


class Blocks(nn.Module):
    """Residual blocks as in ResNet-50, large enough to fill the GPU: kernels of ai3, cuDNN and cuBLAS take turns."""

    def __init__(self, channels: int = 256, depth: int = 4) -> None:
        super().__init__()
        inner = channels // 4
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(64, channels, 1)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.Conv2d(channels, inner, 1),
                    nn.Conv2d(inner, inner, 3, padding=1),
                    nn.Conv2d(inner, channels, 1),
                    nn.Conv2d(channels, channels, 1),
                )
            )
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for reduce, middle, expand, shortcut in self.blocks:
            x = (expand(middle(reduce(x).relu()).relu()) + shortcut(x)).relu()
        return x.mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "tf32"])
@pytest.mark.parametrize(
    "algorithm",
    [
        "auto",
        "default",
        "implicit gemm@cuda",
        "implicit gemm@cuda,auto@cudnn",
        "implicit gemm@cuda,gemm@cublas|guess@cudnn",
    ],
)
def test_kernels_of_a_graph_do_not_overlap(algorithm, dtype):
    """One that starts early may write where another still reads. On other inputs at every replay: what the one before
    left in memory would hide much."""
    model = Blocks().cuda().to(dtype).eval().to(memory_format=torch.channels_last)
    names = itertools.cycle(algorithm.split(","))
    with gpu.precision(tf32=True), torch.no_grad():
        options = {"mode": "reduce-overhead", "conv2d": lambda spec: f"{next(names)}|torch"}
        run = torch.compile(model, backend="ai3", options=options)
        for _ in range(20):
            x = torch.randn(10, 3, 224, 224, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            torch.compiler.cudagraph_mark_step_begin()
            found = run(x)
            expected = copy.deepcopy(model).double()(x.double())  # without hardswish the GPU's is good enough
            assert ((found.double() - expected).abs().max() / expected.abs().max()).item() < 5e-3


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "float16"])
@pytest.mark.parametrize("algorithm", ["auto@cudnn", "guess@cudnn", "auto"])
def test_kernels_wait_wherever_they_lie_ready(algorithm, tf32):
    """Behind a kernel that takes longer than the CPU takes to launch all others."""
    dtype = torch.float32 if tf32 else torch.float16
    model = Blocks().cuda().to(dtype).eval().to(memory_format=torch.channels_last)
    with gpu.precision(tf32=True), torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"rest": "eager", "conv2d": f"{algorithm}|torch"})
        for _ in range(5):
            x = torch.randn(10, 3, 224, 224, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            run(x)
            torch.cuda.synchronize()
            torch.cuda._sleep(100_000_000)
            found = run(x)
            expected = copy.deepcopy(model).double()(x.double())
            assert ((found.double() - expected).abs().max() / expected.abs().max()).item() < 5e-3


class Edge(ctypes.Structure):
    """CUgraphEdgeData."""

    _fields_ = [(name, ctypes.c_ubyte) for name in ("from_port", "to_port", "type")] + [("rest", ctypes.c_ubyte * 5)]


class KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        *((name, ctypes.c_void_p) for name in ("params", "extra", "kernel", "context")),
    ]


def early_kernels(graph: int) -> list[tuple[str, int]]:
    """The names of the kernels of a CUDA graph that may begin before what they follow has ended, and what of that they
    wait for: the port of the edge."""
    cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t(0)
    assert cuda.cuGraphGetEdges_v2(ctypes.c_void_p(graph), None, None, None, ctypes.byref(count)) == 0
    befores, nodes = ((ctypes.c_void_p * count.value)() for _ in range(2))
    edges, found = (Edge * count.value)(), []
    assert cuda.cuGraphGetEdges_v2(ctypes.c_void_p(graph), befores, nodes, edges, ctypes.byref(count)) == 0
    for node, edge in zip(nodes, edges):
        if edge.type != 1:  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
            continue
        params, name = KernelNode(), ctypes.c_char_p()
        assert cuda.cuGraphKernelNodeGetParams_v2(ctypes.c_void_p(node), ctypes.byref(params)) == 0
        of = (cuda.cuFuncGetName, params.function) if params.function else (cuda.cuKernelGetName, params.kernel)
        assert of[0](ctypes.byref(name), ctypes.c_void_p(of[1])) == 0
        found.append(((name.value or b"").decode(), edge.from_port))
    return found


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "float16"])
@pytest.mark.parametrize("algorithm", ["auto@cudnn", "guess@cudnn"])
def test_no_kernel_of_cudnns_begins_early_in_a_graph(algorithm, tf32):
    dtype = torch.float32 if tf32 else torch.float16
    model = Blocks().cuda().to(dtype).eval().to(memory_format=torch.channels_last)
    x = torch.randn(10, 3, 224, 224, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    with gpu.precision(tf32=True), torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"rest": "eager", "conv2d": f"{algorithm}|torch"})
        run(x)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            run(x)
    assert early_kernels(graph.raw_cuda_graph()) == []


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_own_kernels_begin_once_the_one_before_has_begun():
    model = Blocks().cuda().half().eval().to(memory_format=torch.channels_last)
    x = torch.randn(10, 3, 224, 224, device="cuda").half().to(memory_format=torch.channels_last)
    with torch.no_grad():
        options = {"rest": "eager", "conv2d": "implicit gemm@cuda|torch"}
        run = torch.compile(model, backend="ai3", options=options)
        run(x)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            run(x)
    early = early_kernels(graph.raw_cuda_graph())
    launch_order = 2  # CU_GRAPH_KERNEL_NODE_PORT_LAUNCH_ORDER
    assert early and {port for _, port in early} == {launch_order}
    assert all(name.startswith(("gemm_", "few_", "linear_")) for name, _ in early)


@pytest.mark.parametrize("options", [{"rest": "eager"}, {}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_parameters_once(dtype, options):
    """Also those of a batch norm that is folded, and anew where they have changed; the same weights serve float32."""
    model, x = net(), image(2)
    chosen = {"conv2d": "implicit gemm@cuda|default", "linear": "gemm@cuda", **options}
    run = torch.compile(model, backend="ai3", options=chosen)
    limit = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]  # of eight layers, each of which rounds
    with torch.no_grad():
        assert error(run(x), model, x) < LIMIT
        for change in (None, "weight", "bias", "norm"):
            if change is not None:
                {"weight": model.head.weight, "bias": model.left.bias, "norm": model.stem[1].weight}[change].mul_(-2)
            with torch.autocast("cuda", dtype):
                found = run(x)
                assert found.dtype == dtype and error(found, model, x) < limit
                made = core.load().ai3_core_packs_made()
                for _ in range(3):
                    again = run(x)
                assert torch.equal(again, found) and core.load().ai3_core_packs_made() == made
        rows = {row.algorithm for row in ai3.last_report() if row.operation in ("conv2d", "linear")}
        assert {"implicit gemm@cuda", "gemm@cuda"} <= rows
        assert sum("batch_norm" in row.computed for row in ai3.last_report()) == 2
        assert error(run(x), model, x) < LIMIT


class Dense(nn.Module):
    """Layers as in DenseNet: each reads what all before it gave, through a batch norm and a ReLU."""

    def __init__(self, channels: int = 64, layers: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        widths = range(channels, channels + 32 * layers, 32)
        self.ahead = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.reduce = nn.ModuleList(nn.Conv2d(width, 64, 1, bias=False) for width in widths)
        self.behind = nn.ModuleList(nn.BatchNorm2d(64) for _ in widths)
        self.grow = nn.ModuleList(nn.Conv2d(64, 32, 3, padding=1, bias=False) for _ in widths)
        self.last, self.head = nn.BatchNorm2d(channels + 32 * layers), nn.Conv2d(channels + 32 * layers, 16, 1)
        for norm in (*self.ahead, *self.behind, self.last):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [self.stem(x)]
        for ahead, reduce, behind, grow in zip(self.ahead, self.reduce, self.behind, self.grow):
            found.append(grow(behind(reduce(ahead(torch.cat(found, 1)).relu())).relu()))
        return self.head(self.last(torch.cat(found, 1)).relu()).mean((2, 3))


# A dozen layers behind one another, each rounding what it gives.
@pytest.mark.parametrize(
    ("algorithm", "dtype", "tf32", "limit", "way"),
    [
        *(("implicit gemm@cuda", torch.float32, False, LIMIT, way) for way in ("eager", "reduce-overhead")),
        *(("implicit gemm@cuda", torch.float32, True, 4e-3, way) for way in ("eager", "reduce-overhead")),
        *(("implicit gemm@cuda", torch.float16, False, 1e-2, way) for way in ("eager", "reduce-overhead")),
        ("auto", torch.float16, False, 1e-2, "reduce-overhead"),  # once: it measures fourteen layers
    ],
)
def test_batch_norms_ahead_of_convolutions_and_concatenations_that_grow(algorithm, dtype, tf32, limit, way):
    model = Dense().cuda().to(dtype).eval()
    with gpu.precision(tf32=tf32), torch.no_grad():
        run = compiled(model, way, conv2d=algorithm)
        for _ in range(3):
            x = torch.randn(4, 3, 28, 30, device="cuda", dtype=dtype)
            assert error(run(x), model, x) < limit
        if algorithm != "auto":
            rows = [row for row in ai3.last_report() if row.operation == "conv2d"]
            assert [row.prologue for row in rows].count(["batch_norm", "relu"]) == 7
            assert ["concat" in row.fused for row in rows].count(True) == 7
        # Statistics and weights that change are followed by the graph that was captured.
        model.ahead[2].weight.mul_(-2)
        model.last.bias.add_(1)
        assert error(run(x), model, x) < limit
        model.ahead[1].running_mean.add_(1)
        assert error(run(x), model, x) < limit


@pytest.mark.parametrize("way", WAYS)
def test_fused_optimizers_change_what_is_packed(way):
    model, x = net(), image()
    with torch.no_grad():
        run = compiled(model, way)
        for _ in range(3):
            run(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert error(run(x), model, x) < LIMIT


@pytest.mark.parametrize("way", WAYS)
def test_statistics_of_a_training_forward_are_seen(way):
    """PyTorch raises no version of theirs, and no optimizer steps."""
    model, x = net(), image()
    with torch.no_grad():
        run = compiled(model, way)
        for _ in range(3):
            run(x)
        model.train()
        model(x)
        model.eval()
        assert error(run(x), model, x) < LIMIT


def test_a_write_through_data_needs_invalidate():
    model, x = net(), image()
    with torch.no_grad():
        run = compiled(model, "reduce-overhead")
        for _ in range(3):
            run(x)
        model.stem[0].weight.data.mul_(2)
        ai3.invalidate(model)
        assert error(run(x), model, x) < LIMIT


@pytest.mark.parametrize("way", WAYS)
def test_training_follows_eager(way):
    model, x = net().train(), image()
    twin = copy.deepcopy(model)
    run, losses = torch.compile(model, backend="ai3", options=WAYS[way]), []
    for step, m in ((run, model), (twin, twin)):
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
        taken = []
        for _ in range(4):
            loss = step(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(loss.item())
        losses.append(taken)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, x = net().to(dtype), image().to(dtype)
    limit = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float64: 1e-12}[dtype]
    with torch.no_grad():
        for way in WAYS:
            torch._dynamo.reset()
            run = compiled(model, way)
            for _ in range(3):
                found = run(x)
            assert found.dtype == dtype and error(found, model, x) < limit


def test_settings_are_followed_at_every_call():
    """A network compiled while TF32 was allowed keeps to strict float32 once it is not."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    conv = nn.Conv2d(256, 64, 3, padding=1).cuda().eval()
    x = torch.randn(2, 256, 28, 28, device="cuda")
    with torch.no_grad():
        run = torch.compile(conv, backend="ai3", options={"conv2d": "implicit precomp gemm@cudnn", "rest": "eager"})
        rough = error(run(x), conv, x)
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        fine = error(run(x), conv, x)
    assert rough > 2e-5 > 5e-6 > fine  # one behind another, 2304 products are summed


def test_strict_float32_is_strict_in_cudnns_own_choice():
    conv, x = nn.Conv2d(256, 64, 3, padding=1).cuda().eval(), torch.randn(2, 256, 28, 28, device="cuda")
    for algorithm in ("guess@cudnn", "auto@cudnn"):
        torch._dynamo.reset()
        with torch.no_grad():
            run = torch.compile(conv, backend="ai3", options={"conv2d": algorithm, "rest": "eager"})
            assert error(run(x), conv, x) < 5e-6


def test_a_graph_of_the_users_own():
    """Captured without ai3's knowledge, as torch.cuda.graph does, behind a call that warms up."""
    model, x = net(), image()
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"rest": "eager"})
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = run(x)
        x.copy_(image())
        graph.replay()
        torch.cuda.synchronize()
        assert error(found, model, x) < LIMIT
        model.body[0].weight.mul_(1.5)
        run(x)  # packs anew, where the graph reads
        graph.replay()
        torch.cuda.synchronize()
        assert error(found, model, x) < LIMIT


def test_the_current_stream_is_used():
    model, x = net(), image(64)
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"rest": "eager"})
        run(x)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            filled = torch.empty_like(x).copy_(x)
            found = run(filled)
            assert not stream.query(), "it waited for the device"
        stream.synchronize()
    assert error(found, model, x) < LIMIT


def test_another_stream_waits_for_the_packs():
    """They are made behind a long wait on one stream, and read at once on another."""
    model, x = net(), image()
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"conv2d": "winograd@cuda|direct@cuda", "rest": "eager"})
        run(x)
        model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        run(x)
        with torch.cuda.stream(torch.cuda.Stream()):
            found = run(x)
        torch.cuda.synchronize()
        assert error(found, model, x) < LIMIT


def test_swapped_modules_and_converted_models():
    x = image()
    for algorithm in ("winograd@cuda|direct@cuda", "auto@cudnn", "implicit gemm@cuda|torch", "default"):
        model = net()
        reference = copy.deepcopy(model)
        with torch.no_grad():
            ai3.swap_operation("conv2d", model, algorithm, tuple(x.shape))
            assert error(model(x), reference, x) < LIMIT
            converted = ai3.convert(copy.deepcopy(reference), {"conv2d": algorithm}, tuple(x.shape))
            assert error(converted(x), reference, x) < LIMIT
            assert error(converted(x[:1]), reference, x[:1]) < LIMIT


def test_shapes_may_change():
    model = net()
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", dynamic=True, options={"rest": "eager"})
        for batch in (2, 5, 1, 7):
            x = image(batch)
            assert error(run(x), model, x) < LIMIT


def test_an_algorithm_of_another_device_is_refused():
    model, x = net(), image()
    with pytest.raises(Exception, match="runs on the CPU, and this operation on cuda"):
        torch.compile(model, backend="ai3", options={"conv2d": "direct@cpp", "rest": "eager"})(x)
    with pytest.raises(NothingFitsError, match="runs on NVIDIA GPUs, and this operation on cpu"):
        ai3.swap_operation("conv2d", net().cpu(), "direct@cuda", (1, 3, 20, 20))


def test_tensors_on_different_devices_or_of_different_dtypes_are_refused():
    core.load()
    algorithm = registry.find("conv2d", "direct@cuda")
    registry.platforms()["cuda"].load([algorithm])
    x, w = image(), torch.randn(8, 3, 3, 3, device="cuda")
    window = (1, 1, 1, 1, 1, 1, 1, 1, 1)
    call = torch.ops.ai3.conv2d.default
    with pytest.raises(RuntimeError, match="weight is on the CPU, and the input on cuda:0"):
        call(x, w.cpu(), None, *window, algorithm.id)
    with pytest.raises(RuntimeError, match="weight and input have different dtypes"):
        call(x, w.half(), None, *window, algorithm.id)
    with pytest.raises(RuntimeError, match=r"direct@cuda\] runs on NVIDIA GPUs, and its input is on the CPU"):
        call(x.cpu(), w.cpu(), None, *window, algorithm.id)
    cpu = registry.find("conv2d", "direct@cpp")
    registry.platforms()["cpp"].load([cpu])
    with pytest.raises(RuntimeError, match=r"direct@cpp\] runs on the CPU, and its input is on cuda:0"):
        call(x, w, None, *window, cpu.id)
    torch.testing.assert_close(call(x, w, None, *window, algorithm.id), torch.conv2d(x, w, padding=1))


def test_too_little_memory_is_torchs_own_error_and_leaves_everything_as_it_was():
    model, x = net(), image()
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", options={"rest": "eager"}, dynamic=True)
        before = run(x)
        free, _ = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(0.002)
        try:
            with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                run(image(4096))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert torch.equal(run(x), before)


def test_a_workspace_that_is_too_large_drops_out():
    conv, x = nn.Conv2d(64, 64, 3, padding=1).cuda().eval(), torch.randn(8, 64, 56, 56, device="cuda")
    with torch.no_grad():
        options = {"conv2d": "winograd nonfused@cudnn|direct@cuda", "max_workspace": 0, "rest": "eager"}
        run = torch.compile(conv, backend="ai3", options=options)
        assert error(run(x), conv, x) < LIMIT
    (row,) = ai3.last_report()
    assert row.algorithm == "direct@cuda" and "over max_workspace" in row.rejected["winograd nonfused@cudnn"]
