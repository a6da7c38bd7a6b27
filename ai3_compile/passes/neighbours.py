"""What stands around an operation, as `select` sees the graph: what the passes behind it will make part of it."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from ..ops import OPERATIONS
from ..ops.activations import NUMBERS
from ..ops.conv2d import POOLED
from ..selection import OpSpec, Use
from .context import Context, is_ai3, only_user
from .decompose import BATCH_NORM
from .fuse import MATCHES, behind
from .prologue import prologue_of

aten = torch.ops.aten
_NORM = {BATCH_NORM, operator.getitem}
_FOLLOWING = {*_NORM, aten.relu.default}


def use_of(node: Node, spec: OpSpec, context: Context) -> Use:
    """How an operation will be called, with all that is behind it."""
    if not (context.is_inference and context.policy.fuse):
        return Use(in_graph=True)
    end = _behind_norm(node) if spec.operation == "conv2d" else node
    views, user = behind(end)
    residual = user is not None and _is_added(node, views[-1] if views else end, user)
    if user is not None and residual:
        _, user = behind(user)
    activation = next((name for name, matches in MATCHES.items() if user is not None and matches(user)), "identity")
    last = end if activation == "identity" else user
    if activation == "relu" and not context.policy.is_default("relu"):
        activation, last = "identity", None
    pooled = last is not None and not views and not residual and _is_pooled(last, context)
    return Use(True, has_norm=end is not node, residual=residual, activation=NUMBERS[activation], pooled=pooled)


def _is_pooled(result: Node, context: Context) -> bool:
    """Whether nothing but a max pooling of 2x2 pixels, which the user has left to the policy, reads a result."""
    pool = only_user(result)
    values = only_user(pool) if pool is not None else None
    spec = OPERATIONS["maxpool2d"].match(values) if values is not None else None
    if spec is None or spec.torch_only is not None or not context.policy.is_default("maxpool2d"):
        return False
    window = (*spec.kernel_size, *spec.stride, *spec.padding, *spec.dilation, spec.ceil_mode)
    return window == POOLED


def _behind_norm(node: Node) -> Node:
    """The result of the batch norm that nothing else than it reads an operation through, or the operation's own."""
    while (user := only_user(node)) is not None and user.target in _NORM:
        node = user
    return node


def _is_added(node: Node, result: Node, user: Node) -> bool:
    """Whether an addition of the operation's result and a tensor like it becomes part of the operation. Of two
    convolutions that are added it is the first that takes it."""
    if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return False
    others = [arg for arg in user.args if arg is not result]
    if len(others) != 1 or not isinstance(others[0], Node):
        return False
    mine, theirs = result.meta["val"], others[0].meta["val"]
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
        return False
    made_by = others[0]
    while made_by.target in _NORM and only_user(made_by) is not None and isinstance(made_by.args[0], Node):
        made_by = made_by.args[0]
    is_convolution = made_by.target is aten.convolution.default or is_ai3(made_by, "ai3::conv2d")
    return not (is_convolution and only_user(made_by) is not None and made_by < node)


def is_concatenated(node: Node) -> bool:
    """Whether nothing reads a convolution, behind what is folded into it, but concatenations of channels."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _FOLLOWING:
        return is_concatenated(users[0])
    return bool(users) and all(u.target is aten.cat.default and (*u.args, 0)[1] in (1, -3) for u in users)


def activation_ahead(node: Node, spec: OpSpec, context: Context) -> int | None:
    """Of the activation between a convolution and the batch norm ahead of it, where an algorithm can apply both as it
    reads them; None without such a norm, and where that becomes part of a convolution ahead of it."""
    if spec.kernel_size != (1, 1) or any(spec.padding):
        return None
    found = prologue_of(node)
    if found is None or (found.activation == "relu" and not context.policy.is_default("relu")):
        return None
    image = found.norm.args[0]
    assert isinstance(image, Node)
    if (image.target is aten.convolution.default or is_ai3(image, "ai3::conv2d")) and len(image.users) == 1:
        return None
    return NUMBERS[found.activation]
