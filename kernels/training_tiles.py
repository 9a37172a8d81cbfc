"""The tiles of the three convolutions of a training step, each seen as a matrix product: a pure function of its shape,
its dtype and the chip. Nothing is measured here; a measurement replaces the answer, not the model
(``chosen_tiles.py``).

============ ============== ============ ==================== ==========================================
product      rows           columns      depth                read for a step of the row operand
============ ============== ============ ==================== ==========================================
forward      N*OH*OW        filters      R*S*C                x
grad_input   N*H*W / phases C            R*S/phases*filters   dz and y
grad_weight  filters        R*S*C        N*OH*OW              dz and y (and x for a step of the columns)
============ ============== ============ ==================== ==========================================

The cost of a candidate, in cycles of a multiprocessor, is what the busiest one does. It works through its tiles in
waves of as many programs as it holds at a time. A wave takes START_CYCLES, for filling the pipeline and for the
epilogue, and then the largest of

- multiplications of all its tiles, padding included, at MATRIX_EFFICIENCY of the chip's best;
- bytes brought in from L2, every tile for itself, and those of the epilogues;
- latency: a step waits STEP_LATENCY, of which the stages of the pipeline hide all but one part.

How many programs there are at a time (occupancy) follows from threads, registers and shared memory. A product cut in
splits also pays for writing and adding the float32 partial results.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

from triton import cdiv, next_power_of_2

from fused_resnet.kernels.chosen_tiles import chosen, remembered
from fused_resnet.kernels.conv_tiles import (
    ALIGNMENT_BYTES,
    FULL_PRECISION_TILE,
    MAX_FLAT_CHANNELS,
    MAX_PADDING,
    MIN_STEP,
    SINGLE_STEP_BYTES,
    depth_step,
    padded,
)
from fused_resnet.kernels.device import Chip

# (rows, columns, warps)
CANDIDATES = (
    (128, 128, 8),
    (128, 64, 8),
    (64, 128, 8),
    (64, 64, 4),
    (128, 32, 4),
    (64, 32, 4),
    (32, 64, 4),
    (32, 32, 4),
    (16, 32, 2),
    (32, 16, 2),
    (16, 16, 1),
)
STAGES = (4, 3, 2)
STEP_BYTES = (128, 64, 32)
WEIGHT_STEP_ROWS = 64  # of dz, y and x in a step of grad_weight; 32 in float32
SMALL_TILE = 64 * 64
MAX_TILE = 128 * 128

MATRIX_EFFICIENCY = 0.6
STEP_LATENCY = 800
START_CYCLES = 1500
OVERHEAD_REGISTERS = 72  # addresses, masks, vectors
REGISTERS = 64 * 1024
THREADS = 2048
CHUNK_WAVES = 4  # programs of a kernel that leaves partial sums: so many waves at least, and less than twice as many
SPLIT_WAVES = 2
MAX_SPLITS = 1024


@dataclass(frozen=True)
class Product:
    """A convolution as a matrix product, and what its kernel reads and writes beside the product.

    Attributes:
        rows, columns: of the result (of one phase).
        taps: R*S, or those of an average phase.
        channels: the depth under one tap. For grad_weight, the rows N*OH*OW that it adds up.
        row_operands, column_operands: tensors read to make a tile of either operand.
        epilogue: tensors of the result's shape that are read or written at its end.
        phases: independent products of this shape (stride 2 has 4 of them in grad_input).
        splittable: the depth may be cut in splits, whose results are added by a second kernel.
        flat: the depth may be walked flat (kernels/patches.py).
        aligned: every row begins on 16 bytes.
        sums: most float32 sums of a thread that leave it the registers for all the rest: found by compiling for every
            chip (tests/kernels/test_ahead_of_time_training.py), not known from the source.
    """

    rows: int
    columns: int
    taps: float
    channels: int
    row_operands: int = 1
    column_operands: int = 1
    epilogue: int = 1
    phases: int = 1
    splittable: bool = False
    flat: bool = False
    aligned: bool = True
    sums: int = 64


@dataclass(frozen=True)
class Tiles:
    """The tile of one program, how it is compiled, and how the programs share the work.

    ``row_tiles``: consecutive tiles of rows that one program computes, so that few partial sums are left; ``splits``:
    the programs that share the depth of one tile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    flat: bool = False
    row_tiles: int = 1
    splits: int = 1

    def __str__(self) -> str:
        flat = " flat" if self.flat else ""
        shared = f", {self.row_tiles} row tiles" if self.row_tiles > 1 else ""
        shared += f", {self.splits} splits" if self.splits > 1 else ""
        return f"{self.rows}x{self.columns}x{self.depth}{flat}, {self.warps} warps, {self.stages} stages{shared}"


