"""Shapes that cover the domain of each operation; the names say what relation matters.

`equal`, `divides`, `below`, `above` are relations of a size to a register or transform tile: 48 or 64 columns of a
matrix kernel, 8 rows, 4 pixels of a Winograd tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ops.base import equal_paddings
from ..selection import OpSpec, TensorSpec


@dataclass(frozen=True)
class Conv:
    """An image [batch, channels, height, width], `out` filters of kernel; padding is top, bottom, left, right."""

    id: str
    channels: int
    size: tuple[int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    batch: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_shape(self) -> tuple[int, int, int, int]:
        extents = [
            (self.size[i] + sum(self.padding[2 * i : 2 * i + 2]) - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        ]
        return (self.batch, self.out, extents[0], extents[1])

    def attributes(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": equal_paddings(self.padding),
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def spec(self, dtype: torch.dtype, bias: bool) -> OpSpec:
        weight = TensorSpec((self.out, self.channels // self.groups, *self.kernel), dtype)
        attributes = {
            "weight": weight,
            "bias": TensorSpec((self.out,), dtype) if bias else None,
            **self.attributes(),
            "in_channels": self.channels,
            "out_channels": self.out,
            "kernel_size": self.kernel,
            "padding_mode": "zeros",
        }
        return OpSpec(
            "conv2d",
            self.id,
            (self.batch, self.channels, *self.size),
            self.output_shape(),
            dtype,
            "cpu",
            tuple(attributes.items()),
        )


NONE = (0, 0, 0, 0)

CONVS = (
    Conv("divides", 16, (8, 8), 64),
    Conv("equal-48-columns", 8, (6, 8), 48),
    Conv("equal-64-columns", 8, (8, 8), 64),
    Conv("below-columns", 5, (7, 9), 13),
    Conv("above-columns", 7, (9, 7), 101),
    Conv("below-rows", 16, (1, 3), 16),
    Conv("above-tile", 6, (9, 13), 10),
    Conv("below-tile", 4, (2, 2), 8),
    Conv("one-pixel-out", 9, (3, 3), 17, padding=NONE),
    Conv("one-channel", 1, (12, 11), 1),
    Conv("odd-channels", 3, (10, 10), 5),
    Conv("batch-3", 8, (7, 6), 12, batch=3),
    Conv("batch-17", 2, (5, 5), 3, batch=17),
    Conv("asymmetric-size", 4, (5, 31), 9),
    Conv("asymmetric-padding", 4, (9, 8), 7, padding=(0, 2, 1, 3)),
    Conv("no-padding", 8, (10, 9), 16, padding=NONE),
    Conv("padding-above-kernel", 3, (4, 4), 6, padding=(4, 4, 5, 5)),
    Conv("pointwise", 24, (7, 7), 50, (1, 1), padding=NONE),
    Conv("pointwise-padded", 6, (5, 5), 8, (1, 1)),
    Conv("pointwise-stride", 16, (9, 9), 24, (1, 1), stride=(2, 2), padding=NONE),
    Conv("stride-2", 8, (14, 14), 16, stride=(2, 2)),
    Conv("stride-asymmetric", 5, (13, 12), 6, stride=(3, 1)),
    Conv("stride-above-kernel", 4, (15, 15), 4, (2, 2), stride=(4, 5), padding=NONE),
    Conv("stem-7x7", 3, (23, 23), 64, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3)),
    Conv("stem-7x7-wide", 3, (31, 37), 64, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3), batch=2),
    Conv("stem-16", 3, (17, 33), 16, stride=(2, 2)),
    Conv("stem-11x11", 3, (40, 70), 40, (11, 11), stride=(4, 4), padding=(2, 2, 2, 2)),
    Conv("stem-above-columns", 1, (9, 15), 101, padding=(0, 2, 1, 3), dilation=(2, 1)),
    Conv("stem-padding-above-kernel", 2, (4, 8), 33, padding=(5, 4, 6, 5)),
    Conv("kernel-1x7", 6, (8, 12), 10, (1, 7), padding=(0, 0, 3, 3)),
    Conv("kernel-7x1", 6, (12, 8), 10, (7, 1), padding=(3, 3, 0, 0)),
    Conv("kernel-1x3", 20, (5, 11), 70, (1, 3), padding=(1, 1, 2, 0)),
    Conv("kernel-3x1-groups", 33, (11, 5), 18, (3, 1), padding=(1, 1, 0, 0), groups=3, batch=2),
    Conv("kernel-7x1-above-columns", 40, (9, 9), 65, (7, 1), padding=(4, 3, 1, 0)),
    Conv("kernel-5x5", 21, (9, 12), 66, (5, 5), padding=(2, 2, 2, 2)),
    Conv("kernel-5x5-groups", 34, (6, 7), 10, (5, 5), padding=(0, 4, 1, 3), groups=2, batch=2),
    Conv("kernel-even", 5, (9, 9), 7, (4, 2), padding=(1, 2, 0, 1)),
    Conv("kernel-is-input", 6, (5, 7), 11, (5, 7), padding=NONE),
    Conv("dilation", 4, (13, 14), 6, dilation=(2, 3), padding=(2, 2, 3, 3)),
    Conv("dilation-stride", 3, (15, 15), 5, stride=(2, 2), dilation=(2, 2), padding=(2, 2, 2, 2)),
    Conv("groups", 12, (7, 7), 18, groups=3),
    Conv("groups-odd", 15, (6, 6), 10, groups=5, batch=2),
    Conv("groups-stride", 8, (9, 9), 8, stride=(2, 2), groups=2),
    Conv("depthwise-divides", 64, (8, 8), 64, groups=64),
    Conv("depthwise-odd", 19, (9, 7), 19, groups=19, batch=2),
    Conv("depthwise-stride", 33, (11, 11), 33, stride=(2, 2), groups=33),
    Conv("depthwise-5x5", 20, (9, 9), 20, (5, 5), padding=(2, 2, 2, 2), groups=20),
    Conv("depthwise-5x5-wide", 40, (8, 16), 40, (5, 5), padding=(2, 2, 2, 2), groups=40, batch=2),
    Conv("depthwise-5x5-stride", 24, (13, 18), 24, (5, 5), stride=(2, 2), padding=(2, 2, 2, 2), groups=24),
    Conv("depthwise-7x7", 17, (8, 15), 17, (7, 7), padding=(3, 3, 3, 3), groups=17),
    Conv("depthwise-no-padding", 16, (5, 16), 16, groups=16, padding=NONE),
    Conv("depthwise-padding-above-half", 18, (6, 9), 18, padding=(2, 2, 2, 2), groups=18),
    Conv("depthwise-asymmetric-padding", 72, (8, 15), 72, stride=(2, 2), padding=(0, 1, 0, 1), groups=72),
    Conv("depthwise-dilation", 21, (11, 12), 21, dilation=(2, 2), padding=(2, 2, 2, 2), groups=21),
    Conv("depthwise-two-threads", 96, (24, 23), 96, groups=96),
    Conv("depthwise-multiplier", 6, (7, 7), 18, groups=6),
    Conv("deep", 512, (7, 7), 48),
)

FEW_CONVS = ("below-columns", "pointwise", "groups-odd", "depthwise-odd")


@dataclass(frozen=True)
class Pool:
    """A pooling window over [batch, channels, height, width]; padding is height, width."""

    id: str
    channels: int = 5
    size: tuple[int, int] = (9, 11)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None
    batch: int = 2

    def attributes(self, operation: str) -> dict[str, Any]:
        window: dict[str, Any] = {"kernel_size": self.kernel, "stride": self.stride, "padding": self.padding}
        window["ceil_mode"] = self.ceil_mode
        if operation == "maxpool2d":
            return {**window, "dilation": self.dilation, "return_indices": False}
        return {**window, "count_include_pad": self.count_include_pad, "divisor_override": self.divisor_override}


POOLS = (
    Pool("resnet", 64, (12, 12), padding=(1, 1)),
    Pool("equal-vector", 16, (8, 8), (2, 2)),
    Pool("above-vector", 37, (8, 8), (2, 2), batch=1),
    Pool("ceil", ceil_mode=True, size=(10, 8)),
    Pool("ceil-padded", ceil_mode=True, padding=(1, 1), size=(10, 8)),
    Pool("ceil-last-window-outside", ceil_mode=True, size=(4, 4), kernel=(1, 1), stride=(3, 3)),
    Pool("stride-1", stride=(1, 1), padding=(1, 1)),
    Pool("stride-above-kernel", kernel=(2, 2), stride=(3, 4)),
    Pool("asymmetric", kernel=(2, 5), stride=(1, 3), padding=(1, 2)),
    Pool("kernel-is-input", size=(6, 7), kernel=(6, 7)),
    Pool("2x2-wide", 24, (6, 18), (2, 2)),
    Pool("3x3-stride-2-odd", 40, (13, 17)),
    Pool("3x3-stride-2-ceil", 17, (16, 18), ceil_mode=True),
    Pool("3x3-stride-1-wide", 72, (8, 15), stride=(1, 1), padding=(1, 1)),
    Pool("two-threads", 64, (36, 37), padding=(1, 1)),
    Pool("one-channel", channels=1, batch=1),
)
MAX_POOLS = (
    *POOLS,
    Pool("dilation", dilation=(2, 3), size=(13, 14), padding=(1, 1)),
    Pool("dilation-ceil", dilation=(2, 2), size=(12, 11), ceil_mode=True, padding=(1, 1)),
)
AVG_POOLS = (
    *POOLS,
    Pool("without-padding-counted", padding=(1, 1), count_include_pad=False),
    Pool("without-padding-counted-ceil", padding=(1, 1), count_include_pad=False, ceil_mode=True, size=(10, 8)),
    Pool("divisor", divisor_override=7, padding=(1, 1)),
    Pool("divisor-ceil", divisor_override=2, ceil_mode=True, size=(10, 8)),
)
ADAPTIVE = (
    ((2, 5, 7, 9), (1, 1)),
    ((1, 64, 7, 7), (1, 1)),
    ((2, 16, 8, 8), (4, 2)),
    ((2, 17, 7, 5), (3, 4)),
    ((1, 3, 4, 4), (7, 7)),
    ((1, 33, 6, 6), (6, 6)),
    ((1, 40, 9, 9), (1, 1)),
    ((1, 1025, 9, 9), (1, 1)),
)
LINEARS = (
    # rows, in, out
    (1, 16, 48),
    (1, 300, 101),
    (2, 64, 64),
    (3, 7, 5),
    (8, 48, 48),
    (13, 33, 97),
    (50, 128, 200),
    (1, 4096, 10),
    (5, 4608, 40),
)
FEW_LINEARS = ((3, 7, 5), (13, 33, 97))
RELUS = ((1,), (15,), (16,), (17,), (4096,), (100_003,), (300_001,), (2, 5, 7, 9))
FLATTENS = ((3,), (2, 5), (2, 3, 4, 5), (1, 7, 1, 3), (2, 64, 7, 7), (2, 1, 3, 2, 2, 3, 1, 2))
