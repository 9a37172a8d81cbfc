"""Where the kernels run: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import functools

import torch
import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True if TRITON_INTERPRET was set when triton was imported: the kernels then take CPU tensors, and nothing else."""

INTERPRETED_MULTIPROCESSORS = 2  # every program is a Python loop there: few of them, but more than one


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors that a grid should fill."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
