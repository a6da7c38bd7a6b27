"""The benches' own arithmetic, tables and results; nothing is measured that takes long."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from bench import __main__ as main
from bench import aithree, as_intel, conv2d, gpu, machine, models, overhead, peak, peers, plot, scaling, tiles, timing
from bench.table import Table, number


@pytest.fixture
def clock(monkeypatch):
    """A clock that the sides move on, and that rests do not: {"now": seconds, "rests": how many}."""
    state = {"now": 0.0, "rests": 0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: state["now"])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: state.update(rests=state["rests"] + 1))
    return state


def _side(clock, durations):
    remaining = iter(durations)
    return lambda: clock.update(now=clock["now"] + next(remaining))


def test_a_turn_is_a_rest_an_untimed_call_and_three_timed_ones(clock):
    # A round that is not counted has one call; each of the two others an untimed one of 9 ms, and three that count.
    found = timing.medians({"a": _side(clock, [0.009, *[0.009, 0.001, 0.002, 0.003] * 2])}, rounds=2)
    assert found["a"] == pytest.approx(0.002) and clock["rests"] == 3


def test_a_long_call_is_timed_once_a_turn_and_sides_take_turns(clock):
    order = []

    def side(name, seconds):
        return lambda: (order.append(name), clock.update(now=clock["now"] + seconds))

    found = timing.medians({"long": side("long", 0.2), "short": side("short", 0.01)}, rounds=1)
    assert order == ["long", "short", "long", "long", *["short"] * 4]
    assert found == {"long": pytest.approx(0.2), "short": pytest.approx(0.01)}


def test_one_disturbed_timing_leaves_as_many_calls_on_a_gpu(monkeypatch):
    """A call of a millisecond, whose second timing has something beside it."""
    counted: list[int] = []

    def timed(side: timing.Side, count: int) -> float:
        counted.append(count)
        return 9e-3 if len(counted) == 2 else 1e-3

    monkeypatch.setattr(gpu, "_timed", timed)
    assert gpu.medians({"side": lambda: None}, 3) == {"side": 1e-3}
    assert set(counted[4:]) == {10}  # which take ten milliseconds


def test_geometric_mean():
    assert timing.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert timing.geometric_mean([]) is None


def test_tables_have_aligned_columns_and_a_markdown_form():
    table = Table("title", ["name", "ms"], [["a", number(1.0)], ["longer", number(None)]], ["a note"])
    assert table.text() == "title\nname      ms\na       1.00\nlonger     -\na note"
    assert table.markdown() == "title\n\n| name | ms |\n| --- | ---: |\n| a | 1.00 |\n| longer | - |\n\na note"


def test_ratios_are_to_the_best_peer_and_not_to_ai3():
    times = {"eager": 4.0, "onnxruntime": 2.0, peers.COMPILED: 1.0, peers.CONVERTED: 3.0}
    assert models.ratios(times) == {"best peer": "onnxruntime", "ratio": 0.5, "ratio converted": 1.5}
    assert models.ratios({peers.COMPILED: 1.0}) == {"best peer": None, "ratio": None, "ratio converted": None}


def test_missing_and_left_out_peers_are_named(monkeypatch):
    known = machine.version
    monkeypatch.setattr(machine, "version", lambda name: None if name == "openvino" else known(name) or "1.0")
    sides = peers.describe(without=["inductor"])
    assert sides["openvino"]["not measured"] == "not installed: pip install openvino"
    assert sides["inductor"]["not measured"] == "left out by --without"
    assert not {"eager", "channels_last", "onnxruntime", peers.COMPILED} & {
        name for name, side in sides.items() if "not measured" in side
    }
    text = models.tables(_models_result(sides))[0].text()
    assert "openvino: not installed: pip install openvino" in text and "inductor: left out by --without" in text


def test_a_side_that_fails_has_its_reason_and_the_others_are_measured(monkeypatch, tmp_path):
    def fails(network):
        raise RuntimeError("no such operator\nand more")

    sides = [peers.Peer("eager", ("torch",), "", peers._eager), peers.Peer("exported", ("torch",), "", fails)]
    monkeypatch.setattr(peers, "PEERS", tuple(sides))
    monkeypatch.setattr(peers, "OURS", ())
    found, failed = models._prepared(peers.Network(torch.nn.ReLU(), torch.ones(1), tmp_path), without=())
    assert list(found) == ["eager"] and failed == {"exported": "failed: RuntimeError: no such operator"}


def _models_result(sides):
    rows = [
        {
            "model": "net",
            "batch": batch,
            "milliseconds": {"eager": 2.0, peers.COMPILED: 2.0 * ratio},
            "not measured": {"onnxruntime": "failed: it does"},
            "best peer": "eager",
            "ratio": ratio,
            "ratio converted": None,
            "relative error": {"eager": 1e-7},
            "extra memory MiB": {"eager": 1.5},
        }
        for batch, ratio in ((1, 0.5), (10, 2.0))
    ]
    result = {"bench": "models", "rounds": 1, **machine.describe(), "sides": sides, "rows": rows}
    models.finish(result)
    return result


def test_means_of_ratios_are_for_each_batch_and_overall():
    means = _models_result(peers.describe())["geometric mean"]
    assert {label: mean["ratio"] for label, mean in means.items()} == {
        "batch 1": pytest.approx(0.5),
        "batch 10": pytest.approx(2.0),
        "overall": pytest.approx(1.0),
    }
    assert means["overall"]["ratio converted"] is None


@pytest.fixture
def layers_result(monkeypatch, tmp_path):
    """The result of `python -m bench conv2d` with one shape that was not measured, as it is written."""
    row = {"group": "g", "shape": "s", "milliseconds": {"torch": 2.0}, "GFLOP/s": {"torch": 50.0}, "refused": {"w": ""}}
    threads = str(torch.get_num_threads())
    peaks = iter([{peak.GFLOPS: {threads: 80.0}}, {peak.GFLOPS: {threads: 100.0}}])
    monkeypatch.setattr(peak, "measure", lambda: next(peaks))
    monkeypatch.setattr(conv2d, "measure", lambda given: iter([dict(row)]))
    out = tmp_path / "result.json"
    main.main(["conv2d", "--rounds", "1", "--out", str(out)])
    return out


def test_a_result_holds_the_machine_and_shares_of_the_higher_peak(layers_result):
    result = json.loads(layers_result.read_text())
    wanted = {"bench", "rounds", "cpu", "vendor", "isa", "threads", "versions", "compiler", "revision", "disturbance"}
    assert wanted <= set(result)
    assert {"torch", "ai3_compile", "onnxruntime", "openvino", "onnx"} <= set(result["versions"])
    assert result["rows"][0]["share of FMA peak"] == {"torch": pytest.approx(0.5)}


def test_a_result_is_printed_as_markdown(layers_result, capsys):
    capsys.readouterr()
    main.main(["markdown", str(layers_result)])
    assert "| s | 2.000 | - |" in capsys.readouterr().out


def test_shapes_are_the_groups_that_were_asked_for():
    found = conv2d.shapes(("aithree", "grid"), (1, 10))
    assert list(found) == ["aithree's", "3x3, batch 1", "3x3, batch 10"]
    assert found["3x3, batch 10"][0] == (10, 64, 112, 64, 3, 1)


def test_only_amds_cpus_are_measured_as_intels(monkeypatch):
    monkeypatch.delenv(as_intel._IS_CHILD, raising=False)
    monkeypatch.setattr(machine, "vendor", lambda: "GenuineIntel")
    assert "only for AMD's CPUs; this one is of GenuineIntel" == as_intel.absent()
    monkeypatch.setattr(machine, "vendor", lambda: "AuthenticAMD")
    assert as_intel.absent() is None or not torch.backends.mkl.is_available()
    monkeypatch.setenv(as_intel._IS_CHILD, "1")
    assert "this is the run" in str(as_intel.absent())


def test_what_has_no_picture_is_not_drawn(tmp_path):
    assert plot.draw({"bench": "overhead"}, tmp_path / "none.png") is False


def test_sides_have_colours_of_their_own():
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    names = ["torch", "torch, benchmark", "aithree smm", *(f"{a}@{p}" for p in ("cpp", "cudnn") for a in "abcdef")]
    for some in (names[:10], names):
        assert len(set(plot._colors(some))) == len(some)


def test_every_bench_describes_itself_and_has_its_arguments():
    parser = main._parser()
    for name, bench in main.BENCHES.items():
        given = parser.parse_args([name])
        assert isinstance(given, argparse.Namespace) and given.rounds == bench.ROUNDS > 0
        if bench is not tiles or torch.cuda.is_available():
            json.dumps(bench.describe(given))


@pytest.mark.parametrize("bench", [["tiles"], ["models", "--device", "cuda"], ["conv2d", "--device", "cuda"]])
def test_a_bench_of_gpus_says_that_there_is_none(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="There is no NVIDIA GPU.*doctor"):
        main.main(bench)


def test_every_subject_of_overhead_computes_what_aten_does():
    for operation in overhead.SUBJECTS:
        image = torch.randn(1, 8, 8, 8)
        module, aten = overhead._module(operation, image)
        torch.testing.assert_close(module(image), aten(), rtol=0, atol=0)


def test_higher_takes_the_best_of_each_figure():
    assert peak.higher({"a": {"1": 1.0, "2": 5.0}}, {"a": {"1": 2.0, "2": 4.0}}) == {"a": {"1": 2.0, "2": 5.0}}


def test_scaling_says_how_much_threads_help_and_whether_an_image_takes_longer_in_a_batch():
    row = {"model": "net", "milliseconds": {"1": {"1": 8.0, "2": 6.0, "4": 6.0}, "2": {"1": 4.0, "2": 3.0, "4": 3.3}}}
    result = {"bench": "scaling", "cpu": "a", "isa": "b", "threads": 2, "rows": [row]}
    scaling.finish(result)
    assert row["speed-up"] == {"1": 2.0, "2": 2.0, "4": pytest.approx(6 / 3.3)} and row["rise"] == pytest.approx(1.1)
    (table,) = scaling.tables(result)
    assert table.rows[1] == ["net, 2 threads", "4.00", "3.00", "3.30"] and "at most 1.10 times" in table.notes[0]


def test_a_folder_without_aithree_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps --target FOLDER aithree"):
        aithree.load(tmp_path)
