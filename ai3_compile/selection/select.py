"""select: one operation, one selector, all algorithms -> a Decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import NothingFitsError, StrictError
from .decision import Candidate, Decision, Rejected, System
from .selector import POLICIES, parse_names
from .spec import OpSpec

TORCH, AUTO = "torch", "auto"
MEASURED_ALIKE = 1.03
"""Measured times that differ by less are those of one speed."""
AS_GOOD_AS = 1.08
"""Estimates whose ratio is no larger count as the same."""


def select(
    spec: OpSpec,
    selector: str,
    registry: Sequence[Candidate],
    system: System,
    *,
    default: str,
    strict: bool = False,
    measured: Mapping[str, float] | None = None,
    max_workspace: int | None = None,
) -> Decision:
    """Chooses an algorithm for `spec`.

    The names in `selector` are tried in order; of algorithms that share a name, the first platform of the registry that
    fits is taken. `guess` is the algorithm of the lowest estimated cost among those that fit and have an estimate
    (`cheapest` says what becomes of ties), and torch where none does. `default` stands for the selector `default`, the
    operation's own policy. `auto` is the fastest by `measured`, seconds by algorithm, torch's among them. With `strict`
    none of them means torch's, and none chooses what is `only_by_name`. An algorithm that asks for more than
    `max_workspace` bytes does not fit.

    Raises UnknownAlgorithmError for an unknown name, NothingFitsError where no name fits, StrictError where only a
    policy that leaves the operation to torch would fit.
    """
    of_operation = [c for c in registry if c.operation == spec.operation]
    names = parse_names(spec.operation, selector, of_operation)
    known = _relevant(of_operation, names, spec.device)
    objections = {c.qualified: _objection(c, spec, system, max_workspace) for c in known}
    fitting = [c for c in known if objections[c.qualified] is None]
    offered = [c for c in fitting if c.only_by_name is None]

    for name in names:
        policy = name in POLICIES
        steps = _steps(name, default, strict)
        for step in steps:
            if step == AUTO:
                chosen, costs = _fastest(offered, measured or {}, strict, spec)
            elif step in POLICIES:
                chosen, costs = _cheapest(offered, spec)
            else:
                chosen, costs = next((c for c in fitting if step in (c.name, c.qualified)), None), {}
            if chosen is None:
                continue
            rejected = tuple(
                Rejected(
                    c.qualified,
                    objections[c.qualified] or _passed_over(c, chosen, (*names, *steps), selector, costs, step),
                )
                for c in known
                if c is not chosen
            )
            return Decision(spec, selector, chosen, _why(name, step, costs, chosen), rejected, policy)

    trace = "\n".join(
        f"  {c.qualified}: {objections[c.qualified] or 'fits, but ' + _not_named(c, names, selector)}" for c in known
    )
    where = f"{spec.name or '(no module)'} {'x'.join(map(str, spec.input_shape))}"
    error = StrictError if strict and any(n in POLICIES for n in names) else NothingFitsError
    way_out = f"{selector}|{'default' if 'default' not in names else TORCH}"
    raise error(operation=spec.operation, where=where, selector=selector, trace=trace, way_out=way_out)


def _relevant(candidates: Sequence[Candidate], names: Sequence[str], device: str) -> list[Candidate]:
    """Without those that compute on another type of device and that nobody has asked for."""
    there = {c.name for c in candidates if c.device in (None, device)}
    return [
        c
        for c in candidates
        if c.device in (None, device) or c.qualified in names or (c.name in names and c.name not in there)
    ]


def _steps(name: str, default: str, strict: bool) -> Sequence[str]:
    """What one name of a selector stands for, in order."""
    if name not in POLICIES or name == AUTO:
        return (name,)
    if strict:
        return ("guess",)
    return default.split("|") if name == "default" else ("guess", TORCH)


def _objection(candidate: Candidate, spec: OpSpec, system: System, max_workspace: int | None) -> str | None:
    if candidate.platform != TORCH and spec.torch_only is not None:
        return spec.torch_only
    reason = system.platforms[candidate.platform] or candidate.supports(spec)
    if reason is not None or max_workspace is None:
        return reason
    needed = candidate.workspace(spec)
    return f"needs {needed} bytes of workspace, over max_workspace" if needed > max_workspace else None


def _cheapest(fitting: Sequence[Candidate], spec: OpSpec) -> tuple[Candidate | None, dict[str, float]]:
    costs = {c.qualified: cost for c in fitting if (cost := c.cost(spec)) is not None}
    return cheapest([c for c in fitting if c.qualified in costs], costs), costs


def cheapest(candidates: Sequence[Candidate], costs: Mapping[str, float]) -> Candidate | None:
    """The candidate of the lowest cost; among those that cost as good as the same, the one that takes in the most of
    its neighbours' work (the first of several): that saves more than estimates can tell apart."""
    if not candidates:
        return None
    lowest = min(costs[c.qualified] for c in candidates)
    same = [c for c in candidates if costs[c.qualified] <= AS_GOOD_AS * lowest]
    most = max(c.fusions for c in same)
    return min((c for c in same if c.fusions == most), key=lambda c: costs[c.qualified])


