"""Residual blocks in a row as one call of C++: what is planned once for an input's shape, and run.

A convolution of a late stage takes as long as Python needs for thirty of its calls; between two of them the processor
waits. So the convolutions of a whole stage are handed over together, and with them where each activation lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.layout import is_channels_last
from fused_resnet.ops.native_conv import NativeConv, empty_channels_last, extension

INPUT, OUTPUT = 0, 1


@dataclass(frozen=True)
class Block:
    """``last(... convs(x)) + shortcut``, the ReLUs as each convolution has them."""

    convs: Sequence[NativeConv]
    downsample: NativeConv | None
    shortcut: bool
    """False: nothing is added."""


@dataclass
class _Step:
    conv: NativeConv
    shape: tuple[int, ...]  # of its input
    x: int
    residual: int
    out: int


class NativeChain:
    """The blocks on inputs of one shape and dtype. An activation that is added is overwritten by the sum, unless it is
    the chain's input.

    Raises:
        ValueError: a convolution does not take what it gets.
    """

    def __init__(self, blocks: Sequence[Block], x: Tensor) -> None:
        self._steps: list[_Step] = []
        self._shapes: list[tuple[int, ...]] = [tuple(x.shape)]  # of the activations
        self._free: list[int] = []
        self._dtype = x.dtype
        current = INPUT
        for block in blocks:
            current = self._add_block(block, current)
        self._out_shape = list(self._shapes[current])
        self._chain = self._in_order_of_memory(current)

    def __call__(self, x: Tensor) -> Tensor:
        """x: of the shape and dtype the chain was made for. Returns channels_last."""
        if not is_channels_last(x):
            x = x.contiguous(memory_format=torch.channels_last)
        out = empty_channels_last(self._out_shape, x.dtype)
        self._chain.run(x.data_ptr(), out.data_ptr())
        return out

    def _add_block(self, block: Block, x: int) -> int:
        shortcut = x
        if block.downsample is not None:
            shortcut = self._add(block.downsample, x)
        *convs, last = block.convs
        between = x
        for conv in convs:
            before, between = between, self._add(conv, between)
            if before != x:
                self._free.append(before)
        if not block.shortcut:
            out = self._add(last, between)
        else:
            private = shortcut not in (INPUT, between)
            out = self._add(last, between, shortcut, shortcut if private else None)
        self._free += [activation for activation in {x, between} - {INPUT, out}]
        return out

    def _add(self, conv: NativeConv, x: int, residual: int = -1, out: int | None = None) -> int:
        shape = conv.output_shape(self._shapes[x], self._dtype)
        if residual >= 0 and self._shapes[residual] != shape:
            raise ValueError(f"the shortcut's shape must be {shape}; got {self._shapes[residual]}")
        if out is None:
            out = self._take(shape)
        self._steps.append(_Step(conv, self._shapes[x], x, residual, out))
        self._shapes[out] = shape
        return out

    def _take(self, shape: tuple[int, ...]) -> int:
        """An activation that nobody reads any more and that was of this shape, else a new one."""
        for activation in self._free:
            if self._shapes[activation] == shape:
                self._free.remove(activation)
                return activation
        self._shapes.append(shape)
        return len(self._shapes) - 1

    def _in_order_of_memory(self, last: int) -> Any:
        """The chain in C++: the activation that is the result is the caller's, the others are the chain's."""
        others = [activation for activation in range(1, len(self._shapes)) if activation != last]
        places = {INPUT: INPUT, last: OUTPUT, -1: -1} | {activation: 2 + i for i, activation in enumerate(others)}
        sizes = [math.prod(self._shapes[activation]) * self._dtype.itemsize for activation in others]
        chain = extension().ConvChain(sizes)
        for step in self._steps:
            packed, relu, threads = step.conv.call(step.shape, self._dtype)
            images, _, height, width = step.shape
            operands = (places[step.x], places[step.residual], relu, places[step.out])
            chain.add(packed, images, height, width, threads, *operands)
        return chain
