"""Which inputs of a CUDA graph are read where they lie."""

from __future__ import annotations

from ai3_compile.cuda_graph import Places


def test_a_place_is_worth_a_graph_the_second_time():
    places = Places()
    assert [places.meet((16,)), places.meet((16,))] == [False, True]


def test_two_places_in_turn():
    places = Places()
    assert [places.meet(at) for at in ((16,), (32,), (16,), (32,))] == [False, False, True, True]


def test_all_inputs_count():
    places = Places()
    assert not any(places.meet(at) for at in ((16, 64), (16, 80), (32, 64)))
    assert places.meet((16, 80))


def test_four_places_at_most():
    places = Places()
    assert [places.meet((16 * i,)) for i in range(6) for _ in "12"] == [False, True] * 4 + [False] * 4


def test_a_place_of_long_ago_is_forgotten():
    places = Places()
    assert not any(places.meet((16 * i,)) for i in (*range(9), 0))


def test_an_address_between_units_of_16_bytes_is_never():
    places = Places()
    assert not any(places.meet((64, 8)) for _ in range(3))


def test_no_inputs_but_weights():
    places = Places()
    assert [places.meet(()), places.meet(())] == [False, True]
