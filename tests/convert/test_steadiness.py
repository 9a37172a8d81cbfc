"""What many calls must not change: the bits of results, whoever computes meanwhile, and the memory of the process."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet

from fused_resnet import freeze, fuse
from tests.modules.compare import randomize

STATM = Path("/proc/self/statm")
PAGE = 4096
GROWTH = 4 << 20
"""Bytes that Python and the allocator may take by the way: 300 calls that leak an image of 64x64 each are 14 MiB."""
SIZES = [(images, height, width) for images in (1, 2, 3) for height in (17, 32, 47) for width in (24, 33, 64)]


def network(stages: int = 2) -> nn.Module:
    """torchvision's, of one or two stages; the others are empty."""
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    for stage in range(stages + 1, 5):
        setattr(model, f"layer{stage}", nn.Sequential())
    model.fc = nn.Linear(64 * 2 ** (stages - 1), 5)
    return randomize(model).to(memory_format=torch.channels_last)


def images(size: tuple[int, int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count, height, width = size
    return torch.randn(count, 3, height, width, generator=generator).to(memory_format=torch.channels_last)


def at_once(tasks: list[Callable[[], None]]) -> None:
    """Runs each on a thread of its own, all of them together; the first error is raised."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            torch.set_num_threads(1)
            start.wait()
            task()
        except BaseException as error:
            errors.append(error)

    start = threading.Barrier(len(tasks))
    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def trained(model: nn.Module, steps: int, seed: int) -> list[Tensor]:
    """The model's state and the last gradient of its input."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(steps):
        x = images((4, 33, 24), seed + step).requires_grad_()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [*(tensor.detach().clone() for tensor in model.state_dict().values()), x.grad]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_eight_threads_on_a_frozen_model(one_thread):
    fast = freeze(network(), images(SIZES[0]))
    expected = {size: fast(images(size)) for size in SIZES}

    def calls(seed: int) -> None:
        for size in random.Random(seed).sample(SIZES, len(SIZES)):
            assert torch.equal(fast(images(size)), expected[size]), size

    at_once([lambda seed=seed: calls(seed) for seed in range(8)])


def test_four_trainings_two_at_a_time(one_thread):
    models = [fuse(network()).train() for _ in range(4)]
    alone = [trained(copy.deepcopy(model), 3, 10 * index) for index, model in enumerate(models)]
    together: dict[int, list[Tensor]] = {}
    for pair in ((0, 1), (2, 3)):
        at_once([lambda i=i: together.update({i: trained(models[i], 3, 10 * i)}) for i in pair])
    for index, expected in enumerate(alone):
        assert_same_bits(together[index], expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_repeats(one_thread, threads: int):
    torch.set_num_threads(threads)
    fast, start, x = freeze(network(), images(SIZES[0])), fuse(network()).train(), images((2, 32, 33))
    expected, result = trained(copy.deepcopy(start), 1, 0), fast(x)
    for _ in range(8):
        assert torch.equal(fast(x), result)
        assert_same_bits(trained(copy.deepcopy(start), 1, 0), expected)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * PAGE


@pytest.mark.skipif(not STATM.exists(), reason="no /proc")
def test_memory_of_frozen_calls_of_varying_sizes(one_thread):
    fast, order = freeze(network(), images(SIZES[0])), random.Random(0)
    for size in 3 * SIZES:
        fast(images(size))
    before = resident()
    for _ in range(300):
        fast(images(order.choice(SIZES)))
    assert resident() - before < GROWTH


@pytest.mark.skipif(not STATM.exists(), reason="no /proc")
def test_memory_of_training_steps(one_thread):
    model = fuse(network(stages=1)).train()
    trained(model, 20, 0)
    before = resident()
    trained(model, 100, 0)
    assert resident() - before < GROWTH
