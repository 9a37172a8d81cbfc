"""Where the kernels run: on a GPU, or in Triton's interpreter on the CPU; and what a chip of each kind can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True if TRITON_INTERPRET was set when triton was imported: the kernels then take CPU tensors, and nothing else."""

INTERPRETED_MULTIPROCESSORS = 2  # every program is a Python loop there: few of them, but more than one


@dataclass(frozen=True)
class Chip:
    """What the cost model of ``training_tiles.py`` knows of a GPU; for each multiprocessor but the first.

    Attributes:
        multiprocessors: how many.
        shared_bytes: shared memory that one program may have.
        flop_per_cycle: of dense 16-bit matrix instructions with float32 sums, at best.
        l2_bytes_per_cycle, memory_bytes_per_cycle: what comes in from the L2 cache and from memory when all ask.
    """

    multiprocessors: int
    shared_bytes: int
    flop_per_cycle: int
    l2_bytes_per_cycle: float
    memory_bytes_per_cycle: float
    wgmma: bool = False
    """Matrix instructions take their operands from shared memory, which leaves registers for more sums."""
    tma: bool = False
    """A copy engine brings a tile of a matrix to shared memory by one instruction of one thread."""


CHIPS = {
    # A100: 1.41 GHz, 2.0 TB/s. RTX 3090: 1.7 GHz, 0.94 TB/s. L40S: 2.5 GHz, 0.86 TB/s. H200: 1.76 GHz, 4.3 TB/s
    # measured. RTX 5090: 2.4 GHz, 1.8 TB/s. Clocks and memory are the data sheets', L2 an assumed 60% of what they say.
    (8, 0): Chip(108, 163 * 1024, 2048, 28, 13.1),
    (8, 6): Chip(82, 99 * 1024, 512, 20, 6.7),
    (8, 9): Chip(142, 99 * 1024, 1024, 20, 2.4),
    (9, 0): Chip(132, 227 * 1024, 4096, 24, 18.5, wgmma=True, tma=True),
    (12, 0): Chip(170, 99 * 1024, 1024, 20, 4.4, tma=True),
}
INTERPRETED_CHIP = replace(CHIPS[8, 9], multiprocessors=INTERPRETED_MULTIPROCESSORS)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors that a grid should fill."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip's own numbers of multiprocessors and of shared memory; the rest of the newest kind named that is not
    newer."""
    if device.type != "cuda":
        return INTERPRETED_CHIP
    properties = torch.cuda.get_device_properties(device)
    kind = max((kind for kind in CHIPS if kind <= (properties.major, properties.minor)), default=min(CHIPS))
    return replace(
        CHIPS[kind],
        multiprocessors=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", CHIPS[kind].shared_bytes),
    )
