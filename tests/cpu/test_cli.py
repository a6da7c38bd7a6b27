"""The command line, run as a user runs it."""

from __future__ import annotations

import pytest
import torch

from ai3_compile import cli, registry


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out = capsys.readouterr()
    return code, out.out, out.err


def fails():
    raise ValueError("no model today")


def test_a_shape_that_is_none_is_said(capsys):
    with pytest.raises(SystemExit):
        cli.main(["explain", "torchvision:alexnet", "--shape", "big"])
    assert "expected sizes such as 1,3,224,224, got 'big'" in capsys.readouterr().err


def test_list_shows_every_algorithm_and_whether_it_can_run(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    for algorithm in registry.algorithms():
        assert algorithm.qualified in out and algorithm.description in out
    reasons = registry.system().platforms
    assert out.count("can run here") == sum(reasons[a.platform] is None for a in registry.algorithms())


def test_list_says_why_an_algorithm_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr(registry.platforms()["cpp"], "unavailable", lambda: "no C++ compiler")
    _, out, _ = run(capsys, "list")
    assert "cannot run here: no C++ compiler" in out


def test_explain_shows_choices_and_reasons(capsys):
    code, out, _ = run(
        capsys, "explain", "torchvision:resnet18", "--shape", "1,3,32,32", "--option", "conv2d=winograd|default"
    )
    assert code == 0
    assert "layer1.0.conv1" in out and "winograd@cpp" in out and "needs a 3x3 kernel" in out


def test_explain_takes_a_callable_of_the_users_own(capsys):
    code, out, _ = run(capsys, "explain", "tests.cpu.test_backend:block", "--shape", "1x3x16x16")
    assert code == 0 and "conv2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "resnet18"), "expected torchvision:<model> or package.module:callable"),
        (("explain", "torchvision:resnet"), "no such model"),
        (("explain", "no.such.module:f"), "No module named"),
        (("explain", "ai3_compile.testing.harness:GUARD"), "not"),
        (("explain", "torchvision:alexnet", "--shape", "1,3,64,64", "--option", "conv2d=winograd"), "does not fit"),
        (("explain", "torchvision:alexnet", "--shape", "1,3,64,64", "--option", "con=winograd"), "Did you mean"),
        (("explain", "torchvision:alexnet", "--shape", "1,4,64,64"), "does not run on a sample of shape"),
        (("explain", "torchvision:alexnet", "--option", "rest=nonesuch", "--shape", "1,3,64,64"), "'inductor'"),
        (("explain", "tests.cpu.test_cli:fails"), "calling it failed: ValueError: no model today"),
    ],
)
def test_errors_are_one_message_and_exit_1(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 1 and err.startswith("ai3: ") and message in err and "Traceback" not in err


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("torch", "CPU", "compiler", "cache", "core library", "cpp:"):
        assert word in out


def test_doctor_fails_where_a_platform_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr(registry.platforms()["cpp"], "unavailable", lambda: "no C++ compiler")
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "no C++ compiler" in out


def test_cache_path_and_clear(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("AI3_CACHE_DIR", str(tmp_path / "cache"))
    assert run(capsys, "cache", "path")[1].strip() == str(tmp_path / "cache")
    code, out, _ = run(capsys, "cache", "clear")
    assert code == 0 and "removed 0 entries" in out
