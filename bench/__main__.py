"""python -m bench NAME, and markdown or fit FILE.json: bench/README.md says what there is."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import (
    as_intel,
    bandwidth,
    conv2d,
    cost,
    first_call,
    fit,
    linear,
    machine,
    models,
    overhead,
    peak,
    plot,
    scaling,
    tiles,
)
from .table import Table

BENCHES: dict[str, Any] = {
    "models": models,
    "conv2d": conv2d,
    "linear": linear,
    "bandwidth": bandwidth,
    "overhead": overhead,
    "compile": first_call,
    "cost": cost,
    "scaling": scaling,
    "tiles": tiles,
}
WITH_PEAK = ("models", "conv2d", "linear", "bandwidth")
WITH_MKL = ("models", "linear")
AS_INTEL = "with MKL told to treat the CPU as Intel"


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    given = _parser().parse_args(arguments)
    if given.bench == "markdown":
        result = json.loads(given.file.read_text())
        print("\n\n".join(table.markdown() for table in tables(result)))
        return
    if given.bench == "fit":
        fit.main(given)
        return
    result = run(given)
    if given.bench in WITH_MKL and result.get("device") != "cuda":
        result[AS_INTEL] = "left out by --once" if given.once else as_intel.absent() or as_intel.measure(arguments)
    save(result, given.out)
    print("\n\n".join(table.text() for table in tables(result)))
    if result["disturbance"] is not None:
        shares = (f"{share * 100:.1f} % {name}" for name, share in result["disturbance"].items())
        print(f"\nof the cores' time while this was measured: {', '.join(shares)}")
    if given.out is not None:
        _draw(result, given.out.with_suffix(".png"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="bench", required=True)
    for name, bench in BENCHES.items():
        command = commands.add_parser(name, description=bench.__doc__)
        command.add_argument("--rounds", type=int, default=bench.ROUNDS, help=f"default {bench.ROUNDS}")
        command.add_argument("--out", type=Path, help="a JSON file for the result; a picture is drawn beside it")
        if name in WITH_MKL:
            command.add_argument("--once", action="store_true", help=f"not a second time {AS_INTEL}, on AMD's CPUs")
        bench.add_arguments(command)
    fit.add_arguments(commands.add_parser("fit", description=fit.__doc__))
    command = commands.add_parser("markdown", description="a result's tables, in Markdown")
    command.add_argument("file", type=Path)
    return parser


def run(given: argparse.Namespace) -> dict[str, Any]:
    """The result: the machine, what was asked for, and a row for everything measured.

    It is written after every row as well: a long run that is ended early leaves what it has measured.
    """
    bench = BENCHES[given.bench]
    result: dict[str, Any] = {"bench": given.bench, "rounds": given.rounds, **machine.describe()}
    result |= bench.describe(given)
    disturbance = machine.Disturbance()
    has_peak = given.bench in WITH_PEAK and result.get("device") != "cuda"
    first = peak.measure() if has_peak else {}
    result |= {"peak": first, "rows": []} if has_peak else {"rows": []}
    for row in bench.measure(given):
        result["rows"].append(row)
        bench.finish(result)
        save(result, given.out)
    if has_peak:
        result["peak"] = peak.higher(first, peak.measure())
    result["disturbance"] = disturbance.shares()
    bench.finish(result)
    return result


def save(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of a result, and of the run as Intel's where there is one."""
    found: list[Table] = BENCHES[result["bench"]].tables(result)
    as_intels = result.get(AS_INTEL)
    if isinstance(as_intels, dict):
        for table in tables(as_intels):
            table.title += f", {AS_INTEL}"
            found.append(table)
    return found


def _draw(result: dict[str, Any], path: Path) -> None:
    try:
        drawn = plot.draw(result, path)
    except ImportError:
        print(plot.NEEDS)
    else:
        if drawn:
            print(f"drawn: {path}")


if __name__ == "__main__":
    main()
