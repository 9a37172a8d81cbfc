"""Buffers in one memory: nobody overwrites what is still needed, and what is no longer needed makes room."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

import fused_resnet
from fused_resnet.ops.backends.native import chain as native_chain
from fused_resnet.ops.backends.native import conv as native_conv
from fused_resnet.ops.backends.native.arena import ALIGNMENT, Life, place


def most_at_once(lives: list[Life]) -> int:
    """What any placing needs at least."""
    steps = range(1 + max(life.last for life in lives))
    return max(sum(life.size for life in lives if life.first <= step <= life.last) for step in steps)


def assert_apart(lives: list[Life]) -> int:
    offsets, total = place(lives)
    for i, (life, offset) in enumerate(zip(lives, offsets, strict=True)):
        assert 0 <= offset <= total - life.size
        assert offset % ALIGNMENT == 0
        for other, place_of_other in zip(lives[:i], offsets[:i], strict=True):
            if life.meets(other):
                assert offset + life.size <= place_of_other or place_of_other + other.size <= offset
    return total


def test_nothing_needs_no_memory():
    assert place([]) == ([], 0)


def test_a_chain_of_equal_buffers_takes_two():
    lives = [Life(100, step, step + 1) for step in range(9)]
    offsets, total = place(lives)
    assert sorted(set(offsets)) == [0, 128]
    assert total == 228


def test_what_a_step_reads_is_apart_from_what_it_writes():
    assert assert_apart([Life(64, 0, 2), Life(64, 2, 3)]) == 128
    assert assert_apart([Life(64, 0, 1), Life(64, 2, 3)]) == 64


def test_a_small_buffer_goes_into_the_gap_that_two_large_ones_leave():
    lives = [Life(640, 0, 4), Life(320, 0, 1), Life(640, 2, 4), Life(64, 0, 1)]
    assert assert_apart(lives) == 1280


@pytest.mark.parametrize("seed", range(20))
def test_any_lives(seed: int):
    choose = random.Random(seed)
    lives = []
    for _ in range(40):
        first = choose.randrange(30)
        lives.append(Life(choose.choice([1, 64, 100, 4096, 10_000]), first, first + choose.randrange(6)))
    total = assert_apart(lives)
    assert total >= most_at_once(lives)
    assert total < sum(life.size for life in lives)


def test_a_whole_network_takes_what_its_fullest_step_does(monkeypatch):
    """ResNet-50's is the first convolution of its second stage: beside its input lie the shortcut and the output, half
    as large each. The sums of blocks overwrite their shortcuts."""
    if not native_conv.takes_dtype(torch.float32):
        pytest.skip("no kernels for torch.float32")
    asked: list[Sequence[Life]] = []
    monkeypatch.setattr(native_chain, "place", lambda lives: (asked.append(lives), place(lives))[1])
    x = torch.randn(2, 3, 64, 64)
    fused_resnet.freeze(fused_resnet.models.resnet50().eval(), x)(x)
    lives = list(asked[-1])
    stage_output = 2 * 256 * 16 * 16 * x.itemsize
    assert len(lives) > 30 and max(life.size for life in lives) == stage_output
    assert assert_apart(lives) == most_at_once(lives) == 2 * stage_output
