"""What torch's products and functions need on a CPU to give the same bits every time.

oneMKL chooses the kernel of a vector function when it is called for the first time. If that call
comes from several threads at once, as torch makes it, one of them may run a kernel of low accuracy
for its share of that call (pytorch/pytorch#188792, oneMKL 2024.2, Intel processors). The first of
two equal checkpoints would then differ from the second by about 1e-4.
"""

from __future__ import annotations

from functools import cache

import torch

VECTOR_FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "exp", "expm1", "log", "log10", "log1p", "log2",
    "sin", "sqrt", "tan", "tanh",
)  # fmt: skip
"""What torch leaves to oneMKL (aten/src/ATen/cpu/vml.h)."""


@cache
def settle_kernels() -> None:
    """Let oneMKL choose its kernels with one thread, and keep its number of threads from now on."""
    # Said or not, the number is the same; said, oneMKL may no longer take fewer when it likes.
    torch.set_num_threads(torch.get_num_threads())
    for dtype in (torch.float32, torch.float64):
        for name in VECTOR_FUNCTIONS:
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype))