def _fastest(
    fitting: Sequence[Candidate], measured: Mapping[str, float], strict: bool, spec: OpSpec
) -> tuple[Candidate | None, dict[str, float]]:
    """The fastest; a product on a GPU that PyTorch computes as fast is left to it, as Inductor lays out and fuses what
    is around its own operations."""
    times = {c.qualified: measured[c.qualified] for c in fitting if c.qualified in measured}
    timed = [c for c in fitting if c.qualified in times and not (strict and c.platform == TORCH)]
    fastest = min(timed, key=lambda c: times[c.qualified], default=None)
    if fastest is None or (spec.device, spec.operation) != ("cuda", "linear"):
        return fastest, times
    left = (c for c in timed if c.platform == TORCH and times[c.qualified] <= MEASURED_ALIKE * times[fastest.qualified])
    return next(left, fastest), times


def _why(name: str, step: str, costs: dict[str, float], chosen: Candidate) -> str:
    if step == AUTO:
        alike = "" if costs[chosen.qualified] == min(costs.values()) else "as good as the "
        return f"auto: {alike}fastest of {len(costs)} measured, {costs[chosen.qualified] * 1e3:.3g} ms"
    if step in POLICIES:
        if len(costs) == 1:
            return f"{name}: the only one that fits"
        lowest = f"lowest estimated cost of {len(costs)}"
        if costs[chosen.qualified] > min(costs.values()):
            return f"{name}: as good as the {lowest}, and takes in the most of what comes before and after it"
        return f"{name}: {lowest}"
    return f"{name}: this operation's policy is {step}" if name in POLICIES else f"named {name!r}"


def _passed_over(
    other: Candidate, chosen: Candidate, considered: Sequence[str], selector: str, costs: dict[str, float], step: str
) -> str:
    if other.qualified in costs:
        if costs[other.qualified] < costs[chosen.qualified]:
            if step == AUTO:
                return f"measured as good as {chosen.qualified}, around which Inductor fuses more"
            return f"as good as {chosen.qualified} by estimate, but takes in less of what comes before and after it"
        verb = "measured" if step == AUTO else "estimated"
        return f"{verb} {costs[other.qualified] / max(costs[chosen.qualified], 1e-30):.1f}x the time"
    if other.name in considered or other.qualified in considered:
        return f"comes after {chosen.qualified} in {selector!r}"
    if costs and other.platform != TORCH and other.only_by_name is None:
        return "could not be measured: the log says why" if step == AUTO else "has no cost estimate"
    return _not_named(other, considered, selector)


def _not_named(candidate: Candidate, considered: Sequence[str], selector: str) -> str:
    if candidate.only_by_name is not None and any(name in POLICIES for name in considered):
        return f"only by name: {candidate.only_by_name}"
    return f"not named by {selector!r}"
