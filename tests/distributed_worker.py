"""What torchrun starts for the tests of several processes, at two ranks: `-m tests.distributed_worker cpu|cuda FOLDER`.

The checks run in order on all ranks. Each rank writes a JSON line a check into FOLDER/<rank>.jsonl, with the traceback
where it failed, and goes no further then: the others would wait for it.

Bounds: losses are eager's to the rounding of a few steps, 1e-5; outputs to 2e-5 of the largest, Winograd's rounding.
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import ai3
from ai3_compile import core, tuning
from ai3_compile.testing.references import relative_error

if TYPE_CHECKING:
    import pytest

RANKS, STEPS = 2, 4
# How long a rank waits for another, which may be building, and how long the whole may take.
PATIENCE, TIME_OUT = 200, 400
OPTIONS = {"conv2d": "winograd|implicit gemm|gemm|direct", "rest": "eager"}
CHECKS: dict[str, Callable[[], None]] = {}
DEVICE, FOLDER = "cpu", Path()
SELECTED: list[tuple[Any, ...]] = []
"""What was selected so far, by check."""


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class Ranks:
    """The checks as torchrun ran them: once, for all of pytest's workers, which find the results in one folder."""

    def __init__(self, device: str, factory: pytest.TempPathFactory) -> None:
        own = factory.getbasetemp()
        folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"ranks-{device}"
        self.output = folder / "output.txt"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                self._run(device, folder)
        files = [folder / f"{rank}.jsonl" for rank in range(RANKS)]
        lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
        self.results = [{line["check"]: line for line in map(json.loads, found)} for found in lines]

    def _run(self, device: str, folder: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        # Inductor's cache is the ranks' own: on a warm one no pass would run.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        # As a script it would have the tests on its path, whose `cuda` is not NVIDIA's.
        command += ["-m", "tests.distributed_worker", device, str(folder)]
        root = Path(__file__).parents[1]
        with self.output.open("w") as output:
            run = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                run.wait(TIME_OUT)
            except subprocess.TimeoutExpired:
                run.terminate()  # torchrun ends the ranks
                run.wait(PATIENCE)

    def verify(self, name: str) -> None:
        """Raises AssertionError with what went wrong in a check, on all ranks."""
        missing = {"error": f"it did not get to it:\n{self.output.read_text()[-6000:]}"}
        errors = [results.get(name, missing)["error"] for results in self.results]
        assert not any(errors), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors))


