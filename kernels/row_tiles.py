"""Grids and tiles of the passes over a row-major (rows, channels) matrix: pure functions of its shape and the device.

A program owns a block of channels and a chunk of consecutive rows, and walks the chunk in tiles. Programs are numbered
with the channel blocks fastest, so that those running together read neighbouring memory.

Why these numbers (H100 and H200: 132 multiprocessors, 2048 threads and 64 Ki registers each, memory latency of roughly
700 ns, so about 25 KB must be in flight on every multiprocessor to use 4.3 TB/s):

- A block is at most 128 channels. In 16-bit data that is a run of 256 bytes, two full cache lines, and 16 lanes of 16
  bytes; more would only make every program load more of the per-channel vectors. Fewer channels take the next power
  of two, and the tile grows in rows instead.
- An elementwise tile is 2048 elements for 128 threads: 16 elements a thread, two 16-byte accesses of 16-bit data on
  each tensor. The passes compile to 56 to 90 registers: at least 640 threads, so 20 KB in flight for each tensor
  read, and those at the upper end read two.
  A chunk is one tile for small inputs and up to 8 for large ones (the per-channel vectors are loaded once a chunk), as
  long as 64 programs are left for each multiprocessor: at least four waves.
- A reduction tile is 2048 elements for 256 threads: 8 running sums of each kind a thread stay in registers (at most
  80). Software pipelining keeps three more tiles of 16-bit data, two of float32, in flight in shared memory: 8 to 48
  KB a program. 8 programs for each multiprocessor are one to three waves; a chunk is what is left. More programs would
  only lengthen the merge of the partial results.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

MAX_BLOCK_CHANNELS = 128
TILE_ELEMENTS = 2048

ELEMENTWISE_WARPS = 4
ELEMENTWISE_PROGRAMS = 64  # for each multiprocessor
ELEMENTWISE_MAX_TILES = 8  # in a chunk

REDUCTION_WARPS = 8
REDUCTION_PROGRAMS = 8  # for each multiprocessor
REDUCTION_STAGES = {2: 4, 4: 3}  # of the software pipeline, by the bytes of an element


@dataclass(frozen=True)
class RowTiles:
    """How the rows and channels are cut; ``chunk_rows`` is a multiple of ``block_rows``."""

    block_rows: int
    block_channels: int
    chunk_rows: int
    chunks: int
    channel_blocks: int

    @property
    def grid(self) -> tuple[int]:
        return (self.chunks * self.channel_blocks,)


def elementwise_tiles(rows: int, channels: int, multiprocessors: int) -> RowTiles:
    """For a pass that writes an activation."""
    block_rows, block_channels, channel_blocks = _block(channels)
    row_tiles = triton.cdiv(rows, block_rows)
    tiles = row_tiles * channel_blocks // (ELEMENTWISE_PROGRAMS * multiprocessors)
    chunk_rows = block_rows * min(max(tiles, 1), ELEMENTWISE_MAX_TILES)
    return RowTiles(block_rows, block_channels, chunk_rows, triton.cdiv(rows, chunk_rows), channel_blocks)


def reduction_tiles(rows: int, channels: int, multiprocessors: int) -> RowTiles:
    """For a pass that reduces over the rows; its chunks are the partial results."""
    block_rows, block_channels, channel_blocks = _block(channels)
    row_tiles = triton.cdiv(rows, block_rows)
    wanted_chunks = max(REDUCTION_PROGRAMS * multiprocessors // channel_blocks, 1)
    chunk_rows = block_rows * triton.cdiv(row_tiles, wanted_chunks)
    return RowTiles(block_rows, block_channels, chunk_rows, triton.cdiv(rows, chunk_rows), channel_blocks)


def _block(channels: int) -> tuple[int, int, int]:
    block_channels = min(triton.next_power_of_2(channels), MAX_BLOCK_CHANNELS)
    return TILE_ELEMENTS // block_channels, block_channels, triton.cdiv(channels, block_channels)
