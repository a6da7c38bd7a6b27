"""python -m ai3_compile: demo, list, explain, doctor, cache."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from . import registry, zoo
from .backends import builder, gpu
from .eager import run_sample
from .errors import Ai3Error
from .options import OPTIONS
from .report import last_report
from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return given.run(given)
    except Ai3Error as error:
        print(f"ai3: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ai3_compile", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ai3_compile {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="run ResNet-18 on a photograph, eager and through ai3")
    demo.set_defaults(run=_demo)
    listing = commands.add_parser("list", help="every algorithm, its platform, and whether it can run here")
    listing.set_defaults(run=_list)
    explain = commands.add_parser("explain", help="what ai3 chooses in a model, and why")
    explain.add_argument("model", help="torchvision:resnet18, or package.module:callable that returns a module")
    explain.add_argument("--shape", type=_shape, help="input shape, such as 1,3,224,224")
    explain.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="such as conv2d='winograd|default'",
    )
    explain.set_defaults(run=_explain)
    doctor = commands.add_parser("doctor", help="compiler, CPU, torch, cache and platforms of this machine")
    doctor.set_defaults(run=_doctor)
    cache = commands.add_parser("cache", help="the folder of built kernels: its path and entries, or empty it")
    cache.add_argument("action", nargs="?", choices=("path", "clear"))
    cache.set_defaults(run=_cache)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 1,3,224,224, got {text!r}") from None


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    if name in OPTIONS and OPTIONS[name].type == "bool" and value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    return name, value


def _demo(_: argparse.Namespace) -> int:
    from . import demo

    demo.run()
    return 0


def _list(_: argparse.Namespace) -> int:
    reasons = registry.system().platforms
    for operation in dict.fromkeys(a.operation for a in registry.algorithms()):
        print(operation)
        for algorithm in registry.of_operation(operation):
            reason = reasons[algorithm.platform]
            state = "can run here" if reason is None else f"cannot run here: {reason}"
            print(f"  {algorithm.qualified:28} {algorithm.description}\n  {'':28} {state}")
    return 0


def _explain(given: argparse.Namespace) -> int:
    model = zoo.load_model(given.model)
    # What runs the rest changes no choice, and eager is ready at once.
    options = {"rest": "eager", **dict(given.option)}
    sample = run_sample(model, given.shape or zoo.default_shape(given.model))
    with torch.inference_mode():
        try:
            torch.compile(model, backend="ai3", options=options)(sample)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, Ai3Error):
                raise error.inner_exception from None
            raise
    print(last_report())
    return 0


def _doctor(_: argparse.Namespace) -> int:
    from . import core

    print(f"ai3_compile  {__version__}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"CPU          {builder.cpu_isa()}")
    print(f"compiler     {builder.no_compiler_reason() or builder.describe_compiler()}")
    print(f"cache        {builder.cache_dir()} ({builder.cache_state()})")
    print(f"GPU          {gpu.unavailable() or ', '.join(gpu.names())}")
    print(f"core library {'built with the package' if core.prebuilt() else 'built at first use'}")
    healthy = True
    for platform in registry.platforms().values():
        reason = platform.unavailable()
        # A machine without a GPU lacks nothing.
        healthy &= reason is None or (platform.device == "cuda" and gpu.unavailable() is not None)
        print(f"platform     {platform.name}: {platform.description}; {'ready' if reason is None else reason}")
    return 0 if healthy else 1


def _cache(given: argparse.Namespace) -> int:
    if given.action == "clear":
        print(f"removed {builder.cache_clear()} entries from {builder.cache_dir()}")
    elif given.action == "path":
        print(builder.cache_dir())
    else:
        print(builder.cache_dir())
        for entry in builder.cache_entries():
            print(f"  {entry}")
    return 0
