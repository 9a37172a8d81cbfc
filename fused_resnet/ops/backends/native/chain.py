"""Residual blocks in a row, or a whole network, as one call of C++: planned once for an input's shape, and run.

Python between two kernels costs more than its own time, for the weights that stream through the caches throw it out of
them: some 0.1 ms for each module, where ResNet-50 as a whole takes 20. So everything is handed over together, and with
it where each activation lies: in one memory, where what nobody reads any more makes room (``arena.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import PoolSettings
from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.backends.native.arena import Life, place
from fused_resnet.ops.backends.native.conv import DoesNotFit, NativeConv, empty_channels_last, pooling_window
from fused_resnet.ops.layout import is_channels_last

INPUT, OUTPUT = 0, 1


@dataclass(frozen=True)
class Block:
    """``last(... convs(x)) + shortcut``, the ReLUs as each convolution has them."""

    convs: Sequence[NativeConv]
    downsample: NativeConv | None
    shortcut: bool
    """False: nothing is added."""


@dataclass(frozen=True)
class Ends:
    """What comes before the blocks of a network, a convolution and a max pooling, and behind them: the mean over all
    pixels and a last layer, a convolution of one pixel."""

    stem: NativeConv
    pool: PoolSettings
    last: NativeConv


@dataclass
class _Step:
    shape: tuple[int, ...]  # of its input
    x: int
    out: int
    conv: NativeConv | None = None
    residual: int = -1
    pool: PoolSettings | None = None
    """Neither ``conv`` nor ``pool``: the mean."""


class NativeChain:
    """The blocks on inputs of one shape and dtype. An activation that is added is overwritten by the sum, unless it is
    the chain's input.

    Raises:
        ValueError: a convolution does not take what it gets.
    """

    def __init__(self, blocks: Sequence[Block], x: Tensor, ends: Ends | None = None) -> None:
        self._steps: list[_Step] = []
        self._shapes: list[tuple[int, ...]] = [tuple(x.shape)]  # of the activations
        self._dtype = x.dtype
        current = INPUT
        if ends is not None:
            current = self._add_pool(ends.pool, self._add(ends.stem, current))
        for block in blocks:
            current = self._add_block(block, current)
        if ends is not None:
            current = self._add(ends.last, self._add_average(current))
        self._out_shape, self._has_pixels = list(self._shapes[current]), ends is None
        self._chain = self._in_order_of_memory(current)

    def __call__(self, x: Tensor) -> Tensor:
        """x: of the shape and dtype the chain was made for. Returns channels_last; with ``ends`` (N, K)."""
        if not is_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        out = empty_channels_last(self._out_shape, x.dtype)
        self._chain.run(x.data_ptr(), out.data_ptr())
        return out if self._has_pixels else out[:, :, 0, 0]

    def _add_block(self, block: Block, x: int) -> int:
        shortcut = x
        if block.downsample is not None:
            shortcut = self._add(block.downsample, x)
        *convs, last = block.convs
        between = x
        for conv in convs:
            between = self._add(conv, between)
        if not block.shortcut:
            return self._add(last, between)
        private = shortcut not in (INPUT, between)
        return self._add(last, between, shortcut, shortcut if private else None)

    def _add(self, conv: NativeConv, x: int, residual: int = -1, out: int | None = None) -> int:
        shape = conv.output_shape(self._shapes[x], self._dtype)
        if residual >= 0 and self._shapes[residual] != shape:
            raise DoesNotFit(f"the shortcut's shape must be {shape}; got {self._shapes[residual]}")
        if out is None:
            out = self._new(shape)
        self._steps.append(_Step(self._shapes[x], x, out, conv, residual))
        return out

    def _add_pool(self, pool: PoolSettings, x: int) -> int:
        out = self._new((*self._shapes[x][:2], *pool.output_size(self._shapes[x])))
        self._steps.append(_Step(self._shapes[x], x, out, pool=pool))
        return out

    def _add_average(self, x: int) -> int:
        images, channels, *_ = self._shapes[x]
        out = self._new((images, channels, 1, 1))
        self._steps.append(_Step(self._shapes[x], x, out))
        return out

    def _new(self, shape: tuple[int, ...]) -> int:
        self._shapes.append(shape)
        return len(self._shapes) - 1

    def _in_order_of_memory(self, last: int) -> Any:
        """The chain in C++: the activation that is the result is the caller's, the others are the chain's."""
        others = [activation for activation in range(1, len(self._shapes)) if activation != last]
        places = {INPUT: INPUT, last: OUTPUT, -1: -1} | {activation: 2 + i for i, activation in enumerate(others)}
        offsets, total = place([self._life(activation) for activation in others])
        chain = extension.ConvChain(total, offsets)
        most_threads = torch.get_num_threads()
        for step in self._steps:
            images, channels, height, width = step.shape
            x, residual, out = places[step.x], places[step.residual], places[step.out]
            if step.conv is not None:
                packed, relu, threads = step.conv.call(step.shape, self._dtype)
                chain.add(packed, images, height, width, threads, x, residual, relu, out)
            elif step.pool is not None:
                window = pooling_window(channels, step.pool, self._dtype)
                chain.add_max_pool(window, images, height, width, most_threads, x, out)
            else:
                pixel = pooling_window(channels, PoolSettings((1, 1), (1, 1)), self._dtype)
                chain.add_average(pixel, images, height, width, min(most_threads, images), x, out)
        return chain

    def _life(self, activation: int) -> Life:
        using = [i for i, step in enumerate(self._steps) if activation in (step.x, step.residual, step.out)]
        return Life(math.prod(self._shapes[activation]) * self._dtype.itemsize, using[0], using[-1])