class Block(nn.Module):
    """Nothing but a weight tells one from another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x))


class Tower(nn.Sequential):
    """torch.compile leaves a container of torch.nn's own to its parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self:
            x = part(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.first, self.second = Block(), Block()
        # 1 MiB, where DistributedDataParallel's first bucket ends.
        self.narrow, self.wide, self.head = nn.Linear(8, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        x = self.second(self.first(x)).mean((2, 3))
        return self.head(torch.relu(self.wide(torch.relu(self.narrow(x)))))


def device() -> torch.device:
    return torch.device("cpu") if DEVICE == "cpu" else torch.device("cuda", dist.get_rank())


def net() -> Net:
    torch.manual_seed(0)
    return Net().to(device())


def parallel() -> nn.parallel.DistributedDataParallel:
    return nn.parallel.DistributedDataParallel(net())


def sharded(prepare: Callable[[Net], Any] = lambda model: None) -> Net:
    model = net()
    prepare(model)
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh())
    return model


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh(DEVICE, (RANKS,))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Another one on every rank."""
    generator = torch.Generator().manual_seed(RANKS * step + dist.get_rank())
    images, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.randint(0, 10, (8,), generator=generator)
    return images.to(device()), labels.to(device())


def train(model: nn.Module, forward: Callable[..., torch.Tensor], after: Callable[[], None] = lambda: None) -> list:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        model.train()
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after()
    return losses


@torch.no_grad()
def evaluated(model: nn.Module, forward: Callable[..., torch.Tensor]) -> torch.Tensor:
    model.eval()
    output = forward(batch(99)[0])
    assert output.device == device()
    return output


def gathered(value: Any) -> list[Any]:
    """This value of every rank."""
    values = [None] * RANKS
    dist.all_gather_object(values, value)
    return values


def agree(losses: list[float], expected: list[float]) -> None:
    assert max(abs(a - b) / b for a, b in zip(losses, expected)) < 1e-5, (losses, expected)


def all_ranks_have(model: nn.Module) -> None:
    """Asserts that the parameters are the same everywhere, to the bit."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    first, *others = gathered([p.detach().cpu() for p in whole])
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def chosen(report: ai3.Report, operation: str = "conv2d") -> list[str]:
    return [row.algorithm for row in report if row.operation == operation]


def is_ai3s(names: list[str]) -> bool:
    """Whether algorithms of ai3 run, made for the device."""
    return bool(names) and all(
        name not in ("torch", "fused") and name.endswith("@cpp") == (DEVICE == "cpu") for name in names
    )


@check
def ranks_that_build_at_once_build_once() -> None:
    """The core library and the kernels of an operation, into an empty cache folder."""
    built: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: built.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ai3_compile.builder")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    folder = FOLDER / "cache"
    with mock.patch.dict(os.environ, AI3_CACHE_DIR=str(folder)), mock.patch.object(core, "prebuilt", lambda: None):
        dist.barrier()
        core.load()
        ai3.swap_operation("linear", nn.Linear(4, 4).to(device()), "guess", (2, 4))
    logger.removeHandler(handler)
    names = [message.partition(" (")[0] for messages in gathered(built) for message in messages]
    assert names and len(names) == len(set(names)), names
    left = [path.name for path in folder.iterdir() if "building" in path.name or "damaged" in path.name]
    assert not left, left


@check
def ddp_trains_as_eager() -> None:
    """By Inductor, in the two graphs that DDPOptimizer makes of the network."""
    reference, model = parallel(), parallel()
    compiled = torch.compile(model, backend="ai3", options={"conv2d": OPTIONS["conv2d"]})
    agree(train(model, compiled), train(reference, reference))
    all_ranks_have(model)
    report = ai3.last_report()
    assert len(report.graphs) == 2 and {graph.rest for graph in report.graphs} == {"Inductor"}
    assert len(chosen(report)) == 3 and len(chosen(report, "linear")) == 3 and is_ai3s(chosen(report)), str(report)


@check
def ddp_trains_in_one_graph() -> None:
    with torch._dynamo.config.patch(optimize_ddp=False):
        reference, model = parallel(), parallel()
        agree(train(model, torch.compile(model, backend="ai3", options=OPTIONS)), train(reference, reference))
    all_ranks_have(model)
    assert len(ai3.last_report().graphs) == 1 and len(chosen(ai3.last_report(), "linear")) == 3


@check
def evaluation_between_steps_sees_the_new_weights() -> None:
    model = parallel()
    compiled = torch.compile(model, backend="ai3", options=OPTIONS)
    outputs = [evaluated(model, compiled)]

    def evaluate() -> None:
        for _ in range(2):  # by new packs, then by kept ones
            outputs.append(evaluated(model, compiled))
            assert relative_error(outputs[-1], evaluated(model, model.module)) < 2e-5
        assert relative_error(outputs[-1], outputs[-3]) > 1e-3, "the change must be one that shows"

    train(model, compiled, evaluate)
    assert is_ai3s(chosen(ai3.last_report()))


@check
def statistics_that_ddp_broadcasts_are_seen() -> None:
    """Ahead of a forward pass, into the buffers of all ranks but the first, and without raising their versions."""
    model = parallel()
    inner, outer = (torch.compile(m, backend="ai3", options=OPTIONS) for m in (model.module, model))

    def evaluate() -> None:
        statistics = model.module.norm.running_mean.clone()
        evaluated(model, inner)  # packs made with the rank's own statistics
        found = evaluated(model, outer)
        assert dist.get_rank() == 0 or not torch.equal(statistics, model.module.norm.running_mean)
        assert relative_error(found, evaluated(model, model.module)) < 2e-5

    train(model, outer, evaluate)


def sharded_model_is_evaluated(model: Net, forward: Callable[..., torch.Tensor]) -> None:
    """Against a network of the same shards, and again after changes that no optimizer makes; no packs are kept."""
    reference = sharded()
    held = core.load().ai3_core_packs_held()
    for _ in range(4):
        found = evaluated(model, forward)
        model.reshard()
        with torch.no_grad():
            for mine, other in zip(reference.parameters(), model.parameters()):
                mine.to_local().copy_(other.to_local())
            for mine, other in zip(reference.buffers(), model.buffers()):
                mine.copy_(other)
        assert relative_error(found, evaluated(reference, reference)) < 2e-5
        reference.reshard()
        with torch.no_grad():
            model.first.conv.weight.to_local().mul_(1.5)
            model.second.conv.weight.to_local().add_(0.1)
    assert core.load().ai3_core_packs_held() == held, "gathered weights must not be kept, in whatever form"


@check
def fsdp_trains_as_eager() -> None:
    """Compiled block by block, as FSDP2 is meant to be."""
    reference, model = sharded(), sharded()
    before = len(ai3.reports())
    for part in (model.first, model.second, model):
        part.compile(backend="ai3", options=OPTIONS)
    agree(train(model, model), train(reference, reference))
    all_ranks_have(model)
    names = [name for report in ai3.reports()[before:] for name in chosen(report)]
    assert is_ai3s(names)
    sharded_model_is_evaluated(model, model)


@check
def fsdp_compiled_as_a_whole_trains_as_eager() -> None:
    reference, model = sharded(), sharded()
    compiled = torch.compile(model, backend="ai3", options=OPTIONS)
    agree(train(model, compiled), train(reference, reference))
    sharded_model_is_evaluated(model, compiled)


@check
def swapped_modules_train_under_ddp_and_fsdp() -> None:
    def swap(model: Net) -> None:
        for operation in ("conv2d", "linear"):
            ai3.swap_operation(operation, model, OPTIONS["conv2d"] if operation == "conv2d" else "default")

    reference, model = parallel(), parallel()
    swap(model.module)
    agree(train(model, model), train(reference, reference))
    all_ranks_have(model)
    reference, model = sharded(), sharded(swap)
    agree(train(model, model), train(reference, reference))
    all_ranks_have(model)
    sharded_model_is_evaluated(model, model)
    sharded_model_is_evaluated(model, torch.compile(model, backend="ai3", options={"rest": "eager"}))


@check
def fsdp_trains_in_bfloat16_as_eager() -> None:
    def tower() -> nn.Module:
        torch.manual_seed(0)
        parts = (nn.Conv2d(3, 8, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        model = Tower(*parts).to(device())
        return fully_shard(model, mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    reference, model = tower(), tower()
    losses = train(model, torch.compile(model, backend="ai3", options={"rest": "eager"}))
    expected = train(reference, reference)
    assert max(abs(a - b) / b for a, b in zip(losses, expected)) < 2e-2, (losses, expected)
    all_ranks_have(model)
    assert {row.dtype for row in ai3.last_report() if row.operation == "conv2d"} == {"bfloat16"}


@check
def weights_that_a_collective_wrote_are_seen_after_invalidate() -> None:
    """PyTorch does not count such writes."""
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + dist.get_rank())
        compiled = torch.compile(model, backend="ai3", options=OPTIONS)
        evaluated(model, compiled)
        for parameter in model.parameters():
            dist.broadcast(parameter, 0)
    ai3.invalidate(model)
    all_ranks_have(model)
    assert relative_error(evaluated(model, compiled), evaluated(model, model)) < 2e-5


@check
def auto_is_measured_by_one_rank_and_chosen_by_all() -> None:
    """Ranks that come to an operation at once, and would find another algorithm the fastest each."""
    measured: list[str] = []

    def measure(spec: Any, candidates: list[Any], use: Any) -> dict[str, float]:
        measured.append(str(spec))
        time.sleep(0.3)
        own = [a.qualified for a in candidates if a.platform != "torch"]
        favourite = own[dist.get_rank() % len(own)]
        return {a.qualified: 1.0 if a.qualified == favourite else 2.0 for a in candidates}

    model = net().eval()
    with (
        mock.patch.dict(os.environ, AI3_CACHE_DIR=str(FOLDER / "tuned")),
        mock.patch.object(tuning, "_measure", measure),
    ):
        dist.barrier()
        evaluated(model, torch.compile(model, backend="ai3", options={**OPTIONS, "conv2d": "auto"}))
        names = chosen(ai3.last_report())
        report = ai3.swap_operation("conv2d", model, "auto", (2, 3, 16, 16))
    first, *others = gathered(names + chosen(report))
    assert is_ai3s(first) and all(other == first for other in others), (first, others)
    everywhere = [spec for specs in gathered(measured) for spec in specs]
    assert len(everywhere) == len(set(everywhere)) == 4, everywhere  # two shapes, in a graph and by themselves


@check
def all_ranks_chose_the_same() -> None:
    """In everything so far."""
    first, *others = gathered(SELECTED)
    assert len(first) > 20 and all(other == first for other in others)


@check
def a_rank_may_compile_alone() -> None:
    """And measure what it runs; the others wait for it elsewhere."""
    if dist.get_rank() == RANKS - 1:  # not the one of the first device
        with mock.patch.dict(os.environ, AI3_CACHE_DIR=str(FOLDER / "tuned")):
            model = Tower(nn.Conv2d(3, 5, 3), nn.ReLU()).to(device())
            ai3.swap_operation("conv2d", model, "auto", (2, 3, 9, 9))
            evaluated(model, torch.compile(model, backend="ai3", options={"relu": "auto", "rest": "eager"}))
    dist.barrier()


@check
def no_memory_of_other_devices_is_taken() -> None:
    others = set(range(torch.cuda.device_count())) - {dist.get_rank()} if DEVICE == "cuda" else ()
    assert not any(torch.cuda.max_memory_allocated(index) for index in others)


def main(given_device: str, folder: str) -> None:
    global DEVICE, FOLDER
    DEVICE, FOLDER = given_device, Path(folder)
    own, patience = None, datetime.timedelta(seconds=PATIENCE)
    if DEVICE == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("gloo" if own is None else "nccl", timeout=patience, device_id=own)
    with (FOLDER / f"{dist.get_rank()}.jsonl").open("w", buffering=1) as results:
        for name, function in CHECKS.items():
            torch._dynamo.reset()  # the reports as well
            start, error = time.perf_counter(), None
            try:
                function()
            except Exception:
                error = traceback.format_exc()
            rows = [row for report in ai3.reports() for row in report]
            SELECTED.extend((name, row.operation, row.name, row.input_shape, row.computed) for row in rows)
            line = {"check": name, "error": error, "seconds": round(time.perf_counter() - start, 2)}
            results.write(json.dumps(line) + "\n")
            if error is not None:
                sys.exit(1)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
