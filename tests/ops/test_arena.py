"""Buffers in one memory: nobody overwrites what is still needed, and what is no longer needed makes room."""

from __future__ import annotations

import random

import pytest

from fused_resnet.ops.arena import ALIGNMENT, Life, place


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


def test_what_one_step_reads_and_another_writes_is_apart():
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


@pytest.mark.parametrize("images", [1, 8])
def test_a_bottleneck_network_takes_no_more_than_its_fullest_step(images: int):
    """As ``NativeChain`` asks for ResNet-50's in float32: the stem, its pooling, and blocks whose sums overwrite their
    shortcuts."""
    lives: list[Life] = []

    def new(channels: int, size: int, step: int, last: int) -> None:
        lives.append(Life(4 * images * channels * size**2, step, last))

    new(64, 112, 0, 1)
    new(64, 56, 1, 3)
    step, size = 2, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        into = size if stage == 0 else size // 2
        first = step
        new(width, size, step + 1, step + 2)
        new(width, into, step + 2, step + 3)
        step += 4
        for _ in range(blocks - 1):
            new(width, into, step, step + 1)
            new(width, into, step + 1, step + 2)
            step += 3
        new(4 * width, into, first, step + (stage < 3))
        size = into
    assert assert_apart(lives) == most_at_once(lives)
