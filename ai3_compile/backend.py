"""The torch.compile backend `ai3`: options -> policy -> passes over the ATen graph -> Inductor or eager."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.eval_frame import innermost_fn
from torch._functorch.aot_autograd import get_aot_graph_name, make_boxed_func
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch.fx import Graph, GraphModule

from . import core, cuda_graph, on_gpu, passes, registry
from .backends import builder, gpu
from .errors import OptionError
from .options import Policy, check_options
from .passes.decompose import ACTIVATIONS, BATCH_NORM, RELU6
from .report import GraphReport, history, store
from .version import __version__

log = logging.getLogger(__name__)


class Ai3Backend:
    """What `torch.compile(model, backend="ai3")` calls for every graph that Dynamo captures."""

    __name__ = "ai3"

    def __call__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        *,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        policy = check_options(options)
        mode = policy.mode if mode is None else mode
        if mode is not None and policy.rest == "eager":
            raise OptionError(message=f"mode={mode!r} is a setting of Inductor, which rest={policy.rest!r} leaves out.")
        devices = {t.device.type for t in (*example_inputs, *gm.parameters()) if isinstance(t, torch.Tensor)}
        for name, reason in registry.cannot_run(devices).items():
            _say_once(f"platform {name} cannot run here, its algorithms are left out: {reason}")
        if registry.can_choose():
            core.load()  # a graph from Inductor's cache names its operations before any pass runs
        if any(isinstance(t, torch.nn.Parameter) and t.is_inference() for t in (*example_inputs, *gm.parameters())):
            _say_once(
                "the model's weights were made in torch.inference_mode, where PyTorch does not count their changes: "
                "they are packed anew at every call, which can take longer than computing. Make the model outside it."
            )
        compile_rest = {"auto": _with_either, "inductor": _with_inductor, "eager": _with_eager}[policy.rest]
        return compile_rest(gm, example_inputs, policy, mode)

    def reset(self) -> None:
        """Called by torch.compiler.reset(): forgets the reports and the packed weights."""
        history.clear()
        core.invalidate()


ai3 = Ai3Backend()


@functools.cache
def _say_once(message: str) -> None:
    log.warning("%s", message)


def _is_sharded(gm: GraphModule) -> bool:
    """Whether FSDP manages weights of the graph. It frees them after use and gathers them again, at addresses that
    others had, without raising their versions: nothing that is computed of them may be kept."""
    sources = (getattr(node, "_dynamo_source", None) for node in gm.graph.find_nodes(op="placeholder"))
    return any(source is not None and source.guard_source.is_fsdp_module() for source in sources)


def _static_inputs(is_inference: bool, is_sharded: bool) -> Sequence[int]:
    """Which inputs of the graph that is compiled are weights of which something may be kept."""
    tracing = TracingContext.try_get()
    metadata = tracing.fw_metadata if tracing is not None and is_inference and not is_sharded else None
    return () if metadata is None else metadata.static_input_indices


def _context(
    policy: Policy, report: GraphReport, static_inputs: Sequence[int], *, is_inference: bool, decompose: bool
) -> passes.Context:
    return passes.Context(
        policy=policy,
        system=registry.system(),
        report=report,
        is_inference=is_inference,
        decompose=decompose,
        static_inputs=static_inputs,
    )


class _LeftToInductor(Exception):
    """Ends a compilation for CUDA graphs of ai3's own, and says why they are to be Inductor's."""


class _Ai3Pass(CustomGraphPass):
    """ai3's passes as Inductor runs them: on both graphs, before its own passes after partitioning."""

    def __init__(
        self, policy: Policy, report: GraphReport, is_sharded: bool, captured_inputs: int | None = None
    ) -> None:
        """`captured_inputs`: how many the graph must have to be a CUDA graph of ai3's own; None where it is not to be
        one."""
        self.policy, self.report, self.is_sharded = policy, report, is_sharded
        self.captured_inputs = captured_inputs
        self.ran = False
        self.backward: GraphReport | None = None
        """Of the backward, which is compiled when it is first needed; None where it is left alone."""
        self.key: str | None = None
        """What the report of the backward is kept under."""
        before = inductor_config.post_grad_custom_pre_pass  # what the user set runs first
        self.before = before if isinstance(before, (list, tuple)) else [] if before is None else [before]

    def __call__(self, graph: Graph) -> None:
        for step in self.before:
            step(graph)
        name = get_aot_graph_name()
        if "backward" in name:
            if self.backward is None:
                passes.decompose.decompose_all(graph)
                return
            passes.run_backward(graph, _context(self.policy, self.backward, (), is_inference=False, decompose=True))
            if self.key is not None:
                store.save(self.key, self.backward)
            return
        self.ran = True
        is_inference = "inference" in name
        static = _static_inputs(is_inference, self.is_sharded)
        self.report.inputs = len(graph.find_nodes(op="placeholder"))
        self.report.static = list(static)
        if self.captured_inputs is not None:
            self._check_captures(graph)
        passes.run(graph, _context(self.policy, self.report, static, is_inference=is_inference, decompose=True))

    def _check_captures(self, graph: Graph) -> None:
        """Before the passes measure and choose: raises where it can be no CUDA graph of ai3's own."""
        tracing = TracingContext.try_get()
        obstacle = cuda_graph.obstacle(graph, None if tracing is None else tracing.fw_metadata)
        if self.report.inputs != self.captured_inputs:
            obstacle = "its inputs are made of others"
        if obstacle is not None:
            raise _LeftToInductor(obstacle)

    def uuid(self) -> str | None:
        """Everything that decides what the passes do; None (compile without a cache) where a function decides."""
        selectors = {name: selector.value for name, selector in self.policy.selectors.items()}
        if any(callable(value) for value in selectors.values()):
            return None
        before = [step.uuid() if isinstance(step, CustomGraphPass) else None for step in self.before]
        if None in before:
            return None
        policy = (selectors, self.policy.rest, self.policy.strict, self.policy.fuse, self.policy.max_workspace)
        key = (
            __version__,
            policy,
            registry.digest(),
            sorted(registry.system().platforms.items()),
            gpu.identity(),
            builder.cpu_isa(),
            torch.get_num_threads(),  # what is measured for `auto` depends on it
            self.is_sharded,
            self.captured_inputs,
            # Neither the graph says what autocast casts to, nor did PyTorch's own key in 2.11.
            [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)],
            before,
            self.key,  # another graph's backward would have no report
        )
        return hashlib.sha256(repr(key).encode()).hexdigest()


