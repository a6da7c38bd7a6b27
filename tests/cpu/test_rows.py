"""Linears take rows as they lie and attention its matrices, a bias behind a view is the product's: nothing is copied,
and what comes out has the values and the strides that it had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from .test_passes import capture, count, until


class Attend(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(24, 3, batch_first=batch_first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x, x, x, need_weights=False)[0] * 2


def encoder(layers: int = 1, **settings) -> nn.Module:
    made = [nn.TransformerEncoderLayer(24, 3, 48, batch_first=True, **settings) for _ in range(layers)]
    return nn.Sequential(*made)


# With how many copies by ai3's attention, whose result lies by images: of one that is to lie by tokens.
NETWORKS = {
    "encoder": (encoder, 0),
    "norm-first": (lambda: encoder(norm_first=True), 0),
    "two-layers": (lambda: encoder(2), 0),
    "batch-first": (lambda: Attend(True), 1),
    "batch-second": (lambda: Attend(False), 1),
}
LEFT = {"ours": {}, "linear": {"linear": "torch"}, "attention": {"attention": "torch"}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_copied(name, left):
    make, copies = NETWORKS[name]
    copies = 0 if left == "attention" else copies  # PyTorch's lies as the queries do
    seen = capture(make().eval(), torch.randn(2, 7, 24), **LEFT[left])
    assert count(seen["select"], "clone") > count(seen["copies"], "clone") == copies
    assert count(seen["bias"], "aten.mm") == 0


@pytest.mark.parametrize("shape", [(1, 7, 24), (3, 1, 24), (0, 7, 24)], ids=str)
def test_one_image_one_token_and_none(shape):
    capture(encoder().eval(), torch.randn(shape))


@pytest.mark.parametrize("rest", ["inductor", "eager"])
def test_a_network_has_the_strides_that_it_had(rest):
    model, x = encoder(2).eval(), torch.randn(2, 7, 24)
    with torch.no_grad():
        found, right = torch.compile(model, backend="ai3", options={"rest": rest})(x), model(x)
    torch.testing.assert_close(found, right)
    assert found.stride() == right.stride()
    torch._dynamo.reset()


def test_batches_that_change():
    model = encoder().eval()
    with torch.no_grad():
        run = torch.compile(model, backend="ai3", dynamic=True, options={"rest": "eager"})
        for batch in (2, 3, 5):
            x = torch.randn(batch, 7, 24)
            torch.testing.assert_close(run(x), model(x))
    torch._dynamo.reset()


class Turned(nn.Module):
    """A linear of rows in another order, and what reads its result."""

    def __init__(self, reads) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(6, 10), reads

    def forward(self, x: torch.Tensor) -> object:
        return self.reads(self.linear((x * 2).transpose(0, 1)))


# What reads a linear's result of 5 by 4 by 10, and how many copies there are: one ahead of the linear where it stays as
# it was, or of results for their strides.
READS = {
    "elementwise": (lambda y: y.relu(), 1),
    "reduced": (lambda y: y.relu().sum(-1).sum(0), 0),
    "turned-back": (lambda y: y.transpose(0, 1), 1),
    "turned-back-and-reduced": (lambda y: (y.transpose(0, 1) + torch.arange(4.0).view(4, 1, 1)).sum((0, 1)), 0),
    "a-copy": (lambda y: y.permute(2, 0, 1).contiguous(), 1),
    "split": (lambda y: y.view(5, 2, 2, 5, 2).relu().sum((1, 2)), 0),
    "joined": (lambda y: y.view(20, 10).relu(), 1),
    "joined-later": (lambda y: y.unsqueeze(2).reshape(20, 10), 1),
    "a-product": (lambda y: y @ y.mT, 1),
    "one-way": (lambda y: (y.relu().sum(0), y.view(20, 10).sum(0)), 1),
    "a-row": (lambda y: y[2].relu(), 0),
    "elementwise-then-joined": (lambda y: y.relu().view(20, 10).sum(0), 0),
    "elementwise-then-strided": (lambda y: y.relu().as_strided((3, 3), (10, 1), 7).sum(), 1),
    "itself": (lambda y: y, 1),
}


@pytest.mark.parametrize("read", READS)
def test_what_reads_the_result(read):
    reads, copies = READS[read]
    seen = capture(Turned(reads).eval(), torch.randn(4, 5, 6))
    assert count(seen["rows"], "clone") == copies
    is_kept = read in ("turned-back", "joined", "joined-later", "a-product", "one-way", "itself")
    assert (seen["rows"] == seen["select"]) == is_kept


def test_a_custom_operation_gets_the_strides_that_it_had():
    seen = []

    @torch.library.custom_op("ai3_test::rows_strides", mutates_args=())
    def strides(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.stride())
        return x.clone()

    strides.register_fake(torch.empty_like)
    capture(Turned(lambda y: strides(y.relu())).eval(), torch.randn(4, 5, 6))
    assert set(seen) == {(40, 10, 1)}


class Biased(nn.Module):
    def __init__(self, add) -> None:
        super().__init__()
        self.weight, self.bias, self.add = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(9)), add

    def forward(self, x: torch.Tensor) -> object:
        y = torch.mm(x, self.weight.t()).view(3, -1, 9)
        return self.add(y, self.bias)


@pytest.mark.parametrize(
    ("add", "taken"),
    [
        (lambda y, b: y + b, True),
        (lambda y, b: b + y, True),
        (lambda y, b: y + b * 2, True),
        (lambda y, b: (y + b, y), False),
        (lambda y, b: torch.add(y, b, alpha=2), False),
        (lambda y, b: y + b.double(), False),
        (lambda y, b: y + b[:1], False),
        (lambda y, b: y + y[0, 0], False),
        (lambda y, b: y.view(3, 4, 3, 3) + b[:3], False),
        (lambda y, b: y + 3, False),
    ],
    ids=["behind", "ahead", "computed", "twice", "scaled", "wider", "one-number", "itself", "other-sizes", "number"],
)
def test_a_bias_behind_a_view(add, taken):
    seen = capture(Biased(add).eval(), torch.randn(12, 6))
    assert (count(seen["bias"], "aten.addmm") == 1) == taken


def test_neither_where_the_user_wants_no_fusing():
    seen = capture(encoder().eval(), torch.randn(2, 7, 24), until("rows"), fuse=False)
    assert count(seen["rows"], "clone") == count(seen["select"], "clone")


def test_what_trains_stays_as_it_is():
    model, x = encoder(dropout=0.0), torch.randn(2, 7, 24, requires_grad=True)
    run = torch.compile(model, backend="ai3", options={"rest": "eager"})
    grads = torch.autograd.grad(run(x).square().sum(), (x, *model.parameters()))
    right = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    for a, b in zip(grads, right):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
