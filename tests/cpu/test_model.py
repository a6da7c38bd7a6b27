"""convert and Model: the numbers of eager, every kind of input, copies, and files that other processes read.

Bound: 2e-5 of the outputs' norm, as in test_swap.py; deep networks as in test_networks.py.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import ai3
from ai3_compile import archive, core, errors, registry, zoo
from ai3_compile.report import GraphReport, history
from ai3_compile.testing.references import relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 36, 5)
        self.drop = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn(self.conv1(x)))
        y = torch.relu(self.conv2(y) + y)
        return self.head(self.drop(torch.flatten(self.pool(y), 1)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if y.sum() > 0:
            y = -y
        return self.b(y)


SHAPE = (1, 3, 12, 12)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def image(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(*(shape or SHAPE), dtype=dtype)


def eager(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def chosen(model: ai3.Model) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(row.operation, row.name, row.algorithm, tuple(row.fused)) for row in model.report]


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "squeezenet1_1", "shufflenet_v2_x0_5"])
def test_networks_give_the_numbers_of_eager(name, tmp_path):
    network, x = zoo.load_model(f"torchvision:{name}"), image(2, 3, 64, 64)
    expected = eager(network, x)
    model = ai3.convert(network, {"conv2d": "winograd|default"}, (1, 3, 64, 64))
    assert model.capture == "torch.export" and relative_error(model(x), expected) < 1e-4
    assert any("winograd" in row.algorithm for row in model.report)
    model.save(tmp_path / "m.ai3")
    assert torch.equal(ai3.load(tmp_path / "m.ai3")(x), model(x))


@pytest.mark.parametrize("shape", [SHAPE, (4, 3, 12, 12), None])
def test_any_batch_and_no_batch(shape):
    network = net()
    model = ai3.convert(network, {}, shape)
    for batch in (1, 2, 7, 0):
        x = image(batch, 3, 12, 12)
        assert relative_error(model(x), eager(network, x)) < 2e-5 and model(x).shape == (batch, 5)
    x = image(3, 12, 12)
    assert relative_error(model(x), eager(network, x[None])[0]) < 2e-5 and model(x).shape == (5,)
    assert len(model.report.graphs) == 1


def test_decisions_are_made_for_the_batch_of_the_sample():
    for batch in (1, 9):
        model = ai3.convert(net(), {}, (batch, 3, 12, 12))
        assert {row.input_shape[0] for row in model.report} == {batch}


def test_another_size_of_image_is_another_capture():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2))
    model = ai3.convert(network, {"conv2d": "direct"}, SHAPE)
    for size in (12, 16):
        x = image(2, 3, size, size)
        assert relative_error(model(x), eager(network, x)) < 2e-5
    assert len(model.report.graphs) == 2


def test_inputs_and_outputs_of_every_type():
    network, x = net(), image()
    model, expected = ai3.convert(network, {}, SHAPE), eager(network, x)
    assert isinstance(model(x), torch.Tensor) and isinstance(model(x.numpy()), np.ndarray)
    ours = model.predict(x)
    assert isinstance(ours, ai3.Tensor) and isinstance(
        model(ours if ours.shape == SHAPE else ai3.Tensor(x)), ai3.Tensor
    )
    assert ours.shape == (1, 5) and ours.dtype == torch.float32 and ours.torch().data_ptr() == ours.numpy().ctypes.data
    for out_type in (np.ndarray, "numpy", "numpy.ndarray"):
        assert np.allclose(model.predict(x, out_type), expected.numpy(), atol=1e-5)
    for out_type in (torch.Tensor, "torch", "torch.Tensor"):
        assert relative_error(model.predict(x.numpy(), out_type=out_type), expected) < 2e-5
    assert np.allclose(np.asarray(ours), expected, atol=1e-5) and torch.equal(torch.from_dlpack(ours), ours.torch())
    assert np.array_equal(np.from_dlpack(ours), ours.numpy()) and torch.equal(ours.to("torch"), ours.torch())
    assert model.predict(x.numpy()[:, ::-1]).shape == (1, 5)


def test_arrays_are_not_copied():
    array = np.ones(SHAPE, np.float32)
    array.flags.writeable = False
    assert ai3.model.to_torch(array).data_ptr() == array.ctypes.data

    class Dlpack:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **keywords):
            return self.tensor.__dlpack__(**keywords)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    x = image()
    assert ai3.model.to_torch(Dlpack(x)).data_ptr() == x.data_ptr()
    assert isinstance(ai3.convert(net(), {}, SHAPE).predict(Dlpack(x)), ai3.Tensor)


def test_converting_in_inference_mode_keeps_what_is_packed():
    """As aithree's users do it: weights copied there would be inference tensors, and packed at every call."""
    network, x = net(), image()
    with torch.inference_mode():
        model = ai3.convert(network, {"conv2d": "winograd"}, SHAPE)
        expected = network(x)
        assert relative_error(model(x), expected) < 2e-5
        made = core.load().ai3_core_packs_made()
        assert relative_error(model(x), expected) < 2e-5 and core.load().ai3_core_packs_made() == made
    lazy = ai3.convert(network)
    with torch.inference_mode():
        assert relative_error(lazy(torch.ones(SHAPE)), network(torch.ones(SHAPE))) < 2e-5