_KEPT_WHOLE = {BATCH_NORM, torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
# Training keeps Inductor's rules for them: nothing is fused there, and its partitioner saves fewer of the parts.
_KEPT_WHOLE_IN_INFERENCE = {*ACTIVATIONS, RELU6}


class _Decompositions(dict[Any, Any]):
    """Inductor's rules but those that take apart what the passes want to see whole.

    Pickles as the call that makes it: the table is part of Inductor's cache key, and its functions do not pickle.
    """

    def __init__(self, is_inference: bool) -> None:
        self.is_inference = is_inference
        kept = _KEPT_WHOLE | _KEPT_WHOLE_IN_INFERENCE if is_inference else _KEPT_WHOLE
        super().__init__((op, rule) for op, rule in select_decomp_table().items() if op not in kept)

    def __reduce__(self) -> tuple[type[_Decompositions], tuple[bool]]:
        return _Decompositions, (self.is_inference,)


def _backward_report(gm: GraphModule, example_inputs: Sequence[Any], policy: Policy) -> GraphReport | None:
    """The report, empty yet, of a backward in which the user has chosen algorithms; None where it is left alone."""
    if not _wants_gradients(gm, example_inputs) or not passes.backward.asked_for(policy):
        return None
    return GraphReport(f"backward of {_title(gm)}".removesuffix(" of "))


def _wants_gradients(gm: GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether AOTAutograd will make a backward graph."""
    tensors = (t for t in (*example_inputs, *gm.parameters()) if isinstance(t, torch.Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# Operations left to torch from which on Inductor runs them. The convolutional networks of torchvision leave at most 3,
# and Inductor's look at all inputs then takes 1 to 17 % of a call on one image, which eager does not; the transformers
# leave 52 and more, which eager runs in 8 to 14 % more time than Inductor.
_MANY = 8
_USERS_PASSES = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
)


class _ManyAreLeft(Exception):
    """More operations are left to torch than eager should run."""


def _with_either(
    gm: GraphModule, example_inputs: Sequence[Any], policy: Policy, mode: str | None
) -> Callable[..., Any]:
    """rest="auto": eager where the passes leave little, else Inductor, and where the user asks for what only it has."""
    asked_for = mode is not None or any(getattr(inductor_config, name, None) is not None for name in _USERS_PASSES)
    if not asked_for and not _wants_gradients(gm, example_inputs):
        pass_id = _Ai3Pass(policy, GraphReport(), _is_sharded(gm)).uuid()
        # Only what Inductor has compiled is in the store.
        if pass_id is None or store.load(store.key(gm, example_inputs, pass_id)) is None:
            with contextlib.suppress(_ManyAreLeft):
                return _with_eager(gm, example_inputs, policy, mode)
    return _with_inductor(gm, example_inputs, policy, mode)


def _with_inductor(
    gm: GraphModule, example_inputs: Sequence[Any], policy: Policy, mode: str | None, obstacle: str | None = None
) -> Callable[..., Any]:
    """`obstacle`: why CUDA graphs, where they are asked for, cannot be ai3's own."""
    report = GraphReport(_title(gm))
    report.rest, report.obstacle = "Inductor", obstacle
    patches = dict(list_mode_options(mode)) if mode else {}
    constants = [*gm.parameters(), *gm.buffers()]
    is_inference, is_on_gpu = not _wants_gradients(gm, example_inputs), on_gpu.is_on_gpu((*example_inputs, *constants))
    asked_for = patches.get("triton.cudagraphs", inductor_config.triton.cudagraphs)
    captures = obstacle is None and asked_for and is_inference and is_on_gpu and not _is_sharded(gm)
    inputs = len(constants) + len(example_inputs)
    if captures:
        patches["triton.cudagraphs"] = False
    ai3_pass = _Ai3Pass(policy, report, _is_sharded(gm), inputs if captures else None)
    patches["post_grad_custom_pre_pass"] = ai3_pass
    patches["freezing"] = False  # it packs convolutions for oneDNN before any pass could see them

    table = _Decompositions(is_inference)

    def compile_now() -> Callable[..., Any]:
        compiled = compile_fx(gm, example_inputs, config_patches=patches, decompositions=table)
        assert callable(compiled)
        return compiled

    key = store.key(gm, example_inputs, ai3_pass.uuid())
    backward = _backward_report(gm, example_inputs, policy)
    if backward is not None:
        backward.rest = "Inductor"
        ai3_pass.backward, ai3_pass.key = backward, f"{key}-backward"
    left: _LeftToInductor | None = None
    try:
        compiled = compile_now()
    except InductorError as error:
        if not isinstance(error.inner_exception, _LeftToInductor):
            raise
        left = error.inner_exception
    if left is not None:
        log.info("left to Inductor's CUDA graphs: %s", left)
        return _with_inductor(gm, example_inputs, policy, mode, str(left))
    if ai3_pass.ran:
        store.save(key, report)
    else:
        # Inductor took the graph from its cache, so no pass ran: what was decided then is in the store.
        saved = store.load(key)
        if saved is not None:
            report = saved
            if backward is not None and (before := store.load(f"{key}-backward")) is not None:
                backward.rows.extend(before.rows)
        else:
            log.info("recompiling without Inductor's cache: the report of this graph is not in %s", store.folder())
            patches["force_disable_caches"] = True  # of the backward as well, which is compiled later
            compiled = compile_now()
            store.save(key, report)
    # Its inputs may not be the graph's own, as where tensors are made of others: operations pack when they run.
    are_own = report.inputs == inputs
    history.add(report, continues=history.is_continuation(gm))
    if backward is not None:
        history.add(backward, continues=True)
    if not is_on_gpu:
        return compiled
    compiled, moved = innermost_fn(compiled), None  # Dynamo keeps out of what calls it
    static = report.static if are_own else []
    if captures:
        after = [index - len(constants) for index in static if index >= len(constants)]
        captured = cuda_graph.Captured(compiled, after, on_gpu.device_of((*example_inputs, *constants)).index)
        compiled, moved = captured, captured.forget
    return on_gpu.Guarded(
        compiled,
        static,
        constants=constants if are_own else (),
        calls=report.calls if are_own else (),
        moved=moved,
        max_workspace=policy.max_workspace,
    )


def _with_eager(gm: GraphModule, example_inputs: Sequence[Any], policy: Policy, mode: str | None) -> Callable[..., Any]:
    report = GraphReport(_title(gm))
    backward = _backward_report(gm, example_inputs, policy)
    is_sharded = _is_sharded(gm)

    def compiler(is_inference: bool) -> Callable[..., Any]:
        def compile_forward(forward: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            static = _static_inputs(is_inference, is_sharded)
            context = _context(policy, report, static, is_inference=is_inference, decompose=False)
            passes.run(forward.graph, context)
            left = len(passes.left_to_torch(forward.graph))
            if policy.rest == "auto" and left >= _MANY:
                raise _ManyAreLeft
            report.rest = _eager_rest(left)
            forward.recompile()
            run = forward.forward
            if on_gpu.is_on_gpu(inputs):
                run = on_gpu.Guarded(run, static, max_workspace=policy.max_workspace)
            return make_boxed_func(run)

        return compile_forward

    def compile_backward(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = graph_module.forward
        if backward is not None:
            context = _context(policy, backward, (), is_inference=False, decompose=False)
            passes.run_backward(graph_module.graph, context)
            backward.rest = _eager_rest(len(passes.left_to_torch(graph_module.graph)))
            graph_module.recompile()
            run = graph_module.forward
            if on_gpu.is_on_gpu(inputs):
                run = on_gpu.Guarded(run, (), max_workspace=policy.max_workspace)
        return make_boxed_func(run)

    compiled = aot_autograd(
        fw_compiler=compiler(is_inference=False),
        bw_compiler=compile_backward,
        inference_compiler=compiler(is_inference=True),
    )(gm, example_inputs)
    history.add(report, continues=history.is_continuation(gm))
    if backward is not None:
        history.add(backward, continues=True)
    return compiled


def _eager_rest(left: int) -> str:
    return f"eager PyTorch ({left} operation{'s' * (left != 1)})"


def _title(gm: GraphModule) -> str:
    """The line of the user's code that the graph begins with."""
    for node in gm.graph.nodes:
        if node.stack_trace:
            code = [line.strip() for line in node.stack_trace.splitlines() if line.strip(" ^~")]
            return code[-1]
    return ""
