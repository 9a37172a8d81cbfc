"""A frozen model sees what is written to it, also from another thread, and leaves alone what is not its own."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import freeze
from fused_resnet.modules import BasicBlock, ConvBNAct2d
from tests.modules.compare import randomize


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(fused_resnet.models.cifar_resnet20()).eval()


@torch.no_grad()
def test_functional_call_counts_for_that_call_only():
    model, x = network(), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    before = frozen(x)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in frozen.state_dict().items()}
    assert (torch.func.functional_call(frozen, zeros, (x,)) == 0).all()
    assert torch.equal(frozen(x), before)


@torch.no_grad()
def test_a_call_beside_load_state_dict_sees_the_old_weights_or_the_new():
    one, other, x = network(1), network(2), torch.randn(1, 3, 16, 16)
    frozen = freeze(one, x)
    states = [{f"module.{name}": tensor for name, tensor in model.state_dict().items()} for model in (other, one)]
    expected = [freeze(model, x)(x) for model in (other, one)]
    done, seen = threading.Event(), []

    def call() -> None:
        while not done.is_set():
            seen.append(frozen(x))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for turn in range(30):
            frozen.load_state_dict(states[turn % 2])
            assert torch.equal(frozen(x), expected[turn % 2])
    finally:
        done.set()
        thread.join()
    assert seen
    assert all(any(torch.equal(out, state) for state in expected) for out in seen)


class Wrapper(nn.Module):
    """Calls a part of a network itself, and has things of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = fused_resnet.resnet18(num_classes=10)
        self.phase = nn.Parameter(torch.tensor([1 + 2j]))
        self.head = nn.Linear(10, 4, dtype=torch.float64)
        self.register_buffer("many", torch.tensor([16777217.0], dtype=torch.float64))
        self.volume = nn.Conv3d(1, 1, 3)
        self.ours = ConvBNAct2d(3, 4, 3)

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        x = clips.view(-1, *clips.shape[-3:])
        stem = self.net.relu(self.net.bn1(self.net.conv1(x)))
        flat = self.ours(x).view(len(x), -1)
        return stem, flat, self.head(self.net(x).double()), self.phase.imag, self.many, self.volume(x[:, None])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_not_of_a_site_is_left_as_it_is(dtype):
    model = randomize(Wrapper()).eval()
    clips = torch.randn(2, 3, 40, 40)
    frozen = freeze(model, clips, dtype=dtype)
    for (name, mine), theirs in zip(frozen.module.state_dict().items(), model.state_dict().values(), strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride() and torch.equal(mine, theirs), name
    for actual, expected in zip(frozen(clips), model(clips), strict=True):
        assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
        tolerance = 1e-4 if dtype is None else 0.1 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance)


@torch.no_grad()
def test_freed_storage_raises():
    block = freeze(randomize(BasicBlock(4, 4)).eval(), torch.randn(1, 4, 8, 8))
    x = torch.randn(1, 4, 8, 8)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        block(x)
    y = torch.randn(1, 4, 8, 8)
    block(y)
    block.module.conv1.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        block(y)


@torch.no_grad()
def test_made_inside_inference_mode_it_still_counts():
    model, x = network(), torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        frozen = freeze(model, x)
        frozen.module.fc.bias.add_(1)
        out = frozen(x)
    model.fc.bias.add_(1)
    torch.testing.assert_close(out.clone(), model(x), rtol=1e-4, atol=1e-4)
