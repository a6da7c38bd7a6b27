"""Which inputs of a CUDA graph are read where they lie, and which are copied: the choice alone, without a GPU."""

from __future__ import annotations

import pytest
import torch

from ai3_compile import cuda_graph

MEMORY = torch.empty(1 << 12, dtype=torch.uint8)  # at a multiple of 64 bytes
WEIGHT = MEMORY[:1]


class Calls:
    """Of a graph of a weight and some inputs, each at its place in MEMORY: what is captured, and what is replayed."""

    def __init__(self, *first: int) -> None:
        self._graphs = cuda_graph._Graphs(lambda: (), self._arguments(first), frozenset({0}), None)
        self.captured: list[str] = []

        def capture(arguments, copied):
            assert list(copied) in ([], list(range(1, len(arguments)))), "all inputs, never a weight"
            places = [argument.data_ptr() - WEIGHT.data_ptr() for argument in arguments[1:]]
            self.captured.append("copying" if copied else str(places))
            return self.captured[-1]

        self._graphs._capture = capture

    @staticmethod
    def _arguments(places):
        return [WEIGHT, *(MEMORY[place : place + 1] for place in places)]

    def __call__(self, *places: int) -> str:
        return self._graphs.of(self._arguments(places))


def test_a_place_has_a_graph_from_the_second_call_on():
    calls = Calls(16)
    assert [calls(16), calls(16)] == ["[16]"] * 2 and calls.captured == ["[16]"]


def test_two_places_in_turn():
    calls = Calls(16)
    found = [calls(place) for place in (32, 16, 32, 16, 32)]
    assert found == ["copying", "[16]", "[32]", "[16]", "[32]"] and len(calls.captured) == 3


def test_all_inputs_count():
    calls = Calls(16, 64)
    assert [calls(*places) for places in ((16, 80), (32, 64), (16, 80))] == ["copying", "copying", "[16, 80]"]


def test_four_places_at_most():
    calls = Calls(0)
    found = [calls(16 * place) for place in range(1, 7) for _ in range(2)]
    assert found == [name for i in range(1, 5) for name in ("copying", f"[{16 * i}]")] + ["copying"] * 4
    assert calls(0) == "copying" and calls(64) == "[64]"


@pytest.mark.parametrize(("others", "found"), [(7, "[0]"), (8, "copying")], ids=["equal", "above"])
def test_a_place_of_long_ago_is_forgotten(others, found):
    calls = Calls(0)
    assert {calls(16 * place) for place in range(1, others + 1)} == {"copying"}
    assert calls(0) == found


def test_an_address_between_units_of_16_bytes_is_never():
    calls = Calls(64, 8)
    assert [calls(64, 8) for _ in range(3)] == ["copying"] * 3 and len(calls.captured) == 1


def test_no_inputs_but_weights():
    calls = Calls()
    assert [calls(), calls()] == ["[]"] * 2 and len(calls.captured) == 1
