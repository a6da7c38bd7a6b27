"""rest="auto": eager where the passes leave few operations to torch, else Inductor; the report says which."""

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import ai3_compile
from ai3_compile import backend
from ai3_compile.errors import StrictError
from ai3_compile.report import store


class Leaves(nn.Module):
    """A convolution, and operations that ai3 has no algorithm for."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.conv, self.count = nn.Conv2d(3, 4, 3), count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        for step in range(self.count):
            x = torch.sin(x) if step % 2 else torch.cos(x)
        return x


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(store, "folder", lambda: tmp_path / "reports")
    torch._dynamo.reset()


@pytest.fixture
def tried(monkeypatch):
    """The ways that were tried, in order."""
    names = []
    for name in ("_with_eager", "_with_inductor"):
        way = getattr(backend, name)

        def note(*args, way=way, name=name):
            names.append(name.removeprefix("_with_"))
            return way(*args)

        monkeypatch.setattr(backend, name, note)
    return names


def rest() -> str:
    (graph,) = ai3_compile.last_report().graphs
    return graph.rest


def run(model, x=None, **given):
    x = torch.randn(2, 3, 8, 8) if x is None else x
    found = torch.compile(model, backend="ai3", **given)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert found.stride() == model(x).stride()
    return found


@pytest.mark.parametrize(
    "count, way",
    [(0, "eager"), (backend._MANY - 1, "eager"), (backend._MANY, "inductor")],
    ids=["nothing", "below the limit", "equal to the limit"],
)
def test_few_operations_run_in_eager_and_many_by_inductor(tried, count, way):
    with torch.no_grad():
        run(Leaves(count))
    assert tried == ["eager", "inductor"][: 1 if way == "eager" else 2]
    said = {"eager": f"eager PyTorch ({count} operation{'s' * (count != 1)})", "inductor": "Inductor"}[way]
    assert rest() == said and str(ai3_compile.last_report()).endswith(f"everything else runs in {said}")


def test_what_inductor_has_compiled_before_goes_there_at_once(tried):
    model = Leaves(backend._MANY)
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            run(model)
        assert rest() == "Inductor"
    assert tried == ["eager", "inductor", "inductor"]


def test_training_and_a_mode_are_inductors(tried):
    model, x = Leaves(0), torch.randn(2, 3, 8, 8)
    run(model).sum().backward()
    assert model.conv.weight.grad is not None and rest() == "Inductor"
    torch._dynamo.reset()
    with torch.no_grad():
        run(model, x, mode="max-autotune-no-cudagraphs")
    assert rest() == "Inductor" and tried == ["inductor", "inductor"]


def test_a_users_pass_for_inductor_is_not_passed_over(tried):
    class Count(CustomGraphPass):
        graphs = 0

        def __call__(self, graph):
            Count.graphs += 1

        def uuid(self):
            return None

    with torch.no_grad(), inductor_config.patch(post_grad_custom_post_pass=Count()):
        run(Leaves(0))
    assert Count.graphs == 1 and tried == ["inductor"]


def test_a_dynamic_batch_runs_in_eager_too():
    model = Leaves(2)
    f = torch.compile(model, backend="ai3", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 1):
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-5)
    assert rest().startswith("eager PyTorch")


def test_an_error_of_the_passes_is_raised_and_nothing_else_is_tried(tried):
    with torch.no_grad(), pytest.raises(Exception) as caught:
        run(Leaves(0), options={"strict": True}, x=torch.randn(2, 3, 8, 8, dtype=torch.complex64))
    assert isinstance(caught.value, (StrictError, RuntimeError)) and "inductor" not in tried


@pytest.mark.parametrize("inside", [True, False])
def test_weights_made_in_inference_mode_are_said_to_be_packed_at_every_call(inside, caplog):
    backend._say_once.cache_clear()
    with torch.inference_mode(inside):
        model = nn.Conv2d(3, 4, 3)
    with torch.inference_mode():
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(torch.compile(model, backend="ai3")(x), model(x), rtol=1e-4, atol=1e-5)
    assert any("packed anew at every call" in message for message in caplog.messages) == inside
