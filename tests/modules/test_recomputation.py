"""A forward that backward runs again counts once; one that a hook happens to run during backward counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fused_resnet.modules import BasicBlock
from tests.modules.compare import assert_close, randomize, step


def block() -> nn.Module:
    torch.manual_seed(0)
    return randomize(BasicBlock(4, 4)).train()


def save_convolutions(context, op, *args, **kwargs) -> CheckpointPolicy:
    saved = op in (torch.ops.aten.convolution.default, torch.ops.fused_resnet.conv_stats.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def save_everything(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


WAYS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(save_convolutions),
    },
    "selective, all": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(save_everything),
    },
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_a_checkpoint_moves_the_statistics_once(settings):
    model, twin, x = block(), block(), torch.randn(3, 4, 8, 8)
    actual = step(model, lambda x: checkpoint(model, x, **settings), x)
    assert_close(actual, step(twin, twin, x))
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def test_a_forward_inside_a_backward_hook_moves_the_statistics():
    model, twin = block(), block()
    other = torch.randn(3, 4, 8, 8)

    def forward_of_the_model(grad: Tensor) -> None:
        with torch.enable_grad():
            model(other)

    x = torch.randn(3, 4, 8, 8, requires_grad=True)
    y = x * 2
    y.register_hook(forward_of_the_model)
    y.sum().backward()
    twin(other)
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert int(model.bn1.num_batches_tracked) == int(copy.deepcopy(twin).bn1.num_batches_tracked)


def test_a_hook_inside_a_checkpoint_moves_them_too():
    """The reentrant kind runs a backward inside its own."""
    model, twin, probe = block(), block(), block()
    x, other = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 4, 8, 8)

    def forward_of_the_model(grad: Tensor) -> None:
        model(other)

    def run(x: Tensor) -> Tensor:
        out = probe(x)
        if torch.is_grad_enabled():
            out.register_hook(forward_of_the_model)
        return out

    checkpoint(run, x, use_reentrant=True).sum().backward()
    twin(other)
    assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
