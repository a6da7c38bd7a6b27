"""select() on invented algorithms: no compiler, no graph, no device."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from ai3_compile.errors import NothingFitsError, StrictError, UnknownAlgorithmError
from ai3_compile.selection import OpSpec, System, select


@dataclass(frozen=True)
class Fake:
    name: str
    platform: str = "cpp"
    operation: str = "conv2d"
    objection: str | None = None
    estimate: float | None = field(default=None)
    scratch: int = 0
    only_by_name: str | None = None
    fusions: int = 0
    device: str | None = None

    @property
    def qualified(self) -> str:
        return self.name if self.name == self.platform else f"{self.name}@{self.platform}"

    def supports(self, spec: OpSpec) -> str | None:
        return self.objection

    def cost(self, spec: OpSpec) -> float | None:
        return self.estimate

    def workspace(self, spec: OpSpec) -> int:
        return self.scratch


SYSTEM = System({"cpp": None, "cuda": "no GPU", "torch": None})
TORCH = Fake("torch", "torch")
DIRECT = Fake("direct", estimate=2.0)
GEMM = Fake("gemm", estimate=1.0)
WINOGRAD = Fake("winograd", objection="needs a 3x3 kernel", estimate=0.1)
CUDA = Fake("direct", "cuda", estimate=0.01)
UNPRICED = Fake("odd")
ALL = (CUDA, DIRECT, GEMM, UNPRICED, WINOGRAD, TORCH)


def spec(**fields: object) -> OpSpec:
    given = {
        "operation": "conv2d",
        "name": "layer1.conv",
        "input_shape": (1, 3, 8, 8),
        "output_shape": (1, 4, 8, 8),
        "dtype": torch.float32,
        "device": "cpu",
    }
    return OpSpec(**{**given, **fields})  # type: ignore[arg-type]


def choose(selector: str, algorithms: tuple[Fake, ...] = ALL, strict: bool = False, **fields: object):
    return select(spec(**fields), selector, algorithms, SYSTEM, default="guess|torch", strict=strict)


def reasons(decision) -> dict[str, str]:
    return {r.algorithm: r.reason for r in decision.rejected}


def test_a_name_is_taken_and_every_other_algorithm_has_its_reason():
    decision = choose("direct")
    assert decision.chosen is DIRECT and decision.why == "named 'direct'" and not decision.by_policy
    assert reasons(decision) == {
        "direct@cuda": "no GPU",
        "gemm@cpp": "not named by 'direct'",
        "odd@cpp": "not named by 'direct'",
        "winograd@cpp": "needs a 3x3 kernel",
        "torch": "not named by 'direct'",
    }


def test_names_are_tried_in_order_of_preference():
    decision = choose("winograd|gemm|direct")
    assert decision.chosen is GEMM
    assert reasons(decision)["winograd@cpp"] == "needs a 3x3 kernel"
    assert reasons(decision)["direct@cpp"] == "comes after gemm@cpp in 'winograd|gemm|direct'"


def test_a_platform_can_be_named():
    assert choose("direct@cpp").chosen is DIRECT
    with pytest.raises(NothingFitsError, match="direct@cuda: no GPU"):
        choose("direct@cuda")


def test_the_first_platform_of_the_registry_that_fits_is_taken():
    assert choose("direct", (CUDA, DIRECT)).chosen is DIRECT
    able = System({"cpp": None, "cuda": None, "torch": None})
    assert select(spec(), "direct", (CUDA, DIRECT), able, default="torch").chosen is CUDA


@pytest.mark.parametrize("selector", ["guess", "default"])
def test_policies_take_the_lowest_cost_among_those_that_fit(selector):
    decision = choose(selector)
    assert decision.chosen is GEMM and decision.by_policy
    assert decision.why == f"{selector}: lowest estimated cost of 2"
    assert reasons(decision)["direct@cpp"] == "estimated 2.0x the time"
    assert reasons(decision)["odd@cpp"] == "has no cost estimate"


def test_a_tie_is_broken_by_the_order_of_the_registry():
    first, second = Fake("a", estimate=1.0), Fake("b", estimate=1.0)
    assert choose("guess", (first, second)).chosen is first
    assert choose("guess", (second, first)).chosen is second


@pytest.mark.parametrize("selector", ["guess", "default", "winograd|default"])
def test_policies_leave_to_torch_what_nothing_fits_and_strict_forbids_it(selector):
    assert choose(selector, (WINOGRAD, TORCH)).chosen is TORCH
    with pytest.raises(StrictError, match="strict=True") as error:
        choose(selector, (WINOGRAD, TORCH), strict=True)
    assert "winograd@cpp: needs a 3x3 kernel" in str(error.value)
    assert f"{selector}|torch" in str(error.value)


def test_strict_lets_torch_run_what_the_user_leaves_to_it_by_name():
    assert choose("winograd|torch", (WINOGRAD, TORCH), strict=True).chosen is TORCH


def test_strict_default_prefers_a_native_algorithm_where_the_policy_would_not():
    decision = select(spec(), "default", ALL, SYSTEM, default="torch", strict=True)
    assert decision.chosen is GEMM


def test_a_name_that_does_not_fit_raises_with_the_whole_trace_and_the_way_out():
    with pytest.raises(NothingFitsError) as error:
        choose("winograd")
    message = str(error.value)
    assert "layer1.conv" in message and "1x3x8x8" in message
    for algorithm in ALL:
        assert f"{algorithm.qualified}: " in message
    assert "winograd@cpp: needs a 3x3 kernel" in message
    assert "'winograd|default'" in message


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UnknownAlgorithmError, match="Did you mean 'winograd'"):
        choose("winnograd")


def test_an_occurrence_only_torch_can_run_says_why():
    decision = choose("default", torch_only="its indices are used")
    assert decision.chosen is TORCH
    assert reasons(decision)["gemm@cpp"] == "its indices are used"


def test_algorithms_of_other_operations_are_not_considered():
    other = Fake("gemm", operation="linear", estimate=0.0)
    decision = choose("guess", (other, DIRECT))
    assert decision.chosen is DIRECT and decision.rejected == ()


@pytest.mark.parametrize(
    "estimate, chosen, why",
    [
        (1.0, "gemm", "default: lowest estimated cost of 2"),
        (1.07, "gemm", "default: as good as the lowest estimated cost of 2, and takes in the most of what comes before "
                       "and after it"),
        (1.09, "direct", "default: lowest estimated cost of 2"),
    ],
    ids=["equal", "below the limit", "above the limit"],
)  # fmt: skip
def test_of_estimates_that_are_as_good_as_the_same_the_one_that_fuses_more_is_taken(estimate, chosen, why):
    algorithms = (Fake("direct", estimate=1.0, fusions=1), Fake("gemm", estimate=estimate, fusions=3))
    decision = choose("default", algorithms)
    assert decision.chosen.name == chosen and decision.why == why
    if estimate == 1.07:
        assert "as good as gemm@cpp by estimate, but takes in less" in reasons(decision)["direct@cpp"]


NAMED = Fake("odd", estimate=0.1, only_by_name="has 4 times the rounding error")


def test_policies_pass_over_what_is_chosen_only_by_name():
    algorithms = (DIRECT, NAMED, GEMM, TORCH)
    for selector in ("guess", "default"):
        decision = choose(selector, algorithms)
        assert decision.chosen is GEMM and decision.why == f"{selector}: lowest estimated cost of 2"
        assert reasons(decision)["odd@cpp"] == "only by name: has 4 times the rounding error"
    measured = {"odd@cpp": 1e-9, "gemm@cpp": 1.0}
    decision = select(spec(), "auto", algorithms, SYSTEM, default="guess|torch", measured=measured)
    assert decision.chosen is GEMM
    assert reasons(decision)["odd@cpp"] == "only by name: has 4 times the rounding error"


@pytest.mark.parametrize("selector", ["odd", "odd@cpp", "odd|default", "winograd|odd|auto"])
def test_what_is_chosen_only_by_name_is_chosen_by_its_name(selector):
    assert choose(selector, (DIRECT, NAMED, WINOGRAD, TORCH)).chosen is NAMED


def test_what_is_chosen_only_by_name_is_no_way_out_of_strict():
    with pytest.raises(StrictError, match="odd@cpp: fits, but only by name: has 4 times"):
        choose("default", (NAMED, TORCH), strict=True)
    assert choose("default", (NAMED, TORCH)).chosen is TORCH
    assert reasons(choose("direct", (DIRECT, NAMED)))["odd@cpp"] == "not named by 'direct'"


MEASURED = {"direct@cpp": 2e-3, "gemm@cpp": 5e-3, "torch": 1e-3, "winograd@cpp": 1e-6}


def test_auto_takes_the_fastest_that_fits():
    decision = select(spec(), "auto", ALL, SYSTEM, default="guess|torch", measured=MEASURED)
    assert decision.chosen is TORCH and decision.by_policy
    assert decision.why == "auto: fastest of 3 measured, 1 ms"
    assert reasons(decision)["direct@cpp"] == "measured 2.0x the time"
    assert reasons(decision)["winograd@cpp"] == "needs a 3x3 kernel"


def test_auto_with_strict_takes_the_fastest_that_is_not_torchs():
    decision = select(spec(), "auto", ALL, SYSTEM, default="guess|torch", strict=True, measured=MEASURED)
    assert decision.chosen is DIRECT


@pytest.mark.parametrize(
    ("fields", "torchs", "chosen"),
    [
        ({"operation": "linear", "device": "cuda"}, 1.02e-3, "torch"),
        ({"operation": "linear", "device": "cuda"}, 1.04e-3, "gemm@cpp"),
        ({"operation": "linear"}, 1.02e-3, "gemm@cpp"),
        ({"device": "cuda"}, 1.02e-3, "gemm@cpp"),
    ],
    ids=["alike", "slower", "cpu", "conv2d"],
)
def test_auto_leaves_to_torch_a_product_on_a_gpu_that_it_computes_as_fast(fields, torchs, chosen):
    operation = fields.get("operation", "conv2d")
    algorithms = (Fake("gemm", operation=operation), Fake("torch", "torch", operation=operation))
    measured = {"gemm@cpp": 1e-3, "torch": torchs}
    decision = select(spec(**fields), "auto", algorithms, SYSTEM, default="guess|torch", measured=measured)
    assert decision.chosen.qualified == chosen
    if chosen == "torch":
        assert decision.why == "auto: as good as the fastest of 2 measured, 1.02 ms"
        assert reasons(decision)["gemm@cpp"] == "measured as good as torch, around which Inductor fuses more"
    strict = select(spec(**fields), "auto", algorithms, SYSTEM, default="guess|torch", strict=True, measured=measured)
    assert strict.chosen.qualified == "gemm@cpp"


def test_auto_without_measurements_goes_on_to_the_next_name():
    assert select(spec(), "auto|gemm", ALL, SYSTEM, default="guess|torch", measured={}).chosen is GEMM
    with pytest.raises(NothingFitsError):
        select(spec(), "auto", ALL, SYSTEM, default="guess|torch", measured={})


@pytest.mark.parametrize(("limit", "chosen"), [(None, "gemm@cpp"), (1000, "gemm@cpp"), (999, "direct@cpp")])
def test_what_needs_more_workspace_than_allowed_does_not_fit(limit, chosen):
    algorithms = (DIRECT, Fake("gemm", estimate=1.0, scratch=1000), TORCH)
    decision = select(spec(), "guess", algorithms, SYSTEM, default="guess|torch", max_workspace=limit)
    assert decision.chosen.qualified == chosen
    if limit == 999:
        assert reasons(decision)["gemm@cpp"] == "needs 1000 bytes of workspace, over max_workspace"
        with pytest.raises(NothingFitsError, match="needs 1000 bytes"):
            select(spec(), "gemm", algorithms, SYSTEM, default="guess|torch", max_workspace=limit)


def test_what_computes_elsewhere_is_named_only_where_it_is_asked_for():
    gpu, elsewhere = Fake("direct", "cuda", device="cuda", objection="runs on GPUs"), Fake("fft", "cuda", device="cuda")
    known = (gpu, elsewhere, DIRECT, TORCH)
    system = System({"cpp": None, "cuda": None, "torch": None})
    decision = select(spec(), "direct", known, system, default="torch")
    assert decision.chosen is DIRECT and {r.algorithm for r in decision.rejected} == {"torch"}
    decision = select(spec(), "direct@cuda|direct", known, system, default="torch")
    assert decision.chosen is DIRECT and {r.algorithm for r in decision.rejected} == {"direct@cuda", "torch"}
    elsewhere = Fake("fft", "cuda", device="cuda", objection="runs on GPUs")
    with pytest.raises(NothingFitsError, match="fft@cuda: runs on GPUs"):
        select(spec(), "fft", (elsewhere, DIRECT, TORCH), system, default="torch")
