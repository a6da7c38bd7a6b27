"""Options are checked before anything is captured or built."""

from __future__ import annotations

import pytest

import ai3_compile as ai3
from ai3_compile.errors import OptionError, OptionValueError, UnknownAlgorithmError, UnknownOptionError
from ai3_compile.ops import OPERATIONS


def test_every_option_has_a_name_a_type_a_default_and_a_description():
    names = [option.name for option in ai3.options()]
    assert len(set(names)) == len(names) and set(OPERATIONS) <= set(names)
    for option in ai3.options():
        assert option.type and option.description
        ai3.check_options({option.name: option.default})
        for choice in option.choices:
            ai3.check_options({option.name: choice})


@pytest.mark.parametrize(("typo", "nearest"), [("conv2", "conv2d"), ("maxpool", "maxpool2d"), ("Strict", "strict")])
def test_a_typo_is_refused_with_the_nearest_name(typo, nearest):
    with pytest.raises(UnknownOptionError, match=f"Did you mean '{nearest}'"):
        ai3.check_options({typo: "default"})


@pytest.mark.parametrize(
    "options",
    [
        {"rest": "onnx"},
        {"strict": "yes"},
        {"strict": 1},
        {"fuse": None},
        {"rest": True},
        {"max_workspace": -1},
        {"max_workspace": 1e6},
        {"max_workspace": True},
        ["conv2d"],
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(options):
    with pytest.raises(OptionValueError, match="expected"):
        ai3.check_options(options)


def test_an_algorithm_of_another_operation_is_refused():
    with pytest.raises(UnknownAlgorithmError, match="linear: there is no algorithm 'winograd'"):
        ai3.check_options({"linear": "winograd"})


def test_option_errors_are_one_family():
    assert issubclass(UnknownOptionError, OptionError) and issubclass(OptionError, ai3.errors.Ai3Error)


def test_no_options_is_the_default_policy():
    policy = ai3.check_options(None)
    assert all(policy.is_default(name) for name in OPERATIONS) and policy.rest == "auto" and not policy.strict
