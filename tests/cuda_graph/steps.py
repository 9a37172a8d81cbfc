"""Training steps for the tests of ``graph_step``: a small network's, plain, and replayed by a stand-in for CUDA graphs.

The stand-in records the ATen calls of a step with the very tensors and numbers they got, and replays them. So on the
CPU too a learning rate is frozen, a replaced tensor is missed, and nothing in Python runs again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_resnet
from fused_resnet.cuda_graph.graph_step import graph_step

CPU = torch.device("cpu")
Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, capturable=CAPTURABLE),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, capturable=CAPTURABLE),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, capturable=CAPTURABLE),
}
CAPTURABLE = False


class RecordedCalls(TorchDispatchMode):
    """In the place of ``CudaGraph``. A recording runs its calls and then takes their effects back, as if it had not."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.seen: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def warm_up(self, run: Callable[[], Tensor], times: int) -> None:
        for _ in range(times):
            run()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        generator = torch.get_rng_state()
        try:
            with self:
                return run()
        finally:
            torch.set_rng_state(generator)
            for storage, saved in self.seen.values():
                storage.copy_(saved)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.seen.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def network(dropout: float = 0.0) -> nn.Module:
    block = fused_resnet.BasicBlock(8, 8)
    features = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), block, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*features, nn.Dropout(dropout), nn.Linear(8, 3))


def batches(count: int, device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 3, 8, 8, device=device), torch.arange(6, device=device) % 3) for _ in range(count)]


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All values that a step may change, copied."""
    state = {"rng": torch.get_rng_state(), **{f"model.{k}": v for k, v in model.state_dict().items()}}
    saved = optimizer.state_dict()
    state |= {f"state.{p}.{k}": v for p, entries in saved["state"].items() for k, v in entries.items()}
    state |= {f"group.{i}.{k}": v for i, group in enumerate(saved["param_groups"]) for k, v in group.items()}
    state |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return copy.deepcopy(state)


def assert_same(got: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert got[name] == value, name
        elif tolerance and value.is_floating_point():
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        else:
            assert torch.equal(got[name], value), name


def assert_trains_alike(make: Make, expect_captured: bool, experienced: bool = False, dropout: float = 0.0) -> None:
    model, data = network(dropout), batches(6)
    optimizer = make(model.parameters())
    if experienced:
        eager_step(model, optimizer, *data[5])
    twin = copy.deepcopy(model)
    twin_optimizer = make(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, other in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.grad = None if other.grad is None else other.grad.clone()
    before = everything(model, optimizer)
    step = graph_step(model, F.cross_entropy, optimizer, data[0])
    assert_same(everything(model, optimizer), before)
    assert step.captured is expect_captured
    losses, generator = [], torch.get_rng_state()
    for images, labels in data[:5]:
        losses.append(step(images, labels))
    ours = everything(model, optimizer)
    torch.set_rng_state(generator)
    expected = [eager_step(twin, twin_optimizer, images, labels) for images, labels in data[:5]]
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert len(set(losses)) == 5
    assert not losses[0].requires_grad
    assert_same(ours, everything(twin, twin_optimizer))
    assert step.captures == expect_captured


def replayed_and_plain(make: Make) -> tuple[Any, ...]:
    model = network()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    step = graph_step(model, F.cross_entropy, optimizer, batches(1)[0])
    return step, model, optimizer, twin, twin_optimizer
