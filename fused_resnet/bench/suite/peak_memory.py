"""The most memory that a run holds beyond what was held before it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

import fused_resnet

RESET_PEAK = "5"  # what to write into clear_refs: the high-water mark becomes what is held now
RUNS = 3
"""On a CPU: of one of them, malloc may place a buffer beside the room that the buffer before has just left."""


def peak_bytes(run: Callable[[], object], device: torch.device | str) -> int | None:
    """Runs ``run`` again, which has run before, and gives the peak; None where the system does not tell.

    On a GPU: what PyTorch's allocator had handed out at the peak, less what it had before. A CUDA graph replays in
    memory that it holds anyway, and a peer's runtime has an allocator of its own: None for a run that asked PyTorch
    for nothing.

    On the CPU: how far the pages that this process holds grew (Linux only). Counted by the system, so it sees all that
    is allocated anew, by PyTorch, by oneDNN's scratch or by the buffers of this package, which PyTorch's own profiler
    does not see. Before the run, this package's cache and malloc's are given back. How malloc places what it hands out
    is in it, so the least of `RUNS` counts; of a small network it still differs by a fifth from process to process. A
    peer that keeps an arena between runs is seen to need little: its memory was held before, and nobody can ask for it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _of_gpu(run, device)
    peaks = [_of_process(run) for _ in range(RUNS)]
    return min((peak for peak in peaks if peak is not None), default=None)


def _of_gpu(run: Callable[[], object], device: torch.device) -> int | None:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak or None


def _of_process(run: Callable[[], object]) -> int | None:
    fused_resnet.ops.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc's; without it free memory is taken unseen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)  # which psutil does not do
    except OSError:
        return None
    before = _kibibytes("/proc/self/status", "VmRSS")
    result = run()
    peak = _kibibytes("/proc/self/status", "VmHWM")
    del result
    return None if before is None or peak is None else max(0, peak - before)


def _kibibytes(path: str, name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