def aligned(element_bytes: int, *sizes: int) -> bool:
    """True if rows of so many elements all begin on 16 bytes."""
    return all(size * element_bytes % ALIGNMENT_BYTES == 0 for size in sizes)


@remembered
def training_tiles(product: Product, element_bytes: int, chip: Chip, *, full_precision: bool = False) -> Tiles:
    """The cheapest candidate that gives at least half of the multiprocessors a program, if one does: where the grid is
    small, the model counts on latencies that it does not know well. Or the candidate chosen from outside.

    ``full_precision``: float32 that may not be rounded to TF32.
    """
    if product.rows == 0 or product.columns == 0:
        raise ValueError(f"a product must have rows and columns; got {product}")
    step, flat = _step(product, element_bytes, full_precision)
    if full_precision:
        block_rows, block_columns, warps, stages = FULL_PRECISION_TILE
        candidates = [Tiles(block_rows, block_columns, step, warps, stages, flat)]
    else:
        candidates = [
            tiles
            for tiles in _candidates(product, step, flat)
            if _shared(product, tiles, element_bytes) <= chip.shared_bytes
        ]
    candidates = [split for tiles in candidates for split in _splits(product, tiles, element_bytes, chip)]
    if not product.splittable:
        candidates = [_with_row_tiles(product, tiles, element_bytes, chip) for tiles in candidates]
    key = (*map(_plain, astuple(product)), element_bytes, *map(_plain, astuple(chip)), int(full_precision))
    busy = [tiles for tiles in candidates if 2 * _tile_count(product, tiles) * tiles.splits >= chip.multiprocessors]
    cheapest = min(busy or candidates, key=lambda tiles: cycles(product, tiles, element_bytes, chip))
    return chosen("training", key, candidates, cheapest)


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _with_row_tiles(product: Product, tiles: Tiles, element_bytes: int, chip: Chip) -> Tiles:
    """As many tiles of rows for a program as leave CHUNK_WAVES waves of them."""
    programs = CHUNK_WAVES * chip.multiprocessors * occupancy(product, tiles, element_bytes, chip)
    return replace(tiles, row_tiles=max(int(_tile_count(product, tiles) / programs), 1))


def cycles(product: Product, tiles: Tiles, element_bytes: int, chip: Chip) -> float:
    """What the busiest multiprocessor spends: the model at the head of this file."""
    resident = occupancy(product, tiles, element_bytes, chip)
    steps = cdiv(_steps(product, tiles), tiles.splits)
    depth = steps * tiles.depth
    multiply = 2 * tiles.rows * tiles.columns * depth * (element_bytes / 2) / (MATRIX_EFFICIENCY * chip.flop_per_cycle)
    operands = (product.row_operands * tiles.rows + product.column_operands * tiles.columns) * depth * element_bytes
    result_bytes = 8 if tiles.splits > 1 else element_bytes * product.epilogue
    bring = (operands + tiles.rows * tiles.columns * result_bytes) / chip.l2_bytes_per_cycle
    latency = steps * STEP_LATENCY / (tiles.stages - 1)
    count = cdiv(_tile_count(product, tiles) * tiles.splits, chip.multiprocessors)
    whole_waves, rest = divmod(count, resident)
    total = whole_waves * (START_CYCLES + max(resident * max(multiply, bring), latency))
    if rest:
        total += START_CYCLES + max(rest * max(multiply, bring), latency)
    if tiles.splits > 1:
        partial = 8 * tiles.splits * product.rows * product.columns
        total += START_CYCLES + partial / chip.multiprocessors / chip.memory_bytes_per_cycle
    return total


