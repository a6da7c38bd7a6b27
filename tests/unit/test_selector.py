"""What a user may pass as a selector, and what is refused before anything is captured."""

from __future__ import annotations

import functools

import pytest

from ai3_compile.errors import SelectorCallError, SelectorError, SelectorLengthError, UnknownAlgorithmError
from ai3_compile.selection import parse_selector

from .test_select import ALL, spec


def text(value, index=0, **fields):
    return parse_selector("conv2d", value, ALL).text_for(index, spec(**fields))


def test_a_string_applies_to_every_occurrence():
    assert text("direct", 0) == text("direct", 7) == "direct"


def test_a_sequence_applies_by_order():
    assert [text(["direct", "gemm|torch"], i) for i in range(2)] == ["direct", "gemm|torch"]


def test_a_sequence_of_the_wrong_length_is_refused_with_the_operations_of_the_graph():
    selector = parse_selector("conv2d", ["direct", "gemm"], ALL)
    selector.check_count([spec(), spec()])
    with pytest.raises(SelectorLengthError, match="names 2 algorithms.*graph has 1") as error:
        selector.check_count([spec(name="layer3.conv")])
    assert "layer3.conv" in str(error.value)


def test_a_function_may_take_the_operation_or_also_its_input_shape():
    assert text(lambda op: "direct" if op.name == "a" else "gemm", name="a") == "direct"
    assert text(lambda op, shape: "direct" if shape[1] < 16 else "gemm", input_shape=(1, 32, 8, 8)) == "gemm"
    assert text(functools.partial(lambda op, shape, name: name, name="gemm")) == "gemm"
    assert text(lambda op, shape=None: "direct" if shape is None else "gemm") == "gemm"


@pytest.mark.parametrize("function", [lambda: "direct", lambda a, b, c: "direct"])
def test_a_function_of_another_arity_is_refused_at_once(function):
    with pytest.raises(SelectorError, match=r"\(op\) or \(op, input_shape\)"):
        parse_selector("conv2d", function, ALL)


def test_an_error_inside_a_function_names_the_operation_and_the_error():
    with pytest.raises(SelectorCallError, match="layer1.conv.*AttributeError: conv2d has no attribute 'kernel'"):
        text(lambda op: op.kernel)


@pytest.mark.parametrize("answer", [None, 3, ("direct",)])
def test_a_function_that_answers_with_no_name_is_refused(answer):
    with pytest.raises(SelectorError, match="expected the name of an algorithm"):
        text(lambda op: answer)


def test_a_function_that_answers_with_an_unknown_name_is_refused():
    with pytest.raises(UnknownAlgorithmError, match="'fft'"):
        text(lambda op: "fft")


@pytest.mark.parametrize("value", [3, None, {"direct"}])
def test_another_type_is_refused(value):
    with pytest.raises(SelectorError):
        parse_selector("conv2d", value, ALL)


@pytest.mark.parametrize("value", ["", "direct|", "direct,gemm", ["direct", "no such"]])
def test_malformed_names_are_refused(value):
    with pytest.raises(UnknownAlgorithmError):
        parse_selector("conv2d", value, ALL)
