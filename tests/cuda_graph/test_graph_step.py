"""``graph_step`` against a plain loop: uncaptured, and replayed by a stand-in for CUDA graphs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.cuda_graph.graph_step import graph_step
from fused_resnet.cuda_graph.training_state import TrainingState, add_state, reset_state
from tests.cuda_graph import steps
from tests.cuda_graph.steps import (
    CPU,
    OPTIMIZERS,
    Make,
    assert_same,
    assert_trains_alike,
    batches,
    eager_step,
    everything,
    network,
    replayed_and_plain,
)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_on_the_cpu_a_step_is_the_plain_step(make: Make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_trains_alike(make, expect_captured=False, dropout=0.5)


@pytest.mark.parametrize("experienced", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_replayed_step_is_the_plain_step(recorded: None, make: Make, experienced: bool):
    assert_trains_alike(make, expect_captured=True, experienced=experienced, dropout=0.5)


def test_the_step_says_why_it_is_not_captured():
    model = network()
    step = graph_step(model, F.cross_entropy, OPTIMIZERS["sgd"](model.parameters()), batches(1)[0])
    assert (step.captured, step.captures) == (False, 0)
    assert step.reason == "the example is on cpu; CUDA graphs need a CUDA device"


@pytest.mark.parametrize("experienced", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_restoring_leaves_no_trace_and_no_new_address(make: Make, experienced: bool):
    model, (batch, other) = network(dropout=0.5), batches(2)
    optimizer = make(model.parameters())
    if experienced:
        eager_step(model, optimizer, *batch)
    before = everything(model, optimizer)
    values = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    values += [v for entries in optimizer.state.values() for v in entries.values()]
    addresses = [value.data_ptr() for value in values]
    state = TrainingState(list(model.modules()), optimizer, CPU)
    for _ in range(2):
        for _ in range(3):
            eager_step(model, optimizer, *other)
        optimizer.param_groups[0]["lr"] = 7.0
        created = state.restore()
        assert_same(everything(model, optimizer), before)
    again = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    again += [v for entries in optimizer.state.values() for v in entries.values()]
    assert all(one is two for one, two in zip(again, values, strict=True))
    assert [value.data_ptr() for value in again] == addresses
    assert len(created) == (0 if experienced or make is OPTIMIZERS["sgd"] else len(list(model.parameters())))


@pytest.mark.parametrize("make", [OPTIMIZERS["nesterov"], OPTIMIZERS["adamw"]], ids=["nesterov", "adamw"])
def test_reset_state_gives_a_fresh_optimizers_next_step(make: Make):
    model, data = network(), batches(2)
    twin = copy.deepcopy(model)
    optimizer, fresh = make(model.parameters()), make(twin.parameters())
    before = TrainingState(list(model.modules()), optimizer, CPU)
    eager_step(model, optimizer, *data[0])
    created = before.restore()
    reset_state(optimizer, created, before)
    assert not optimizer.state
    add_state(optimizer, created)
    for batch in data:
        eager_step(model, optimizer, *batch)
        eager_step(twin, fresh, *batch)
    assert_same(everything(model, optimizer), everything(twin, fresh))
    assert all(optimizer.state[p][name] is v for p, entries in created.items() for name, v in entries.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: torch.optim.NAdam(p, capturable=True),
        lambda p: torch.optim.Rprop(p, capturable=True),
    ],
    ids=["dampening", "nadam", "rprop"],
)
def test_state_that_does_not_start_from_zeros_needs_a_step_first(recorded: None, make: Make):
    model, (batch,) = network(), batches(1)
    optimizer = make(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="Take one step without graph_step first"):
        graph_step(model, F.cross_entropy, optimizer, batch)
    assert_same(everything(model, optimizer), before)
    assert_trains_alike(make, expect_captured=True, experienced=True)


def freeze_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries["momentum_buffer"] += 1
    optimizer.load_state_dict(state)


def replace_buffer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[1].running_mean = torch.ones(8)  # type: ignore[index,union-attr]


def add_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[0]
    optimizer.add_param_group({"params": [group["params"].pop()], "lr": 0.01})


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "lr": lambda model, optimizer: optimizer.param_groups[0].update(lr=0.3),
    "weight_decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.1),
    "mode": lambda model, optimizer: model[2].eval(),
    "requires_grad": freeze_first,
    "loaded state": load_state,
    "buffer": replace_buffer,
    "moved": lambda model, optimizer: setattr(model[0].weight, "data", model[0].weight.data.clone() + 1),
    "group": add_group,
}


@pytest.mark.parametrize("first", [True, False], ids=["before the first step", "in training"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_graph_has_frozen_may_change(recorded: None, change: Callable[[Any, Any], object], first: bool):
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["momentum"])
    data = batches(5)
    for index, batch in enumerate(data):
        if index == (0 if first else 2):
            change(model, optimizer)
            change(twin, twin_optimizer)
        assert torch.equal(step(*batch), eager_step(twin, twin_optimizer, *batch))
        assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    loads_nothing = first and change is load_state
    assert step.captures == (1 if loads_nothing else 2)


def test_new_values_in_place_need_no_new_graph(recorded: None):
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["momentum"])
    weights = network().state_dict()
    for batch in batches(2):
        model.load_state_dict(weights)
        twin.load_state_dict(weights)
        assert torch.equal(step(*batch), eager_step(twin, twin_optimizer, *batch))
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    assert step.captures == 1


def test_a_scheduler_works_and_does_not_complain(recorded: None):
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["nesterov"])
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (optimizer, twin_optimizer)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(4):
            assert torch.equal(step(*batch), eager_step(twin, twin_optimizer, *batch))
            for schedule in schedules:
                schedule.step()
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))


def test_two_steps_of_one_model_share_its_state(recorded: None):
    """Such as one for the last, smaller batch: each makes state for itself, and whichever runs first decides."""
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["momentum"])
    batch = batches(1)[0]
    small = tuple(tensor[:4] for tensor in batch)
    step_small = graph_step(model, F.cross_entropy, optimizer, small)
    for run, inputs in ((step, batch), (step_small, small), (step, batch), (step_small, small)):
        assert torch.equal(run(*inputs), eager_step(twin, twin_optimizer, *inputs))
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    assert (step.captures, step_small.captures) == (1, 2)


def test_losses_and_new_gradients_are_kept_apart(recorded: None):
    step, model, optimizer, *_ = replayed_and_plain(OPTIMIZERS["sgd"])
    first, second = batches(2)
    loss = step(*first)
    value = loss.item()
    gradient = model[0].weight.grad
    step(*second)
    assert loss.item() == value
    assert model[0].weight.grad is gradient  # static, as documented
    optimizer.param_groups[0]["lr"] = 0.2
    step(*second)
    assert model[0].weight.grad is not gradient


# On a real device


@pytest.mark.gpu
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_on_the_device_a_replay_is_the_plain_step(
    monkeypatch: pytest.MonkeyPatch, make: Make, autocast_dtype: torch.dtype | None
):
    monkeypatch.setattr(steps, "CAPTURABLE", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda", torch.cuda.current_device())
    model = network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches(5, device)]
    before = {"cuda": torch.cuda.get_rng_state(device), **everything(model, optimizer)}
    step = graph_step(model, F.cross_entropy, optimizer, data[0], autocast_dtype=autocast_dtype)
    assert (step.captured, step.reason) == (True, "")
    assert_same({"cuda": torch.cuda.get_rng_state(device), **everything(model, optimizer)}, before)
    # cuDNN may sum weight gradients in another order; Adam's first steps make lr of the smallest of gradients.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if autocast_dtype is None else {"rtol": 3e-2, "atol": 3e-2}
    for index, (images, labels) in enumerate(data):
        if index == 3:
            for group in (*optimizer.param_groups, *twin_optimizer.param_groups):
                group["lr"] *= 0.5
        twin_optimizer.zero_grad()
        with torch.autocast("cuda", autocast_dtype, enabled=autocast_dtype is not None):
            expected = F.cross_entropy(twin(images), labels)
        expected.backward()
        twin_optimizer.step()
        torch.testing.assert_close(step(images, labels), expected.detach(), **tolerance)
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer), **tolerance)
    assert step.captures == 2


@pytest.mark.gpu
def test_on_the_device_dropout_draws_anew_at_every_replay():
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).to(device)
    anchor = nn.Parameter(torch.zeros((), device=device))
    batch = (torch.ones(6, 3, 8, 8, device=device), torch.zeros((), device=device))
    step = graph_step(model, lambda out, _: out.mean() + anchor, torch.optim.SGD([anchor], lr=0.0), batch)
    assert len({step(*batch).item() for _ in range(4)}) > 1


@pytest.mark.gpu
def test_on_the_device_a_synchronising_step_fails_and_leaves_no_trace():
    device = torch.device("cuda", torch.cuda.current_device())
    model = network().to(device)
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    batch = batches(1, device)[0]
    before, stream = everything(model, optimizer), torch.cuda.current_stream(device)

    def loss_fn(out: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(out, labels) * (2.0 if out.sum().item() > 0 else 1.0)

    with pytest.raises(RuntimeError, match="the capture of graph_step failed"):
        graph_step(model, loss_fn, optimizer, batch)
    assert torch.cuda.current_stream(device) == stream
    assert_same(everything(model, optimizer), before)


@pytest.mark.gpu
def test_on_the_device_a_tensor_learning_rate_needs_no_new_graph():
    device = torch.device("cuda", torch.cuda.current_device())
    model = network().to(device)
    rate = torch.tensor(0.1, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=True)
    batch = batches(1, device)[0]
    step = graph_step(model, F.cross_entropy, optimizer, batch)
    step(*batch)
    rate.zero_()
    weights = copy.deepcopy(list(model.parameters()))
    step(*batch)
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert step.captures == 1