def test_structured_outputs():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor):
            y = self.conv(x)
            return {"y": y, "rest": (y.mean((1, 2, 3)), 3)}

    network, x = Many(), image()
    out = ai3.convert(network, {}, SHAPE)(x.numpy())
    assert isinstance(out["y"], np.ndarray) and out["rest"][1] == 3
    assert np.allclose(out["y"], eager(network, x)["y"].numpy(), atol=1e-5)


def test_buffers_that_the_network_changes_are_the_models_own():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.conv(x) + self.calls

    network, x = Counting(), image()
    model = ai3.convert(network, {}, SHAPE)
    twin = copy.deepcopy(model)
    first, second = model(x), model(x)
    assert torch.allclose(second - first, torch.ones(()), atol=1e-5) and network.calls == 0
    assert torch.allclose(twin(x), first)


def test_the_network_stays_as_it_is():
    network = net().train()
    before = copy.deepcopy(network.state_dict())
    model = ai3.convert(network, {}, SHAPE, dtype=torch.float64)
    x = image(dtype=torch.float64)
    assert network.training and all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values()))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    assert relative_error(model(x), eager(net().double(), x)) < 1e-12
    with torch.no_grad():
        network.conv1.weight.zero_()
    assert relative_error(model(x), eager(net().double(), x)) < 1e-12
    assert not model(x.clone().requires_grad_()).requires_grad


def test_copies():
    model, x = ai3.convert(net(), {"conv2d": lambda op: "gemm"}, SHAPE), image()
    expected = model(x)
    twins = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    for weight in model._weights.values():
        weight.data.zero_()
    ai3.invalidate()
    for name, twin in twins.items():
        assert torch.equal(twin(x), expected) and chosen(twin) == chosen(model), name
    fresh = pickle.loads(pickle.dumps(ai3.convert(net(), {"conv2d": "gemm"})))
    assert relative_error(fresh(x), expected) < 2e-5


def test_a_swapped_network_can_be_converted():
    network, x = net(), image()
    expected = eager(network, x)
    ai3.swap_operation("conv2d", network, ["smm", "gemm"])
    model = ai3.convert(network, {}, SHAPE)
    assert relative_error(model(x), expected) < 2e-5
    assert [row[2] for row in chosen(model) if row[0] == "conv2d"] == ["smm@cpp", "gemm@cpp"]
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_selectors():
    seen = []

    def selector(orig: nn.Conv2d, input_shape) -> str:
        seen.append((type(orig), orig.weight.shape, tuple(input_shape)))
        return "direct" if orig.in_channels == 3 else "smm"

    network = net()
    model = ai3.convert(network, {"conv2d": selector, "maxpool2d": "default"}, SHAPE)
    assert seen == [(nn.Conv2d, (8, 3, 3, 3), SHAPE), (nn.Conv2d, (8, 8, 3, 3), (1, 8, 12, 12))]
    assert [row[2] for row in chosen(model) if row[0] == "conv2d"] == ["direct@cpp", "smm@cpp"]
    model = ai3.convert(network, {"conv2d": ["gemm", "direct", "smm"]}, SHAPE)
    assert [row[2] for row in chosen(model) if row[0] == "conv2d"] == ["gemm@cpp", "direct@cpp"]


