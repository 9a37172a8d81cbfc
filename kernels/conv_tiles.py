"""The tile of a convolution seen as a matrix product, and how it walks the depth: a pure function of its shape, its
dtype and the device, unless somebody has measured (``chosen_tiles.py``).

The product is (rows, depth) x (depth, filters) with rows = N*OH*OW and depth = R*S*C. A program computes a tile of
``rows`` x ``filters`` and walks the depth in steps of ``depth``.

The cost of a candidate is what the busiest multiprocessor does: the number of tiles it gets (whole ones, so a grid of
133 tiles on 132 multiprocessors costs two), times the cycles of one tile. A tile's cycles are the larger of

- its multiplications, padding included, at FLOP_PER_CYCLE dense 16-bit ones (H100: 4096 at best; 60% is assumed), and
- the bytes it brings in, (rows + filters) * depth, and those of its output and residual, at BYTES_PER_CYCLE (an
  assumed 5.6 TB/s from L2 over 132 multiprocessors at 1.76 GHz),

plus START_CYCLES for filling the pipeline and for the epilogue. This prefers large tiles (fewer bytes for each
multiplication) until the grid no longer fills the device. These are estimates, not measurements: the plan measures.

The candidates stay within 99 KB, the shared memory of a program on the smallest chip named (sm_89), and keep their sums
in at most 64 registers a thread. A step is 128 bytes deep, one cache line of every row, whatever the dtype. In full
float32 there are no matrix instructions: 8 sums a thread keep the operands of the unrolled products in registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton

from fused_resnet.kernels.chosen_tiles import chosen, remembered

# (rows, filters, warps, stages)
CANDIDATES = (
    (128, 128, 8, 3),
    (128, 64, 4, 3),
    (64, 128, 4, 3),
    (64, 64, 4, 4),
    (128, 32, 4, 4),
    (64, 32, 4, 4),
    (32, 64, 4, 4),
    (32, 32, 4, 4),
    (16, 32, 2, 4),
    (128, 16, 4, 4),
    (64, 16, 4, 4),
)
FULL_PRECISION_TILE = (32, 32, 4, 2)
GROUP_ROWS = 8  # row tiles that pass under the same filters before the next filters come, to share them in L2

STEP_BYTES = (128, 64)
POINTWISE_STEP_BYTES = (128, 64, 32)
# Where rows do not begin on 16 bytes every element has an address and a mask of its own, and so it has in flat steps:
# more of them in a thread would spill.
ALIGNMENT_BYTES = 16
SINGLE_STEP_BYTES = 64
SINGLE_TILE = 64 * 64
MIN_STEP = 16  # the least that a matrix instruction takes
MAX_FLAT_CHANNELS = 64
MAX_PADDING = 1.25  # times the channels

FLOP_PER_CYCLE = 2500
BYTES_PER_CYCLE = 24
START_CYCLES = 1500


@dataclass(frozen=True)
class ConvTiles:
    """The tile of one program, and how it is compiled. ``flat``: a step may begin and end within a kernel's tap."""

    rows: int
    filters: int
    depth: int
    flat: bool
    warps: int
    stages: int

    def __str__(self) -> str:
        flat = " flat" if self.flat else ""
        return f"{self.rows}x{self.filters}x{self.depth}{flat}, {self.warps} warps, {self.stages} stages"


@remembered
def conv_tiles(
    rows: int,
    filters: int,
    channels: int,
    taps: int,
    element_bytes: int,
    multiprocessors: int,
    *,
    pointwise: bool = False,
    full_precision: bool = False,
) -> ConvTiles:
    """The cheapest candidate, or the one chosen from outside. ``full_precision``: float32 that may not be rounded to
    TF32."""
    key = (rows, filters, channels, taps, element_bytes, multiprocessors, int(pointwise), int(full_precision))
    step_bytes: tuple[int, ...] = POINTWISE_STEP_BYTES if pointwise else STEP_BYTES
    blocks: tuple[tuple[int, int, int, int], ...] = CANDIDATES
    if channels * element_bytes % ALIGNMENT_BYTES or filters * element_bytes % ALIGNMENT_BYTES:
        step_bytes = tuple(count for count in step_bytes if count <= SINGLE_STEP_BYTES)
        blocks = tuple(block for block in CANDIDATES if block[0] * block[1] <= SINGLE_TILE)
    if full_precision:
        step_bytes, blocks = (MIN_STEP * element_bytes,), (FULL_PRECISION_TILE,)
    depth = depth_step(channels, [max(count // element_bytes, MIN_STEP) for count in step_bytes])
    flat = not pointwise and channels <= MAX_FLAT_CHANNELS and padded(channels, depth) > MAX_PADDING * channels
    if flat:
        depth = MIN_STEP if full_precision else SINGLE_STEP_BYTES // element_bytes
    padded_depth = padded(taps * channels, depth) if flat else taps * padded(channels, depth)

    def cycles(candidate: ConvTiles) -> float:
        block_rows, block_filters = candidate.rows, candidate.filters
        tiles = triton.cdiv(rows, block_rows) * triton.cdiv(filters, block_filters)
        multiply = block_rows * block_filters * padded_depth * element_bytes / FLOP_PER_CYCLE
        elements = (block_rows + block_filters) * padded_depth + 2 * block_rows * block_filters
        tile = START_CYCLES + max(multiply, elements * element_bytes / BYTES_PER_CYCLE)
        return math.ceil(tiles / multiprocessors) * tile

    candidates = [ConvTiles(block[0], block[1], depth, flat, *block[2:]) for block in blocks]
    return chosen("conv_bn_act", key, candidates, min(candidates, key=cycles))


def depth_step(channels: int, steps: list[int]) -> int:
    """The first step that pads little, else the one that pads least."""
    for step in steps:
        if padded(channels, step) <= MAX_PADDING * channels:
            return step
    return min(steps, key=lambda step: padded(channels, step))


def padded(size: int, step: int) -> int:
    return triton.cdiv(size, step) * step
