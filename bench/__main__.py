"""python -m bench conv2d | models  [--out FILE.json]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import conv2d, machine, models

BENCHES = {"conv2d": conv2d.run, "models": models.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each side")
    parser.add_argument("--out", type=Path, help="where to keep the result, with the machine it was measured on")
    given = parser.parse_args()
    rows = BENCHES[given.bench](given.rounds)
    if given.out is not None:
        result = {"bench": given.bench, "rounds": given.rounds, **machine.describe(), "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