def test_what_is_not_ai3s_runs_in_torch_and_strict_lists_it():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Upsample(scale_factor=2), nn.ReLU())
    x = image()
    assert relative_error(ai3.convert(network, {}, SHAPE)(x), eager(network, x)) < 2e-5
    with pytest.raises(errors.UnsupportedCallableError) as caught:
        ai3.convert(network, {}, SHAPE, strict=True)
    assert "aten.softplus.default in 1" in str(caught.value) and "upsample" in str(caught.value)
    assert "conv2d" not in str(caught.value)
    half = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).bfloat16()
    with pytest.raises(errors.UnsupportedCallableError) as caught:
        ai3.convert(half, {}, SHAPE, strict=True)
    own = [algorithm for algorithm in registry.of_operation("conv2d") if algorithm.platform == "cpp"]
    assert str(caught.value).count("needs float32 or float64") == 2 * len(own)
    model = ai3.convert(net(), {}, SHAPE, strict=True)
    assert "torch" not in {row.algorithm for row in model.report} and relative_error(model(x), eager(net(), x)) < 2e-5


def test_control_flow_that_depends_on_data_is_captured_by_torch_compile(caplog, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(history, "_LIMIT", 2)  # as in a process that has compiled much
    for _ in range(2):
        history.add(GraphReport(), continues=False)
    network, x = Branching(), image(2, 3, 12, 12)
    with caplog.at_level(logging.WARNING, "ai3_compile"):
        model = ai3.convert(network, {"conv2d": ["direct", "smm"]}, SHAPE)
    assert "torch.export cannot capture the model" in caplog.text and "if y.sum() > 0" in caplog.text
    assert model.capture.startswith("torch.compile, since torch.export cannot")
    for factor in (1, -1):
        assert relative_error(model(factor * x), eager(network, factor * x)) < 2e-5
    assert {(row.name.rpartition(".")[2], row.algorithm) for row in model.report} >= {("a", "direct@cpp")}
    with pytest.raises(errors.ModuleError, match="only a model captured by torch.export can be saved"):
        model.save(tmp_path / "m.ai3")
    assert not (tmp_path / "m.ai3").exists()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(twin(x), eager(network, x)) < 2e-5


# Files


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.ai3"
    model = ai3.convert(net(), {"conv2d": ["winograd", "default"]}, SHAPE)
    model.save(path)
    return path, model


def edited(path, **changes):
    """The file with metadata and members replaced: a function gets what is there."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    for name, change in changes.items():
        name = {"metadata": "metadata.json", "graph": "graph_0.json"}.get(name, name)
        members[name] = json.dumps(change(json.loads(members[name]))).encode()
    other = path.with_name("edited.ai3")
    with zipfile.ZipFile(other, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return other


def test_a_file_holds_what_it_says(saved):
    path, model = saved
    with zipfile.ZipFile(path) as file:
        assert set(file.namelist()) == {"metadata.json", "weights.safetensors", "graph_0.json"}
        metadata = json.loads(file.read("metadata.json"))
    rows = metadata["programs"][0]["rows"]
    assert [row["algorithm"] for row in rows if row["operation"] == "conv2d"] == [
        row.chosen for row in model.report if row.operation == "conv2d"
    ]
    assert all(len(row["digest"]) == 64 for row in rows if row["algorithm"] != "torch")
    assert ai3.load(path).report.rows[0].why == "as saved; asked for 'winograd'"


def test_another_process_reads_it_and_builds_nothing(saved, tmp_path):
    path, model = saved
    x = image(3, 3, 12, 12)
    torch.save((x, model(x)), tmp_path / "xy.pt")
    program = (
        "import sys, torch, ai3\n"
        "from ai3_compile.backends import builder\n"
        "def refuse(*a): raise SystemExit('built')\n"
        "builder._compile = refuse\n"
        "x, y = torch.load(sys.argv[2])\n"
        "m = ai3.load(sys.argv[1])\n"
        "assert torch.equal(m(x), y) and torch.equal(m(x[0]), m(x)[0]) or (m(x) - y).abs().max() < 1e-5\n"
        "print([r.algorithm for r in m.report])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / "xy.pt")], capture_output=True, text=True, timeout=300
    )
    assert ran.stdout.strip() == str([row.algorithm for row in model.report]), ran.stderr


def test_another_process_reads_a_swapped_networks_model(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    ai3.swap_operation("conv2d", network, "direct")
    ai3.convert(network, {}, SHAPE).save(tmp_path / "m.ai3")
    program = "import sys, torch, ai3; print(ai3.load(sys.argv[1])(torch.ones(2, 3, 12, 12)).shape)"
    ran = subprocess.run([sys.executable, "-c", program, str(tmp_path / "m.ai3")], capture_output=True, text=True)
    assert ran.stdout.strip() == "torch.Size([2, 4, 10, 10])", ran.stderr


def test_tied_weights_are_kept_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + torch.arange(64.0)

    network = Tied()
    model = ai3.convert(network, {}, (2, 64))
    model.save(tmp_path / "tied.ai3")
    assert (tmp_path / "tied.ai3").stat().st_size < 64 * 64 * 4 * 1.9
    assert torch.equal(ai3.load(tmp_path / "tied.ai3")(torch.ones(3, 64)), model(torch.ones(3, 64)))


def test_an_input_of_another_shape_than_saved(saved):
    with pytest.raises(errors.InputError, match="takes inputs of Nx3x12x12 torch.float32, not 1x3x16x16"):
        ai3.load(saved[0])(image(1, 3, 16, 16))


def test_another_cpu_chooses_again_what_the_policy_chose(saved, caplog):
    path = edited(saved[0], metadata=lambda m: {**m, "cpu": "another", "torch": "2.99"})
    with caplog.at_level(logging.WARNING, "ai3_compile"):
        model = ai3.load(path)
    assert "CPU: another then" in caplog.text and "torch: 2.99 then" in caplog.text
    assert "conv2d conv2: chosen again by 'default' for this CPU" in caplog.text and "conv1" not in caplog.text
    assert [row.chosen for row in model.report] == [row.chosen for row in saved[1].report]
    assert relative_error(model(image()), eager(net(), image())) < 2e-5


def test_a_changed_kernel_chooses_its_rows_again(saved, caplog):
    def change(metadata):
        for row in metadata["programs"][0]["rows"]:
            row["digest"] = "0" * 64 if row["name"] == "conv1" and row["digest"] else row["digest"]
        return metadata

    with caplog.at_level(logging.WARNING, "ai3_compile"):
        model = ai3.load(edited(saved[0], metadata=change))
    assert "conv2d conv1: winograd@cpp has changed, chosen again by 'winograd'" in caplog.text
    assert "conv2 " not in caplog.text and chosen(model) == chosen(saved[1])


def test_a_saved_algorithm_of_the_users_must_be_registered(tmp_path):
    ai3.register_algorithm("relu", "mine", lambda x: torch.relu(x))
    try:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        ai3.convert(network, {"relu": "mine"}, SHAPE).save(tmp_path / "m.ai3")
        assert ai3.load(tmp_path / "m.ai3").report.rows[-1].algorithm == "mine@python"
    finally:
        ai3.unregister_algorithm("relu", "mine")
    with pytest.raises(errors.UnknownAlgorithmError, match="'mine'"):
        ai3.load(tmp_path / "m.ai3")


def test_damaged_files_are_refused(saved, tmp_path):
    content = saved[0].read_bytes()
    bad = tmp_path / "bad.ai3"
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:size])
        with pytest.raises(errors.ArchiveError, match="bad.ai3 is no model that ai3 can read"):
            ai3.load(bad)
    for place in range(200, len(content), len(content) // 7):
        bad.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with pytest.raises(errors.ArchiveError):
            ai3.load(bad)
    with pytest.raises(FileNotFoundError):
        ai3.load(tmp_path / "none.ai3")


EDITS = {
    "format": (lambda m: {**m, "format": 99}, None, "its format is 99"),
    "no-programs": (lambda m: {k: v for k, v in m.items() if k != "programs"}, None, "KeyError"),
    "no-rows": (lambda m: {**m, "programs": [{**m["programs"][0], "rows": 3}]}, None, "TypeError"),
    "cuda": (lambda m: {**m, "programs": [{**m["programs"][0], "device": "cuda"}]}, None, "model on cuda"),
    "dtype": (lambda m: {**m, "programs": [{**m["programs"][0], "dtype": "nonesuch"}]}, None, "AttributeError"),
    "a-list": (lambda m: [m], None, "TypeError"),
    "calls-python": (None, ("torch.ops.aten.relu.default", "torch.os.system"), "torch.os.system"),
    "calls-a-method": (None, ("torch.ops.aten.relu.default", "torch.ops.__class__.mro.x"), "no operation"),
    "expression": (None, ("Symbol('s", "__import__('os').system('s"), "no expression of sizes"),
    "expression-of-words": (None, ("Symbol('s", "exec('s"), "no expression of sizes"),
}


@pytest.mark.parametrize("case", EDITS)
def test_files_that_were_tampered_with_are_refused(case, saved):
    change, replaced, words = EDITS[case]
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    if replaced is not None:
        path = edited(saved[0], graph=lambda g: json.loads(json.dumps(g).replace(*replaced)))
    else:
        path = edited(saved[0], metadata=change)
    with pytest.raises(errors.ArchiveError, match=words):
        ai3.load(path)


def test_loading_unpickles_nothing(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert ai3.load(saved[0])(image()).shape == (1, 5)


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(archive, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_saving_to_a_buffer():
    model, buffer = ai3.convert(net(), {}, SHAPE), io.BytesIO()
    model.save(buffer)
    assert torch.equal(archive.load_bytes(buffer.getvalue())(image()), model(image()))


def test_moving_to_a_device_chooses_again():
    model = ai3.convert(net(), {"conv2d": "smm"}, SHAPE)
    before = model(image())
    assert model.to("cpu") is model and torch.equal(model(image()), before)
    loaded = pickle.loads(pickle.dumps(model)).to(torch.device("cpu"))
    assert torch.equal(loaded(image()), before) and chosen(loaded) == chosen(model)


BAD = {
    "no-module": (errors.ModuleError, lambda: ai3.convert(lambda x: x), "torch.nn.Module"),
    "algos": (errors.OptionValueError, lambda: ai3.convert(net(), "direct"), "a dict"),
    "operation": (errors.UnknownOperationError, lambda: ai3.convert(net(), {"conv": "direct"}), "'conv2d'"),
    "algorithm": (errors.UnknownAlgorithmError, lambda: ai3.convert(net(), {"conv2d": "wino"}), "winograd"),
    "short": (errors.SelectorLengthError, lambda: ai3.convert(net(), {"conv2d": ["smm"]}, SHAPE), "conv2"),
    "no-shape": (
        errors.SelectorError,
        lambda: ai3.convert(net(), {"conv2d": lambda a, b: "smm"}),
        "sample_input_shape",
    ),
    "raises": (errors.SelectorCallError, lambda: ai3.convert(net(), {"conv2d": lambda a: 1 / 0}, SHAPE), "ZeroDiv"),
    "number": (errors.SelectorError, lambda: ai3.convert(net(), {"conv2d": lambda a: 3}, SHAPE), "got 3"),
    "shape": (errors.SampleShapeError, lambda: ai3.convert(net(), {}, (1, 3, 13)), "does not run on a sample"),
    "dtype": (errors.OptionValueError, lambda: ai3.convert(net(), {}, SHAPE, dtype="float"), "floating-point"),
    "integers": (errors.OptionValueError, lambda: ai3.convert(net(), {}, SHAPE, dtype=torch.int8), "floating-point"),
    "strict": (errors.OptionValueError, lambda: ai3.convert(net(), {}, SHAPE, strict=1), "True or False"),
    "meta": (errors.ModuleError, lambda: ai3.convert(net().to("meta")), "meta device"),
    "fits-not": (
        errors.NothingFitsError,
        lambda: ai3.convert(nn.Conv2d(3, 3, 4), {"conv2d": "winograd"}, SHAPE),
        "3x3",
    ),
    "input-dtype": (errors.InputError, lambda: ai3.convert(net(), {}, SHAPE)(image().double()), "dtype=torch.float64"),
    "input-complex": (errors.InputError, lambda: ai3.convert(net(), {}, SHAPE)(image().cfloat()), "complex64"),
    "input-list": (errors.TensorTypeError, lambda: ai3.convert(net(), {}, SHAPE)([1.0]), "builtins.list"),
    "input-text": (errors.TensorTypeError, lambda: ai3.convert(net(), {}, SHAPE)(np.array(["a"])), "NumPy array"),
    "output": (errors.TensorTypeError, lambda: ai3.convert(net(), {}, SHAPE).predict(image(), list), "list"),
    "unsaved": (errors.ModuleError, lambda: ai3.convert(net()).save("x.ai3"), "not captured yet"),
    "load-number": (TypeError, lambda: ai3.load(3), "int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    kind, call, words = BAD[case]
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)


def test_a_file_of_another_users_algorithm_id_in_the_graph(tmp_path):
    """A swapped module's algorithm is in the graph itself; where it is not registered, loading says so."""
    ai3.register_algorithm("relu", "mine", lambda x: torch.relu(x))
    try:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        ai3.swap_operation("relu", network, "mine")
        ai3.convert(network, {}, SHAPE).save(tmp_path / "m.ai3")
    finally:
        ai3.unregister_algorithm("relu", "mine")
    registry._by_id.clear()
    with pytest.raises(errors.AlgorithmError, match="not registered"):
        ai3.load(tmp_path / "m.ai3")


def test_without_a_compiler_everything_is_torchs(tmp_path):
    program = (
        "import torch, ai3\n"
        "net, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)\n"
        "expected = net(x)\n"
        "model = ai3.convert(net, {}, (1, 3, 8, 8))\n"
        "print(torch.equal(model(x), expected), {r.algorithm for r in model.report})\n"
        "ai3.swap_operation('conv2d', net); print(torch.equal(net(x), expected))\n"
        "try: ai3.swap_operation('conv2d', net, 'direct')\n"
        "except ai3.errors.NothingFitsError as error: print('there is no C++ compiler' in str(error))\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "AI3_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.stdout.splitlines() == ["True {'torch'}", "True", "True"], ran.stderr


# What an adversary found


class OneOrMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.many = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.shape[0] == 1 else self.many(x)


@pytest.mark.parametrize("first", [1, 2])
def test_a_branch_on_a_batch_of_one_is_taken(first):
    network = OneOrMany().eval()
    model = ai3.convert(network, {}, (first, 3, 12, 12))
    for batch in (1, 2, 3, 1):
        x = image(batch, 3, 12, 12)
        assert relative_error(model(x), eager(network, x)) < 2e-5
    loaded = pickle.loads(pickle.dumps(model))
    for batch in (1, 2):
        assert relative_error(loaded(image(batch, 3, 12, 12)), eager(network, image(batch, 3, 12, 12))) < 2e-5


def test_autocast_does_not_reach_into_a_model():
    network, x = net(), image()
    model = ai3.convert(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32 and relative_error(model(x), net()(x).double()) < 2e-2
    assert relative_error(model(x), eager(network, x)) < 2e-5


def test_three_dimensions_are_the_networks_to_read():
    class Spectrograms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.unsqueeze(1)).mean((2, 3))

    network = Spectrograms().eval()
    for model in (ai3.convert(network), ai3.convert(network, {}, (5, 8, 9))):
        for batch in (1, 4, 5):
            x = image(batch, 8, 9)
            assert relative_error(model(x), eager(network, x)) < 2e-5 and model(x).shape == (batch, 4)
    plain = nn.Conv2d(3, 4, 3)
    assert relative_error(ai3.convert(plain, {}, SHAPE)(image(3, 9, 9)), eager(plain, image(3, 9, 9))) < 2e-5


@pytest.mark.parametrize("first", ["contiguous", "channels_last"])
def test_inputs_of_other_strides(first):
    network, x = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)).eval(), image(2, 3, 6, 6)
    layouts = [x, x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :1].expand(2, 3, 6, 6)]
    model = ai3.convert(network)
    for given in layouts if first == "contiguous" else layouts[::-1]:
        assert relative_error(model(given), eager(network, given)) < 2e-5


