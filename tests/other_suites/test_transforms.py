"""torch.func's transforms and torch.utils.checkpoint's modes through our modules, beside PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torchvision.models import resnet

from fused_resnet import fuse
from tests.modules.compare import assert_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")


def block(kind: str, training: bool, tracked: bool = True) -> nn.Module:
    """torchvision's, with a projection, and without running statistics where a transform may not write to them."""
    norm = partial(nn.BatchNorm2d, track_running_stats=tracked)
    torch.manual_seed(0)
    if kind == "BasicBlock":
        downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm(4))
        return randomize(resnet.BasicBlock(3, 4, downsample=downsample, norm_layer=norm)).double().train(training)
    downsample = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), norm(8))
    return randomize(resnet.Bottleneck(3, 2, downsample=downsample, norm_layer=norm)).double().train(training)


def scalar(model: nn.Module, state: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, state, (x,)).square().sum()


TRANSFORMS: dict[str, Callable[[nn.Module, dict[str, Tensor], Tensor], Any]] = {
    "functional_call": lambda model, state, x: functional_call(model, {k: 1.5 * v for k, v in state.items()}, (x,)),
    "grad": lambda model, state, x: grad(partial(scalar, model))(state, x),
    "grad of grad": lambda model, state, x: grad(lambda y: grad(lambda z: scalar(model, state, z))(y).square().sum())(
        x
    ),
    "vjp": lambda model, state, x: vjp(lambda y: functional_call(model, state, (y,)), x)[1](
        torch.ones_like(functional_call(model, state, (x,)))
    ),
    "jvp": lambda model, state, x: jvp(lambda y: functional_call(model, state, (y,)), (x,), (x.sin(),)),
    "jacrev": lambda model, state, x: jacrev(lambda y: functional_call(model, state, (y,)).sum((1, 2, 3)))(x),
    "jacfwd": lambda model, state, x: jacfwd(lambda s: functional_call(model, state, (x * s,)).sum((1, 2, 3)))(
        x[0, 0, 0, 0]
    ),
    "vmap": lambda model, state, x: vmap(lambda y: functional_call(model, state, (y,)))(torch.stack([x, 2 * x])),
    "vmap of grad": lambda model, state, x: vmap(lambda y: grad(partial(scalar, model))(state, y[None]))(x),
    "ensemble": lambda model, state, x: vmap(lambda s: functional_call(model, s, (x,)))(
        {name: torch.stack([tensor, 1.25 * tensor]) for name, tensor in state.items()}
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str, kind: str, training: bool):
    theirs = block(kind, training, tracked=not training)
    ours = fuse(copy.deepcopy(theirs))
    x, outcomes = torch.randn(3, 3, 6, 5, dtype=torch.float64), []
    for model in (ours, theirs):
        for dtype in (torch.float64, torch.float32):
            state = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
            found = TRANSFORMS[transform](copy.deepcopy(model).to(dtype), state, x.to(dtype))
            outcomes.append(torch.utils._pytree.tree_leaves(found))
    for actual, expected, tolerance in ((outcomes[0], outcomes[2], None), (outcomes[1], outcomes[3], 1e-3)):
        names = [str(index) for index in range(len(expected))]
        assert_close(dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True)), tolerance)


def selective() -> Any:
    kept = [torch.ops.aten.convolution.default]

    def policy(context: Any, op: Any, *args: Any, **more: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


MODES: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "without early stop": lambda model, x: checkpoint(model, x, use_reentrant=False, early_stop=False),
    "debug": lambda model, x: checkpoint(model, x, use_reentrant=False, debug=True),
    "no check": lambda model, x: checkpoint(model, x, use_reentrant=False, determinism_check="none"),
    "selective": lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=selective),
    "sequential": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=False),
    "sequential, reentrant": lambda model, x: checkpoint_sequential(model, 2, x, use_reentrant=True),
    "nested": lambda model, x: checkpoint(
        lambda y: model[1](checkpoint(model[0], y, use_reentrant=False)), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_checkpoint(mode: str):
    """Output, gradients and running statistics, which move once."""
    torch.manual_seed(0)
    theirs = nn.Sequential(block("BasicBlock", True), nn.Conv2d(4, 3, 1, bias=False), block("Bottleneck", True))
    theirs = nn.Sequential(nn.Sequential(theirs[0], theirs[1]), theirs[2]).float()
    ours, x = fuse(copy.deepcopy(theirs)), torch.randn(3, 3, 6, 5)
    outcomes = []
    for model, run in ((ours, MODES[mode]), (theirs, lambda model, x: model(x))):
        given = x.clone().requires_grad_()
        out = run(model, given)
        out.square().sum().backward()
        found = {"output": out.detach(), "gradient of x": given.grad}
        found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
        outcomes.append(found | dict(model.named_buffers()))
    assert_close(*outcomes, tolerance=1e-3)
