"""The process that searches for plans, played by one that needs no GPU: what it finds, and what its end costs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from ai3_compile.backends import cudnn_search

# Answers as the real one does. The call's name says what happens.
PLAYER = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    name, skip = request["call"][0], request["skip"]
    def answer(**fields):
        print(json.dumps(fields), flush=True)
    if name == "breaks":
        print("no GPU here", file=sys.stderr, flush=True)
        sys.exit(3)
    for plan in ("first", "second"):
        if plan in skip:
            continue
        answer(trying=plan)
        if (name, plan) == ("faults", "first") or name == "always faults":
            print("an illegal memory access", file=sys.stderr, flush=True)
            os._exit(1)
    if name == "errs" and not skip:
        answer(wrong="first", how="its result is wrong by 0.5")
    elif name == "fails" or len(skip) == 2:
        answer(failed="no plan runs")
    else:
        answer(key=f"key of {name}", plan=f"plan {os.getpid()}")
    answer(done=True)
"""


@pytest.fixture
def worker():
    made = cudnn_search._Worker([sys.executable, "-c", PLAYER])
    yield made
    made.stop()


def search(worker, name, tmp_path):
    return worker.search((name, []), [0, 0, 0, -1], tmp_path / f"{name}.json")


def test_one_process_serves_one_search_after_another(worker, tmp_path):
    found = [search(worker, name, tmp_path) for name in ("a", "b", "fails", "c")]
    assert [[key for key, _ in plans] for plans in found] == [["key of a"], ["key of b"], [], ["key of c"]]
    assert len({plan for plans in found for _, plan in plans}) == 1
    for name in ("a", "b", "c"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["key"] == f"key of {name}"
    assert not (tmp_path / "fails.json").exists()


def test_a_search_in_vain_is_said(worker, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(cudnn_search, "_MOST_LEFT_OUT", 1)
    assert search(worker, "errs", tmp_path) == []
    assert "cuDNN's own choice is taken for errs: 1 plans were left out" in caplog.text


def test_a_plan_that_ends_the_process_is_left_out_and_said(worker, tmp_path, caplog):
    ((before, plan),) = search(worker, "a", tmp_path)
    ((key, other),) = search(worker, "faults", tmp_path)
    assert key == "key of faults" and other != plan
    assert "the plan first is left out" in caplog.text and "an illegal memory access" in caplog.text


def test_a_plan_of_wrong_results_is_left_out_and_said(worker, tmp_path, caplog):
    ((key, _),) = search(worker, "errs", tmp_path)
    assert key == "key of errs" and json.loads((tmp_path / "errs.json").read_text())["key"] == key
    assert "the plan first is left out: its result is wrong by 0.5" in caplog.text


def test_plans_that_all_end_it_are_given_up(worker, tmp_path, caplog):
    assert search(worker, "always faults", tmp_path) == []
    assert "first is left out" in caplog.text and "second is left out" in caplog.text
    ((key, _),) = search(worker, "a", tmp_path)
    assert key == "key of a"


def test_a_process_that_cannot_start_is_said(worker, tmp_path, caplog):
    assert search(worker, "breaks", tmp_path) == []
    assert "the process that searches for plans ended: no GPU here" in caplog.text


def test_a_damaged_plan_is_searched_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cudnn_search, "folder", lambda: tmp_path)
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text(json.dumps({"key": "k", "plan": "p"}))
    assert list(cudnn_search.stored()) == [("k", "p")]
    assert "a.json is damaged" in caplog.text


def test_calls_that_run_the_same_plan_share_what_is_found(monkeypatch):
    """A folded batch norm comes to a plan as a bias; weights that are packed once, and defaults, make no difference."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    image, weight = (
        ["input", "like", [2, 4, 8, 8], [256, 1, 32, 4], "float16"],
        ["weight", "like", [6, 4, 3, 3], [], "float16"],
    )
    vector = ["like", [6], [1], "float16"]
    measured = [image, weight, ["bias", *vector], ["stride", "value", [1, 1]], ["activation", "value", 1]]
    norm = [[name, *vector] for name in ("bn_weight", "bn_bias", "bn_mean", "bn_var")]
    in_graph = [image, weight, ["bias", "value", None], *measured[3:], ["static_weight", "value", True], *norm]
    paths = {
        cudnn_search._path(("conv2d", call), [0, 0, 0, -1])
        for call in (measured, [*in_graph, ["algorithm", "value", 7]])
    }
    assert len(paths) == 1
    for other in (measured[:-1], [image, weight, *measured[3:]], [*measured, ["residual", *image[1:]]]):
        assert cudnn_search._path(("conv2d", other), [0, 0, 0, -1]) not in paths


def in_tf32(tensor: torch.Tensor, rounds: bool) -> torch.Tensor:
    bits = tensor.view(torch.int32) + (0x1000 if rounds else 0)
    return (bits & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("depth", [3, 9, 25, 576])
def test_what_a_plan_of_tf32_does_with_the_last_bits(depth):
    """Few terms, as of a depthwise window, and many; numbers as the search has them."""
    torch.manual_seed(0)
    x, w = (torch.empty(shape).uniform_(0.1, 1) for shape in ((2000, depth), (depth, 24)))
    right = x @ w
    assert cudnn_search.fault(in_tf32(x, True) @ in_tf32(w, True), right, tf32=True) is None
    assert cudnn_search.fault(x @ w, right, tf32=True) is None
    for one, other in ((False, False), (False, True), (True, False)):
        said = cudnn_search.fault(in_tf32(x, one) @ in_tf32(w, other), right, tf32=True)
        assert said is not None and "cuts factors off" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.1])
@pytest.mark.parametrize("tf32", [False, True])
def test_a_wrong_result(value, tf32):
    right = torch.ones(100)
    found = right.clone()
    found[7] = value
    assert "its result is wrong by" in (cudnn_search.fault(found, right, tf32) or "")
    assert cudnn_search.fault(right, right, tf32) is None