def test_memory_that_is_not_to_be_written_is_not():
    array = -np.ones(SHAPE, np.float32)
    array.flags.writeable = False
    frozen = np.frombuffer(array.tobytes(), np.float32).reshape(SHAPE)
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)).eval()
    model = ai3.convert(network, {}, SHAPE)
    for given in (array, frozen):
        model(given)
        assert (given == -1).all()
    tensor = -torch.ones(SHAPE)
    model(tensor)
    assert bool((tensor == 0).all())  # as eager does


def test_a_bad_input_does_not_spoil_a_model(tmp_path):
    model = ai3.convert(nn.Conv2d(3, 4, 3))
    model(image())
    with pytest.raises(errors.InputError, match="expected input.*to have 3 channels"):
        model(image(1, 4, 9, 9))
    assert model.capture == "torch.export" and "Nx4" not in repr(model)
    model.save(tmp_path / "m.ai3")


def test_what_a_file_cannot_hold_is_refused_when_it_is_saved(tmp_path):
    class Named(nn.Module):
        def forward(self, x: torch.Tensor):
            return x * 2, "label"

    model = ai3.convert(Named(), {}, (2, 3))
    assert model(torch.ones(2, 3))[1] == "label"
    with pytest.raises(errors.ModuleError, match="returns 'label' beside tensors"):
        model.save(tmp_path / "m.ai3")
    assert not list(tmp_path.iterdir())


def test_threads_share_a_model():
    network = net()
    model = ai3.convert(network)
    inputs = [image(batch, 3, 12, 12) for batch in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        for x, found in zip(inputs, pool.map(model, inputs)):
            assert relative_error(found, eager(network, x)) < 2e-5
    assert model.capture == "torch.export"


def test_a_forward_that_casts_its_input():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.double())

    network = Casting().eval()
    assert relative_error(ai3.convert(network)(image()), eager(network, image())) < 1e-12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_the_projections_of_attention_are_linears_of_any_batch():
    """Their input is a transposed view: PyTorch's rule for a dynamic batch makes a batch of products of them."""
    network, x = Attention().eval(), torch.randn(3, 5, 8)
    model = ai3.convert(network, sample_input_shape=(2, 5, 8))
    with torch.no_grad():
        for sample in (x, x[:1], x[:2]):
            torch.testing.assert_close(model(sample), network(sample), rtol=1e-5, atol=1e-6)
    assert [row.algorithm for row in model.report if row.operation == "linear"] == ["gemm@cpp"] * 2
