"""Cases for kernels on GPUs that the common ones do not reach."""

from __future__ import annotations

import dataclasses

import torch

from ai3_compile.testing import calls
from ai3_compile.testing.cases import NONE, Conv, Pool

# Images whose rows are whole 16-byte parts, in which the window begins at a word or within one.
IMAGES = (
    Conv("image-within-a-word", 3, (23, 24), 20, (7, 7), batch=2, stride=(2, 2), padding=(3, 3, 3, 3)),
    Conv("image-at-a-word", 3, (51, 40), 66, (5, 5), stride=(4, 4), padding=(2, 2, 2, 2)),
    Conv("image-unpadded", 4, (19, 18), 8, padding=NONE),
    Conv("image-one-channel", 1, (20, 32), 5, (5, 3), stride=(1, 2), dilation=(2, 1), padding=(2, 0, 1, 1)),
)
# Windows side by side, of which a row is read at once: of images, and of some more channels.
PATCHES = (
    Conv("patches", 3, (34, 48), 36, (16, 16), batch=2, stride=(16, 16), padding=NONE),
    Conv("patches-beside", 5, (9, 24), 18, (3, 8), stride=(2, 8), padding=(1, 1, 0, 0)),
)
# What reaches the kernels that the common cases do not: tiles of 4x4 outputs, windows of 32 and 1024 pixels, and blocks
# for work that fills a GPU.
CONVS = (
    Conv("winograd-4x4", 37, (18, 19), 70),
    Conv("winograd-4x4-batch", 5, (17, 18), 6, batch=3, padding=(0, 2, 1, 1)),
    Conv("depthwise-dilation-vectors", 24, (9, 8), 24, dilation=(2, 2), padding=(2, 2, 2, 2), groups=24),
    *IMAGES,
    *PATCHES,
)
LARGE_DEPTHWISE = (
    Conv("depthwise-3x3-large", 64, (184, 185), 64, groups=64),
    Conv("depthwise-5x5-large", 64, (184, 185), 64, (5, 5), padding=(2, 2, 2, 2), groups=64),
    Conv("depthwise-3x3-stride-large", 64, (260, 261), 64, stride=(2, 2), groups=64),
    Conv("depthwise-5x5-stride-large", 64, (260, 261), 64, (5, 5), stride=(2, 2), padding=(2, 2, 2, 2), groups=64),
)
LOW_TILES, SQUARE_TILES = Conv("gemm-128x64", 8, (77, 78), 72), Conv("gemm-128x128", 8, (113, 115), 136)
FEW_CHANNELS = Conv("more-tiles-than-blocks", 3, (150, 260), 20, batch=2)
LOW_ROWS, SQUARE_ROWS, STRICT_ROWS = (6000, 72, 72), (13000, 72, 136), (9000, 72, 136)
FEW_ROWS, SOME_ROWS = (20, 1096, 800), (50, 75, 801)  # by 16 and by 32 columns a block
LARGE = {
    ("conv2d", "direct"): [(dtype, c) for dtype in ("float32", "float16", "bfloat16") for c in LARGE_DEPTHWISE],
    ("conv2d", "implicit gemm"): [
        *(("float16", LOW_TILES), ("tf32", LOW_TILES), ("bfloat16", SQUARE_TILES)),
        *((dtype, FEW_CHANNELS) for dtype in ("float16", "bfloat16", "tf32")),
    ],
    ("linear", "gemm"): [
        *(("float16", LOW_ROWS), ("bfloat16", LOW_ROWS), ("tf32", LOW_ROWS)),
        *(("float16", SQUARE_ROWS), ("tf32", SQUARE_ROWS), ("float32", STRICT_ROWS)),
    ],
    ("linear", "direct"): [
        (dtype, rows) for dtype in ("float16", "bfloat16", "tf32", "float32") for rows in (FEW_ROWS, SOME_ROWS)
    ],
}
POOLS = (
    Pool("window-of-vectors", 24, (9, 11), (6, 7)),
    Pool("window-of-a-block", 3, (36, 35), (33, 34)),
)
POINTWISE = (
    Conv("columns-below", 37, (9, 11), 18, (1, 1), batch=2, padding=NONE),
    Conv("columns-equal", 64, (20, 21), 32, (1, 1), padding=NONE),
    Conv("columns-above", 72, (20, 21), 72, (1, 1), padding=NONE),
    Conv("stride", 64, (9, 10), 72, (1, 1), stride=(2, 2), padding=NONE),
    Conv("groups", 128, (9, 10), 72, (1, 1), padding=NONE, groups=2),
    Conv("depth-divided", 1024, (7, 7), 128, (1, 1), batch=2, padding=NONE),
)
# As many tiles as multiprocessors, with the depth in one and several blocks.
LARGE_POINTWISE = (
    Conv("high-tiles", 64, (100, 101), 64, (1, 1), batch=2, padding=NONE),
    Conv("wide-tiles", 136, (100, 101), 128, (1, 1), batch=2, padding=NONE),
    Conv("channels-above-the-table", 4104, (5, 6), 40, (1, 1), padding=NONE),
)


def behind_a_norm(call: calls.Call, least: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A scale and a shift for the channels of a convolution's input, and what it gives in float64 where they, and what
    is at least `least` of them, are what it is to read."""
    channels, dtype = call.input.shape[1], call.input.dtype
    random = torch.Generator().manual_seed(channels)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (torch.randn(channels, dtype=kind, generator=random) + add for add in (1.5, 0.0))
    scale, shift = scale.to(call.input.device), shift.to(call.input.device)
    read = call.input.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    # clamp, unlike a maximum, keeps NaN.
    return scale, shift, dataclasses.replace(call, input=read.clamp(min=least)).compute(torch.float64)
