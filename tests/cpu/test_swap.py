"""swap_operation: the swapped model is the model it was, computed by the algorithms that were chosen.

Bounds: 2e-5 of the outputs' norm in float32, the sum of the kernels' own (1e-6 to 5e-6, test_kernels.py) over the few
layers of a network; 1e-12 in float64.
"""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import ai3
from ai3_compile import errors, registry, swap_torch
from ai3_compile.ops import MODULES as SWAPPABLE
from ai3_compile.testing.references import relative_error


class Net(nn.Module):
    """Every operation; the modules are defined in another order than they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 4, 5)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(3, 8, 3, padding="same")
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.avgpool = nn.AvgPool2d(3, 1, padding=1)
        self.adaptive = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn(self.conv1(x))))
        x = self.adaptive(self.avgpool(self.relu(self.conv2(x))))
        return self.head(self.flatten(x))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().eval().to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or (2, 3, 12, 12)), dtype=dtype)


def swapped_everywhere(model: nn.Module) -> nn.Module:
    for operation in SWAPPABLE:
        ai3.swap_operation(operation, model, "guess")
    return model


@pytest.mark.parametrize(
    "algorithm",
    [a for operation in SWAPPABLE for a in registry.for_device(operation, "cpu")],
    ids=lambda a: f"{a.operation}-{a.qualified}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_algorithm_gives_the_same_numbers(algorithm, dtype):
    model, x = net(dtype), image(dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        ai3.swap_operation(algorithm.operation, model, algorithm.qualified)
        found = model(x)
    assert relative_error(found, expected) < (2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("op_type", [nn.Conv2d, "conv2d", "Conv2D"])
def test_a_sequence_goes_by_the_order_of_the_forward_pass(op_type):
    for shape in (None, (1, 3, 12, 12)):
        model = net()
        ai3.swap_operation(op_type, model, ["direct", "smm"], shape)
        assert (model.conv1.algorithm, model.conv2.algorithm) == ("direct", "smm")


def test_entries_beyond_the_last_module_are_not_used():
    model = net()
    ai3.swap_conv2d(model, ["direct", "smm"] * 8, (1, 3, 12, 12))
    assert (model.conv1.algorithm, model.conv2.algorithm) == ("direct", "smm")


def test_a_swapped_module_is_the_module_it_was():
    model, x = net(), image()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    keys, conv, seen = list(model.state_dict()), model.conv1, []
    conv.register_forward_hook(lambda *_: seen.append("hook"))
    conv.register_forward_pre_hook(lambda *_: seen.append("pre"))
    conv.weight.requires_grad_(False)
    ai3.swap_operation("conv2d", model, "direct")
    assert model.conv1 is conv and isinstance(conv, nn.Conv2d) and isinstance(conv, swap_torch.Conv2D)
    assert list(model.state_dict()) == keys
    assert all(before[name] == (p, p.data_ptr()) and before[name][0] is p for name, p in model.named_parameters())
    assert not conv.weight.requires_grad and "algorithm='direct'" in repr(model)
    model(x)
    assert seen == ["pre", "hook"]
    ai3.swap_operation("conv2d", model, "torch")
    assert type(conv) is nn.Conv2d and "algorithm" not in vars(conv)


@pytest.mark.parametrize("operation", SWAPPABLE)
def test_swapping_again_and_back(operation):
    model, x = net(), image()
    expected = model(x)
    first = registry.for_device(operation, "cpu")[0].name
    for algos in ("default", first, ["default|torch"] * 9, "torch"):
        ai3.swap_operation(operation, model, algos)
        assert relative_error(model(x), expected) < 2e-5
    assert not any(isinstance(child, swap_torch.Swapped) for child in model.modules())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(_saved(m), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same(copied):
    model, x = swapped_everywhere(net()), image()
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    if twin is not model:
        with torch.no_grad():
            twin.conv1.weight.zero_()
        assert not torch.equal(twin(x), model(x))


def _saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_data_parallel_replicas_run():
    model, x = swapped_everywhere(net()), image()
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        shadow = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():  # as torch.nn.parallel.replicate has it
            if parameter is None:
                shadow._parameters[key] = None
            else:
                setattr(shadow, key, parameter * 1)
        setattr(replica, name, shadow)
    assert torch.equal(replica(x), model(x))
    if not torch.cuda.is_available():  # there it would want the model on a GPU
        assert torch.equal(nn.DataParallel(model)(x), model(x))


def test_state_dicts_go_both_ways():
    model, other, x = swapped_everywhere(net()), Net().eval(), image()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert relative_error(other(x), model(x)) < 2e-5
        for assign in (False, True):
            fresh = Net().eval()
            expected = fresh(x)
            model.load_state_dict(fresh.state_dict(), assign=assign)
            assert relative_error(model(x), expected) < 2e-5


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "ai3"])
def test_compiles_with_any_backend(backend):
    torch._dynamo.reset()
    model, x = swapped_everywhere(net()), image()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (2, 3, 4):
        with torch.no_grad():
            assert relative_error(compiled(image(batch, 3, 12, 12)), model(image(batch, 3, 12, 12))) < 2e-5
    out = compiled(x).sum()
    out.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(relative_error(a, p.grad) < 1e-4 for a, p in zip(found, model.parameters()))


def test_the_report_of_a_compiled_swapped_model_keeps_the_choice():
    torch._dynamo.reset()
    model = net()
    ai3.swap_operation("conv2d", model, ["smm", "gemm"])
    ai3.swap_operation("relu", model, "direct")
    with torch.no_grad():
        torch.compile(model, backend="ai3", options={"rest": "eager"})(image())
    rows = {row.name: row.algorithm for row in ai3.last_report()}
    assert (rows["conv1"], rows["conv2"], rows["relu"]) == ("smm@cpp", "gemm@cpp", "direct@cpp")


def test_an_algorithm_changed_after_compiling_is_used():
    torch._dynamo.reset()
    model, calls = net(), []
    function = ai3.register_algorithm("relu", "noted", lambda x: calls.append(1) or torch.relu(x))
    try:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled(image())
            ai3.swap_operation("relu", model, "noted")
            compiled(image())
    finally:
        ai3.unregister_algorithm("relu", function.name)
    assert len(calls) == 2


def test_exports_with_a_dynamic_batch():
    model, x = swapped_everywhere(net()), image()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for batch in (2, 5):
        assert relative_error(loaded(image(batch, 3, 12, 12)), model(image(batch, 3, 12, 12))) < 1e-6


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [3, (2, 4), (4, 3)])
@pytest.mark.parametrize("padding", [0, (1, 1), "same", "valid"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_padding_modes(mode, kernel, padding, batched):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, padding=padding, padding_mode=mode, dilation=(1, 2), groups=2)
    x = image(2, 4, 9, 10) if batched else image(4, 9, 10)
    expected = conv(x)
    for algorithm in ("direct", "gemm", "default"):
        ai3.swap_operation("conv2d", conv, algorithm)
        assert relative_error(conv(x), expected) < 2e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_layouts_of_the_input(layout):
    x = image(2, 4, 10, 12)
    given = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": image(2, 8, 10, 12)[:, ::2],
        "transposed": image(2, 4, 12, 10).transpose(2, 3),
    }[layout]
    modules = [nn.Conv2d(4, 3, 3), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d((3, None)), nn.ReLU()]
    for module in (*modules, nn.Flatten(), nn.Linear(given.shape[-1], 5)):
        expected = module(given)
        swapped_everywhere(module)
        assert relative_error(module(given), expected) < 2e-6 and module(given).shape == expected.shape


def test_empty_and_unbatched_inputs():
    for shape in ((0, 4, 8, 8), (4, 8, 8), (1, 4, 8, 8)):
        for module in (nn.Conv2d(4, 3, 3), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.ReLU()):
            expected = module(image(*shape))
            swapped_everywhere(module)
            found = module(image(*shape))
            assert found.shape == expected.shape and relative_error(found, expected) < 2e-6


def test_relu_in_place_changes_its_input():
    relu = nn.ReLU(inplace=True)
    ai3.swap_operation("relu", relu, "direct")
    x = image()
    y = relu(x)
    assert y is x and bool((x >= 0).all())


def test_pools_with_indices_are_left_to_torch():
    pool = nn.MaxPool2d(2, return_indices=True)
    expected = pool(image())
    ai3.swap_operation("maxpool2d", pool, "default")
    assert all(torch.equal(a, b) for a, b in zip(pool(image()), expected))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.tied = nn.Conv2d(4, 4, 3, padding=1)
        self.tied.weight = self.first.weight
        self.late = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.tied(self.first(x)))
        return self.late(x) if x.sum() > -1e9 else x


def test_reused_and_shared_modules_and_control_flow():
    for shape in (None, (1, 4, 8, 8)):
        model = Shared()
        expected = model(image(2, 4, 8, 8))
        ai3.swap_operation("conv2d", model, ["direct", "smm", "gemm"], shape)
        assert model.again is model.first and model.tied.weight is model.first.weight
        assert [m.algorithm for m in (model.first, model.tied, model.late)] == ["direct", "smm", "gemm"]
        assert relative_error(model(image(2, 4, 8, 8)), expected) < 2e-5


def test_the_sample_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.drop(self.bn(self.conv(x)))

    model = Counting().train()
    model.drop.eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = ai3.swap_operation("conv2d", model, "default", (2, 3, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))
    assert torch.equal(random, torch.get_rng_state())
    assert (model.training, model.bn.training, model.drop.training) == (True, True, False)
    assert not model.conv._forward_pre_hooks
    (row,) = report
    assert row.name == "conv" and row.input_shape == (2, 3, 8, 8) and row.rejected


def test_functions_get_the_module_and_its_input_shape():
    model, seen = net(), []

    def selector(orig: nn.Conv2d, input_shape) -> str:
        seen.append((orig, tuple(input_shape)))
        return "direct" if orig.weight.shape[0] < 10 and input_shape[1] < 5 else "smm"

    ai3.swap_operation(nn.Conv2d, model, selector, (1, 3, 12, 12))
    assert seen == [(model.conv1, (1, 3, 12, 12)), (model.conv2, (1, 8, 6, 6))]
    assert (model.conv1.algorithm, model.conv2.algorithm) == ("direct", "smm")
    ai3.swap_operation(nn.Conv2d, model, lambda orig: "gemm" if orig.bias is None else "torch")
    assert type(model.conv1) is nn.Conv2d and model.conv2.algorithm == "gemm"


def test_swap_with_a_class_of_the_users_own():
    class Mine(nn.Module):
        def __init__(self, original: nn.Module, algorithm: str) -> None:
            super().__init__()
            self.original, self.algorithm = original, algorithm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.original(x)

    model = Shared()
    expected = model(image(2, 4, 8, 8))
    ai3.swap_operation("conv2d", model, ["direct", "smm", "gemm"], swap_with=Mine)
    assert isinstance(model.first, Mine) and model.again is model.first and model.late.algorithm == "gemm"
    assert torch.equal(model(image(2, 4, 8, 8)), expected)


class Scaled(nn.Conv2d):
    """A subclass that hands the computation on."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Alone(nn.Conv2d):
    """A subclass that computes by itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, self.weight * 3, self.bias)


def test_subclasses_keep_their_forward(caplog):
    model = nn.Sequential(Scaled(4, 4, 3), Alone(4, 4, 3))
    x = image(1, 4, 8, 8)
    expected = model(x)
    with caplog.at_level(logging.WARNING, "ai3_compile"):
        report = ai3.swap_operation("conv2d", model, "direct", (1, 4, 8, 8))
    assert "Alone has a forward of its own" in caplog.text and type(model[1]) is Alone
    assert {row.name: row.algorithm for row in report} == {"0": "direct@cpp", "1": "torch"}
    assert isinstance(model[0], Scaled) and isinstance(model[0], swap_torch.Conv2D)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(twin(x), expected) < 2e-6
    ai3.swap_operation(Scaled, model, "torch")
    assert type(model[0]) is Scaled


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm])
def test_parametrized_modules(wrap):
    torch.manual_seed(0)
    conv = wrap(nn.Conv2d(4, 5, 3)).eval()
    x = image(1, 4, 8, 8)
    expected, keys = conv(x), list(conv.state_dict())
    ai3.swap_operation("conv2d", conv, "direct")
    assert list(conv.state_dict()) == keys and isinstance(conv, swap_torch.Conv2D)
    conv(x).sum().backward()
    assert relative_error(conv(x), expected) < 2e-6
    assert all(p.grad is not None for p in conv.parameters())
    assert relative_error(copy.deepcopy(conv)(x) if wrap is not spectral_norm else conv(x), expected) < 2e-6
    ai3.swap_operation("conv2d", conv, "torch")
    assert not isinstance(conv, swap_torch.Swapped)
    if wrap is parametrizations.weight_norm:
        nn.utils.parametrize.remove_parametrizations(conv, "weight")
        assert type(conv) is nn.Conv2d and relative_error(conv(x), expected) < 2e-6


def test_parametrizations_can_be_removed_while_swapped():
    conv = parametrizations.weight_norm(nn.Conv2d(4, 5, 3))
    expected = conv(image(1, 4, 8, 8))
    ai3.swap_operation("conv2d", conv, "direct")
    nn.utils.parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is swap_torch.Conv2D and relative_error(conv(image(1, 4, 8, 8)), expected) < 2e-6


def test_weights_that_change_are_seen():
    model, x = net(), image()
    ai3.swap_operation("conv2d", model, "winograd|gemm")
    reference = copy.deepcopy(model)
    ai3.swap_operation("conv2d", reference, "torch")
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, fused=True) for m in (model, reference)]
    for _ in range(3):
        for m, optimizer in zip((model, reference), optimizers):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            assert relative_error(model(x), reference(x)) < 1e-4


def test_device_and_dtype_moves():
    model = swapped_everywhere(net())
    x = image(dtype=torch.float64)
    assert relative_error(model.double()(x), net(torch.float64)(x)) < 1e-12
    assert model.to(memory_format=torch.channels_last)(x).dtype == torch.float64


def test_the_constructor_of_aithree():
    conv = nn.Conv2d(3, 4, 3)
    made = swap_torch.Conv2D(conv, "direct", "features.0")
    assert made.weight is conv.weight and made.algorithm == "direct" and type(conv) is nn.Conv2d
    assert relative_error(made(image()), conv(image())) < 2e-6


def _states(model: nn.Module):
    return [(name, type(m), vars(m).get("algorithm")) for name, m in model.named_modules()]


BAD = {
    "no-operation": (errors.UnsupportedCallableError, lambda m: ai3.swap_operation(nn.Conv3d, m), "Unsupported"),
    "name-of-none": (errors.UnsupportedCallableError, lambda m: ai3.swap_operation("con2d", m), "'conv2d'"),
    "no-type": (errors.UnsupportedCallableError, lambda m: ai3.swap_operation(3, m), "Unsupported"),
    "no-module": (errors.ModuleError, lambda m: ai3.swap_operation("conv2d", lambda x: x), "torch.nn.Module"),
    "unknown": (errors.UnknownAlgorithmError, lambda m: ai3.swap_operation("conv2d", m, "wingrad"), "'winograd'"),
    "unknown-in-list": (
        errors.UnknownAlgorithmError,
        lambda m: ai3.swap_operation("conv2d", m, ["direct", "smmm"]),
        "'smm'",
    ),
    "short": (errors.SelectorLengthError, lambda m: ai3.swap_operation("conv2d", m, ["direct"]), "conv2"),
    "no-selector": (errors.SelectorError, lambda m: ai3.swap_operation("conv2d", m, 3), "selector"),
    "no-text": (errors.SelectorError, lambda m: ai3.swap_operation("conv2d", m, lambda op: 3), "got 3"),
    "raises": (errors.SelectorCallError, lambda m: ai3.swap_operation("conv2d", m, lambda op: 1 / 0), "ZeroDivision"),
    "no-shape": (
        errors.SelectorError,
        lambda m: ai3.swap_operation("conv2d", m, lambda op, shape: "direct"),
        "sample_input_shape",
    ),
    "wrong-shape": (
        errors.SampleShapeError,
        lambda m: ai3.swap_operation("conv2d", m, "direct", (1, 4, 12, 12)),
        "to have 3 channels",
    ),
    "no-shape-at-all": (
        errors.SampleShapeError,
        lambda m: ai3.swap_operation("conv2d", m, "direct", ("a",)),
        "sample of shape",
    ),
    "does-not-fit": (
        errors.NothingFitsError,
        lambda m: ai3.swap_operation("conv2d", m, "winograd", (1, 3, 12, 12)),
        "needs stride 1",
    ),
    "fits-no-input": (errors.NothingFitsError, lambda m: ai3.swap_operation("conv2d", m, "winograd"), "whatever"),
    "swap-with-none": (errors.ModuleError, lambda m: ai3.swap_operation("conv2d", m, swap_with=3), "swap_with"),
    "swap-with-no-module": (
        errors.ModuleError,
        lambda m: ai3.swap_operation("conv2d", m, swap_with=lambda o, a: None),
        "NoneType",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_model_as_it_was(case):
    kind, call, words = BAD[case]
    model = net()
    model.conv2.stride = (2, 2)
    ai3.swap_operation("conv2d", model, ["smm", "torch"])
    before, reports = _states(model), len(ai3.reports())
    with pytest.raises(kind) as caught:
        call(model)
    assert words in str(caught.value)
    assert _states(model) == before and len(ai3.reports()) == reports


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(errors.ModuleError, match="meta device"):
        ai3.swap_operation("conv2d", model)
    with pytest.raises(errors.ModuleError, match="not initialised"):
        ai3.swap_operation("conv2d", nn.Sequential(nn.LazyConv2d(3, 3)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_inputs_of_other_dtypes(dtype):
    conv = nn.Conv2d(1, 1, 3, bias=False)
    conv.weight = nn.Parameter(torch.ones(1, 1, 3, 3, dtype=dtype), requires_grad=False)
    x = torch.ones(1, 1, 5, 5, dtype=dtype)
    with pytest.raises(errors.NothingFitsError, match="needs float32 or float64"):
        ai3.swap_operation("conv2d", conv, "direct")
    expected = conv(x)
    ai3.swap_operation("conv2d", conv, "default")
    assert torch.equal(conv(x), expected)
    conv = nn.Conv2d(1, 1, 3)
    ai3.swap_operation("conv2d", conv, "direct")
    with pytest.raises(errors.NothingFitsError, match="needs float32 or float64"):
        conv(x)
    with pytest.raises(RuntimeError, match="different dtypes"):
        conv(x.real.double())


def test_shapes_that_torch_refuses_are_refused_in_its_words():
    model = swapped_everywhere(net())
    plain, refused = net(), []
    for module, shape in itertools.product(("conv1", "maxpool", "avgpool", "head"), ((3, 3), (1, 5, 1, 1))):
        x = image(*shape)
        try:
            expected = getattr(plain, module)(x)
        except (RuntimeError, IndexError) as error:
            with pytest.raises(type(error), match=re.escape(str(error))):
                getattr(model, module)(x)
            refused.append(module)
        else:
            torch.testing.assert_close(getattr(model, module)(x), expected)
    assert set(refused) == {"conv1", "maxpool", "avgpool", "head"}


def test_autocast():
    model, x = net(), image()
    ai3.swap_operation("conv2d", model, "default")
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = net()(x), model(x)
        assert found.dtype == expected.dtype and relative_error(found, expected.double()) < 1e-6
        ai3.swap_operation("conv2d", model, "direct")
        with pytest.raises(errors.NothingFitsError, match="needs float32 or float64"):
            model(x)


# What an adversary found

MODULES = {
    "conv2d": (nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "linear": (nn.Linear(5, 3), (4, 5)),
    "maxpool2d": (nn.MaxPool2d(2), (2, 3, 6, 6)),
    "avgpool2d": (nn.AvgPool2d(2), (2, 3, 6, 6)),
    "adaptiveavgpool2d": (nn.AdaptiveAvgPool2d(2), (2, 3, 6, 6)),
    "relu": (nn.ReLU(), (2, 5)),
    "flatten": (nn.Flatten(), (2, 3, 4)),
}


@pytest.mark.parametrize("operation", SWAPPABLE)
def test_torch_func_and_forward_mode_are_those_of_torch(operation):
    module, shape = MODULES[operation]
    swapped, x, v = copy.deepcopy(module), image(*shape), torch.ones(shape)
    ai3.swap_operation(operation, swapped, "guess")
    for f in (
        lambda m: torch.func.jvp(m, (x,), (v,))[1],
        lambda m: torch.func.grad(lambda x: m(x).square().sum())(x),
        lambda m: torch.func.vmap(m)(x.unsqueeze(1)),
        lambda m: torch.func.jacrev(m)(x[:1]),
    ):
        assert relative_error(f(swapped), f(module)) < 2e-5
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangents = [torch.autograd.forward_ad.unpack_dual(m(dual)).tangent for m in (swapped, module)]
    assert relative_error(*tangents) < 2e-5


@pytest.mark.parametrize(
    "changes",
    [{"padding": (1, 1)}, {"padding": "same"}, {"padding": (0, 2)}, {"stride": 2}, {"dilation": 2}, {"padding": 1}],
    ids=str,
)
def test_attributes_that_are_changed_later_count(changes):
    conv = nn.Conv2d(3, 4, 3)
    ai3.swap_operation("conv2d", conv, "direct")
    for name, value in changes.items():
        setattr(conv, name, value)
    weight, bias = conv.weight, conv.bias
    given = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    assert relative_error(conv(image()), F.conv2d(image(), weight, bias, **given)) < 2e-6


@pytest.mark.parametrize("grad", [True, False])
def test_channels_last_stays_channels_last(grad):
    x = image(2, 4, 8, 8).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad):
        for operation in ("conv2d", "maxpool2d", "avgpool2d"):
            module = {"conv2d": nn.Conv2d(4, 5, 3), "maxpool2d": nn.MaxPool2d(2), "avgpool2d": nn.AvgPool2d(2)}[
                operation
            ]
            expected = module(x)
            ai3.swap_operation(operation, module, "guess")
            found = module(x)
            assert found.stride() == expected.stride() and relative_error(found, expected) < 2e-6


def test_tracers_see_a_swapped_module():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), image()
    expected = model(x)
    ai3.swap_operation("conv2d", model, "direct")
    traced = torch.fx.symbolic_trace(model)
    assert relative_error(traced(x), expected) < 2e-6
    with torch.no_grad():
        assert relative_error(torch.jit.trace(model, x)(x), expected) < 2e-6


def test_what_is_no_tensor_is_refused_in_torchs_words():
    for value in (None, [1.0], "x"):
        conv = nn.Conv2d(3, 4, 3)
        with pytest.raises(TypeError) as expected:
            conv(value)
        ai3.swap_operation("conv2d", conv, "direct")
        with pytest.raises(TypeError, match=re.escape(str(expected.value)[:40])):
            conv(value)


@pytest.mark.parametrize(
    "module",
    [nn.AvgPool2d(2, stride=0), nn.MaxPool2d((2, 2, 2)), nn.AdaptiveAvgPool2d((2, 3, 4)), nn.MaxPool2d(2)],
    ids=str,
)
def test_windows_that_torch_refuses(module):
    x = image(2, 0, 4, 4) if getattr(module, "stride", None) == 2 else image(2, 3, 8, 8)
    with pytest.raises((RuntimeError, TypeError)) as expected:
        module(x)
    swapped_everywhere(module)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value)[:60])):
        module(x)


def test_a_module_that_the_sample_does_not_call_is_said():
    attention = nn.MultiheadAttention(8, 2)  # it uses the weight of out_proj, and never calls the module

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = attention, nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, x, x)[0])

    rows = {row.name: row for row in ai3.swap_operation("linear", Wrapped(), "gemm", (4, 2, 8))}
    assert rows["head"].algorithm == "gemm@cpp"
    assert "the forward pass of the sample does not call it" in rows["attention.out_proj"].why
