"""Runs the device code of ai3's own CUDA kernels on the CPU, so that it is tested where there is no GPU.

A .cu file becomes one shared library with the ordinary table of ai3/kernel.h, whose launches run on the CPU:

- Its host part is compiled as it is, with include/ai3/cuda.h before the one of kernels/include.
- Its device part is preprocessed, `asm` and `__shared__` are rewritten (source.py), and it is compiled with the
  compiler's calls before every access of memory (-fsanitize=thread, without its library).
- runtime.cpp runs a block or cluster at a time, every thread a fiber, in an order of the test's choice.

What is seen: results (the caller compares them); reads and writes outside of the call's buffers, of an input or of
shared memory; accesses that are not aligned to their size; two threads that access shared memory, one of them writing,
without a barrier between them; barriers and instructions of a warp that some of its threads do not reach; shared memory
that is used unwritten (it holds NaN); copies that are not waited for (they are done as late as they may be, or as
early); grids, blocks and shared memory that a GPU refuses, and blocks above a kernel's launch bounds.

For sm_90a (hopper.cpp: wgmma, barriers in shared memory, the tensor memory accelerator, clusters) it is besides: reads
of what a copy is still to write, copies that are not waited for, barriers that nothing arrives at or too much does,
what is written where a barrier is, accesses to a block of a cluster that has ended, what threads wrote and wgmma or the
accelerator reads without a fence between, and products that are not waited for (they are done as late as they may be,
or at once). Two warps, or a warp and a copy, that access shared memory, one of them writing, are put in order by the
barriers that they arrive at and wait for (order.cpp), or it is said that nothing does.

What is not: what the compilers for GPUs make of the code, registers, for sm_90a races within a warp, races in global
memory, and time. ptx.cpp, hopper.cpp and wgmma.cpp are models of PTX, by its documentation: passing means "these
numbers under this model".
"""

from __future__ import annotations

from .machine import ORDERS, Emulated, load, load_changed, load_hopper, of_hopper, unavailable

__all__ = ["ORDERS", "Emulated", "load", "load_changed", "load_hopper", "of_hopper", "unavailable"]
