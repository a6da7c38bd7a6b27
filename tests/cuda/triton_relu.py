"""A relu in Triton, as a user would write it; Triton reads a kernel's source from its file."""

import triton
import triton.language as tl


@triton.jit
def kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count)
    tl.store(out + at, tl.maximum(value, 0.0), mask=at < count)
