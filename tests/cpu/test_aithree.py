"""Programs written for aithree, ai3's predecessor, run: its documented examples as its users wrote them, and its names.

The examples are those of its README and docstrings. Changed are only the sizes of images where nothing but time depends
on them, and that weights are random instead of downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy
import pytest
import torch
from torch import nn

import ai3
import ai3.errors
from ai3.swap_torch import Conv2D
from ai3_compile import zoo
from ai3_compile.backends import builder

pytestmark = pytest.mark.skipif(builder.no_compiler_reason() is not None, reason=str(builder.no_compiler_reason()))

OPERATIONS = ["conv2d", "linear", "relu", "maxpool2d", "avgpool2d", "adaptiveavgpool2d", "flatten", "attention"]


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)

    def forward(self, x):
        return self.conv2(torch.relu(self.conv1(x)))


def auto_selector(orig: torch.nn.Conv2d, input_shape) -> str:
    out_channels = orig.weight.shape[0]
    if (out_channels < 50 and
        input_shape[1] < 50 and
        input_shape[2] > 150 and
        input_shape[3] > 150):  # fmt: skip
        return 'direct'  # fmt: skip
    return 'smm'  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    ai3.FROM_BACKEND = None
    torch._dynamo.reset()


# fmt: off


def test_swap_conv2d_with_a_list():
    input_data = torch.randn(10, 3, 224, 224)
    orig = ConvNet()
    orig_out = orig(input_data)
    ai3.swap_conv2d(orig, ['direct', 'smm'])
    sc_out = orig(input_data)
    assert torch.allclose(orig_out, sc_out, atol=1e-6)
    assert (orig.conv1.algorithm, orig.conv2.algorithm) == ('direct', 'smm')


def test_swap_operation_with_a_list():
    input_data = torch.randn(10, 3, 64, 64)
    orig = ConvNet()
    orig_out = orig(input_data)
    ai3.swap_operation(nn.Conv2d, orig, ['direct', 'smm'])
    so_out = orig(input_data)
    assert torch.allclose(orig_out, so_out, atol=1e-6)


def test_swap_conv2d_with_a_function_and_the_shape_of_an_image_without_a_batch():
    shapes = []

    def conv2d_selector(orig: torch.nn.Conv2d, input_shape) -> str:
        shapes.append(tuple(input_shape))
        out_channels = orig.weight.shape[0]
        if (out_channels < 50 and
            input_shape[0] < 50 and
            input_shape[1] > 150 and
            input_shape[2] > 150):
            return 'direct'
        return 'smm'

    input_data = torch.randn(2, 3, 224, 224)
    orig = ConvNet()
    torch_out = orig(input_data)
    ai3.swap_conv2d(orig, conv2d_selector, (3, 224, 224))
    sc_out = orig(input_data)
    assert torch.allclose(torch_out, sc_out, atol=1e-6)
    assert shapes == [(3, 224, 224), (16, 224, 224)], "shapes of the inputs; aithree passed those of the outputs"


@pytest.mark.parametrize("name", ["swap_backend", "convert"])
def test_vgg16_with_a_function(name):
    input_data = torch.randn(1, 3, 224, 224)
    vgg16 = zoo.load_model("torchvision:vgg16")
    vgg16 = vgg16.eval()
    swap = getattr(ai3, name)
    with torch.inference_mode():
        torch_out = vgg16(input_data)
        model: ai3.Model = swap(vgg16, {"conv2d": auto_selector,
                                        "maxpool2d": "default"},
                                sample_input_shape=(1, 3, 224, 224))
        sb_out = model(input_data)
        assert torch.allclose(torch_out, sb_out, atol=1e-4)
    chosen = {row.name: row.algorithm for row in model.report if row.operation == "conv2d"}
    assert len(chosen) == 13 and set(chosen.values()) == {"smm@cpp"}


# fmt: on


def test_auto_selector_chooses_by_shape():
    model = ai3.swap_backend(ConvNet(), {"conv2d": auto_selector}, (1, 3, 160, 160))
    assert [row.algorithm for row in model.report if row.operation == "conv2d"] == ["direct@cpp", "direct@cpp"]
    model = ai3.swap_backend(ConvNet(), {"conv2d": auto_selector}, (1, 3, 150, 160))
    assert [row.algorithm for row in model.report if row.operation == "conv2d"] == ["smm@cpp", "smm@cpp"]


def test_a_swapped_network_trains_and_compiles():
    orig = ConvNet()
    ai3.swap_conv2d(orig, "direct")
    optimizer = torch.optim.SGD(orig.parameters(), lr=0.1)
    x = torch.randn(2, 3, 16, 16)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = orig(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    with torch.no_grad():
        compiled = torch.compile(orig, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), orig(x), atol=1e-6)


def test_the_names_and_their_types():
    assert ai3.swap_backend is ai3.convert
    assert isinstance(ai3.Model, type) and isinstance(ai3.Tensor, type) and ai3.AlgorithmicSelector is not None
    assert ai3.FROM_BACKEND is None
    assert list(ai3.SUPPORTED_FROM_BACKENDS) == ["torch"] and isinstance(ai3.SUPPORTED_FROM_BACKENDS, Sequence)
    assert isinstance(ai3.DEFAULT_ALGOS, Mapping)
    assert {name: ai3.DEFAULT_ALGOS[name] for name in OPERATIONS} == dict.fromkeys(OPERATIONS, "default")
    assert isinstance(ai3.__version__, str)
    for name in ("using_sycl", "using_cudnn", "using_cublas", "using_mps_and_metal"):
        assert getattr(ai3, name)() is False, "no such platform in ai3 yet"


def test_supported_algorithms():
    supported = ai3.SUPPORTED_ALGORITHMS
    assert isinstance(supported, Mapping) and sorted(supported) == sorted(OPERATIONS)
    known = ["direct", "smm", "winograd", "gemm", "implicit gemm", "implicit precomp gemm", "guess", "default"]
    assert set(known) <= set(supported["conv2d"])
    assert "gemm" in supported["linear"]
    for name in OPERATIONS[2:]:
        assert {"direct", "default"} <= set(supported[name])
    with pytest.raises(KeyError):
        supported["lstm"]
    for algorithm in known:
        orig, x = ConvNet(), torch.randn(1, 3, 12, 12)
        expected = orig(x)
        ai3.swap_conv2d(orig, algorithm)
        assert torch.allclose(expected, orig(x), atol=1e-5)


def test_no_selector_is_default():
    orig, x = ConvNet(), torch.randn(1, 3, 12, 12)
    expected = orig(x)
    assert torch.allclose(ai3.swap_backend(orig)(x), expected, atol=1e-5)
    ai3.swap_conv2d(orig)
    assert orig.conv1.algorithm == "default" and torch.allclose(orig(x), expected, atol=1e-5)


def test_the_swapped_class():
    orig = ConvNet()
    keys = list(orig.state_dict())
    ai3.swap_conv2d(orig, "direct")
    assert type(orig.conv1) is Conv2D and isinstance(orig.conv1, nn.Conv2d) and list(orig.state_dict()) == keys
    conv = nn.Conv2d(3, 4, 3)
    made = Conv2D(conv, "smm", "features.0")
    x = torch.randn(1, 3, 8, 8)
    assert made.algorithm == "smm" and torch.allclose(made(x), conv(x), atol=1e-6)


def test_models_and_tensors():
    x = torch.randn(2, 3, 12, 12)
    orig = ConvNet()
    expected = orig(x)
    model = ai3.swap_backend(orig, {"conv2d": "direct"})
    assert isinstance(model, ai3.Model)
    assert isinstance(model(x), torch.Tensor) and isinstance(model(x.numpy()), numpy.ndarray)
    tensor = model.predict(x)
    assert isinstance(tensor, ai3.Tensor) and tuple(tensor.shape) == (2, 32, 12, 12)
    assert tensor.to(None).torch() is tensor.torch()
    for array in (tensor.numpy(), tensor.to("numpy.ndarray"), model.predict(x, numpy.ndarray), numpy.asarray(tensor)):
        assert isinstance(array, numpy.ndarray) and numpy.allclose(array, expected.detach().numpy(), atol=1e-5)
    for found in (tensor.torch(), tensor.to(torch.Tensor), model.predict(x, "torch.Tensor"), torch.from_dlpack(tensor)):
        assert isinstance(found, torch.Tensor) and torch.allclose(found, expected, atol=1e-5)
    with pytest.raises(ai3.errors.TensorTypeError):
        tensor.to("tensorflow")
    with pytest.raises(TypeError):
        memoryview(tensor)  # type: ignore[arg-type]


def test_the_dtype_of_swap_backend():
    model = ai3.swap_backend(ConvNet(), dtype=torch.float64)
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("swap", [ai3.swap_conv2d, lambda orig, s: ai3.swap_backend(orig, {"conv2d": s})])
def test_a_function_of_the_shape_needs_a_sample(swap):
    with pytest.raises(ai3.errors.SelectorError, match=r"conv2d: .*needs sample_input_shape"):
        swap(ConvNet(), auto_selector)


@pytest.mark.parametrize("swap", [ai3.swap_conv2d, ai3.swap_backend])
def test_from_backend(swap):
    ai3.FROM_BACKEND = "torch"
    swap(ConvNet())
    ai3.FROM_BACKEND = "tensorflow"
    with pytest.raises(ai3.errors.OptionValueError, match="FROM_BACKEND.*torch.*tensorflow"):
        swap(ConvNet())


def test_what_is_not_supported():
    with pytest.raises(ai3.errors.UnsupportedCallableError, match="LSTM"):
        ai3.swap_operation(nn.LSTM, ConvNet(), "direct")
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ai3.errors.UnsupportedCallableError, match="tanh"):
        ai3.convert(other, strict=True, sample_input_shape=(1, 3, 8, 8))
    assert torch.allclose(ai3.swap_backend(other)(x), other(x), atol=1e-6), "in torch, unless strict"
    with pytest.raises(ai3.errors.ModuleError, match="int"):
        ai3.swap_conv2d(3)  # type: ignore[arg-type]
    assert issubclass(ai3.errors.UnsupportedCallableError, ai3.errors.Ai3Error)
    assert sys.modules["ai3.errors"] is ai3.errors and issubclass(ai3.errors.Ai3Error, RuntimeError)
    assert not issubclass(ai3.errors.Ai3Error, AssertionError)


def test_lists():
    orig = ConvNet()
    ai3.swap_conv2d(orig, ["direct", "smm", "direct", "direct"])
    assert orig.conv2.algorithm == "smm"
    with pytest.raises(ai3.errors.SelectorLengthError):
        ai3.swap_conv2d(orig, ["direct"])
