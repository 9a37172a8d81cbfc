"""Where the buffers of steps that follow one another lie in one memory, as small as their lives allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes, as the memory itself is aligned (``csrc/cpu/buffers.h``)."""


@dataclass(frozen=True)
class Life:
    """Of a buffer of ``size`` bytes that step ``first`` writes and step ``last`` is the last to use."""

    size: int
    first: int
    last: int

    def meets(self, other: Life) -> bool:
        """Whether one step uses both; what a step reads must not lie where it writes."""
        return self.first <= other.last and other.first <= self.last


def place(lives: Sequence[Life]) -> tuple[list[int], int]:
    """Each buffer's offset in bytes, and the bytes of all together.

    The largest comes first, and each goes to the lowest place that is free for as long as it lives: greedy by size, of
    Pisarchyk and Lee, `Efficient Memory Management for Deep Neural Net Inference <https://arxiv.org/abs/2001.03288>`_.
    """
    offsets = [0] * len(lives)
    placed: list[int] = []
    for index in sorted(range(len(lives)), key=lambda index: (-lives[index].size, lives[index].first)):
        offset = 0
        for other in sorted((o for o in placed if lives[o].meets(lives[index])), key=lambda o: offsets[o]):
            if offset + lives[index].size <= offsets[other]:
                break
            offset = max(offset, _aligned(offsets[other] + lives[other].size))
        offsets[index] = offset
        placed.append(index)
    return offsets, max((offset + life.size for offset, life in zip(offsets, lives, strict=True)), default=0)


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