def occupancy(product: Product, tiles: Tiles, element_bytes: int, chip: Chip) -> int:
    """Programs that one multiprocessor holds at a time: an estimate, as only the compiler knows the registers."""
    threads = 32 * tiles.warps
    sums = tiles.rows * tiles.columns / threads
    operand = product.row_operands * tiles.rows * tiles.depth * element_bytes / 4 / threads
    registers = min(OVERHEAD_REGISTERS + sums + operand, 255)
    by_shared = (chip.shared_bytes + 1024) // (_shared(product, tiles, element_bytes) + 1024)
    return max(1, min(THREADS // threads, int(REGISTERS / (registers * threads)), by_shared, 32))


def _candidates(product: Product, step: int, flat: bool) -> list[Tiles]:
    """Tiles no larger than the product, the smallest tile excepted; small ones where every element has an address of
    its own, which takes registers."""
    columns = _columns_of_a_tap(product, flat)
    most_rows, most_columns = (max(16, next_power_of_2(size)) for size in (product.rows, columns))
    small = flat or not product.aligned
    return [
        Tiles(rows, columns, step, warps, stages, flat)
        for rows, columns, warps in CANDIDATES
        for stages in STAGES
        if rows <= most_rows
        and columns <= most_columns
        and rows * columns <= min(SMALL_TILE if small else MAX_TILE, 32 * warps * product.sums)
    ]


def _step(product: Product, element_bytes: int, full_precision: bool) -> tuple[int, bool]:
    """(the depth of a step, whether the depth is walked flat)."""
    if product.splittable:
        rows = WEIGHT_STEP_ROWS * 2 // element_bytes
        rows = rows if product.aligned else rows // 4
        return (
            MIN_STEP if full_precision else max(MIN_STEP, min(rows, next_power_of_2(product.channels)))
        ), product.flat
    step_bytes = STEP_BYTES if product.aligned and product.row_operands == 1 else STEP_BYTES[1:]
    steps = [MIN_STEP] if full_precision else [max(count // element_bytes, MIN_STEP) for count in step_bytes]
    step = depth_step(product.channels, steps)
    flat = product.flat and product.taps > 1 and product.channels <= MAX_FLAT_CHANNELS
    flat = flat and padded(product.channels, step) > MAX_PADDING * product.channels
    if flat and not full_precision:
        step = SINGLE_STEP_BYTES // element_bytes
    return step, flat


def _splits(product: Product, tiles: Tiles, element_bytes: int, chip: Chip) -> list[Tiles]:
    """The same tiles with the depth cut so that one, two ... SPLIT_WAVES waves of programs share it."""
    if not product.splittable:
        return [tiles]
    resident = chip.multiprocessors * occupancy(product, tiles, element_bytes, chip)
    most = min(_steps(product, tiles), MAX_SPLITS)
    wanted = {min(max(waves * resident // _tile_count(product, tiles), 1), most) for waves in range(1, SPLIT_WAVES + 1)}
    return [replace(tiles, splits=splits) for splits in sorted({1} | wanted)]


def _steps(product: Product, tiles: Tiles) -> int:
    if product.splittable:
        return cdiv(product.channels, tiles.depth)
    if tiles.flat:
        return cdiv(math.ceil(product.taps * product.channels), tiles.depth)
    return max(math.ceil(product.taps * cdiv(product.channels, tiles.depth)), 1)


def _tile_count(product: Product, tiles: Tiles) -> int:
    """Programs for one split."""
    width = _columns_of_a_tap(product, tiles.flat)
    return cdiv(product.rows, tiles.rows) * (product.columns // width) * cdiv(width, tiles.columns) * product.phases


def _columns_of_a_tap(product: Product, flat: bool) -> int:
    """The columns of grad_weight are cut under each tap for itself, unless they lie flat."""
    return product.columns // int(product.taps) if product.splittable and not flat else product.columns


def _shared(product: Product, tiles: Tiles, element_bytes: int) -> int:
    operands = product.row_operands * tiles.rows + product.column_operands * tiles.columns
    return tiles.stages * operands * tiles.depth * element_bytes
