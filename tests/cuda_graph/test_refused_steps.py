"""``graph_step``: what it is given, what it refuses, and what a failure leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.cuda_graph.graph_step import graph_step
from tests.cuda_graph.steps import (
    OPTIMIZERS,
    Make,
    assert_same,
    batches,
    eager_step,
    everything,
    network,
    replayed_and_plain,
)


def test_a_call_like_no_example_is_refused_and_trains_nothing(either_way: None):
    step, model, optimizer, *_ = replayed_and_plain(OPTIMIZERS["momentum"])
    images, labels = batches(1)[0]
    before = everything(model, optimizer)
    for call, error, match in [
        ((images[:4], labels), ValueError, r"images must have the example's shape, .*\[6, 3, 8, 8\].*; got .*\[4, 3"),
        (
            (images.double(), labels),
            ValueError,
            "images must have the example's dtype, torch.float32; got torch.float64",
        ),
        ((images, labels.int()), ValueError, "labels must have the example's dtype, torch.int64; got torch.int32"),
        ((images, labels.to("meta")), ValueError, "labels must have the example's device, cpu; got meta"),
        ((images, [0, 1]), TypeError, "labels must be a tensor; got list"),
    ]:
        with pytest.raises(error, match=match):
            step(*call)
    assert_same(everything(model, optimizer), before)


def test_other_memory_formats_are_brought_to_the_examples(either_way: None):
    seen = []
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].stride()))
    optimizer, other = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    images, labels = batches(1)[0]
    channels_last = images.contiguous(memory_format=torch.channels_last)
    step = graph_step(model, F.cross_entropy, optimizer, (channels_last, labels))
    assert torch.equal(step(images, labels), eager_step(twin, other, channels_last, labels))
    assert_same(everything(model, optimizer), everything(twin, other))
    assert set(seen) == {channels_last.stride()}


def test_autocast_and_a_loss_with_parameters(either_way: None):

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            self.calls.add_(1)
            return F.cross_entropy(logits * self.scale, labels)

    model, loss_fn, data = network(), Scaled(), batches(3)
    twin, twin_loss = copy.deepcopy(model), copy.deepcopy(loss_fn)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):  # whose casts the step must not take for its own
        step = graph_step(model, loss_fn, optimizer, data[0], autocast_dtype=torch.bfloat16)
    for images, labels in data:
        twin.zero_grad()
        twin_loss.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin_loss(twin(images), labels)
        loss.backward()
        twin_optimizer.step()
        assert torch.equal(step(images, labels), loss)
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    assert loss_fn.calls == 3
    assert torch.equal(loss_fn.scale.grad, twin_loss.scale.grad)


class Failing(nn.Module):
    """Fails at the call of this number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at = 0, at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ArithmeticError("no more")
        return x


@pytest.mark.parametrize(("at", "what"), [(2, "the warm-up"), (4, "the capture")])
def test_a_failed_capture_leaves_no_trace_and_can_be_tried_again(recorded: None, at: int, what: str):
    model, data = nn.Sequential(network(0.5), Failing(at)), batches(2)
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=f"{what} of graph_step failed.*ArithmeticError: no more") as failure:
        graph_step(model, F.cross_entropy, optimizer, data[0])
    assert isinstance(failure.value.__cause__, ArithmeticError)
    assert_same(everything(model, optimizer), before)

    step = graph_step(model, F.cross_entropy, optimizer, data[0])
    step(*data[0])
    model[1].at = model[1].calls + at
    optimizer.param_groups[0]["lr"] = 0.3
    in_the_graph = {id(parameter.grad) for parameter in model.parameters()}
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=f"{what} of graph_step failed"):
        step(*data[1])
    assert_same(everything(model, optimizer), before)
    assert (step.captured, step.reason) == (False, "the last capture failed")
    assert in_the_graph.isdisjoint(id(parameter.grad) for parameter in model.parameters())  # whose memory is given back
    step(*data[1])
    assert (step.captured, step.reason, step.captures) == (True, "", 2)


class HostCount(torch.optim.SGD):
    """Counts in its hyperparameters, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        super().step()


class ReplacesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x


@pytest.mark.parametrize(
    ("make", "extra", "match"),
    [
        (lambda p: torch.optim.Adam(p), nn.Identity(), r"make it as Adam\(..., capturable=True\)"),
        (lambda p: HostCount(p, lr=0.1), nn.Identity(), "must not change its hyperparameters in a step"),
        (lambda p: torch.optim.SGD(p, lr=0.1), ReplacesBuffer(), "must update its tensors in place"),
    ],
    ids=["not capturable", "counts on the host", "replaces a buffer"],
)
def test_what_no_graph_can_do_is_refused(recorded: None, make: Make, extra: nn.Module, match: str):
    model, (batch,) = nn.Sequential(network(), extra), batches(1)
    optimizer = make(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=match):
        graph_step(model, F.cross_entropy, optimizer, batch)
    assert_same(everything(model, optimizer), before)


def test_state_on_the_host_is_refused(recorded: None):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["step"] = 1  # type: ignore[index]
    with pytest.raises(ValueError, match="must keep its state on cpu; SGD has 'step' on the host"):
        graph_step(model, F.cross_entropy, optimizer, batches(1)[0])


def test_a_cumulative_average_is_refused_in_training_only(either_way: None):
    model, (batch,) = network(), batches(1)
    model[1].momentum = None  # type: ignore[index,union-attr]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match="a BatchNorm in training must have a momentum; got BatchNorm2d"):
        graph_step(model, F.cross_entropy, optimizer, batch)
    model[1].eval()  # type: ignore[index,union-attr]
    step = graph_step(model, F.cross_entropy, optimizer, batch)
    step(*batch)
    model[1].train()  # type: ignore[index,union-attr]
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="must have a momentum"):
        step(*batch)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": print}, TypeError, "model must be a torch.nn.Module; got builtin_function_or_method"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a torch.optim.Optimizer; got float"),
        ({"example": torch.zeros(2)}, TypeError, "example must be a tuple of two tensors"),
        ({"example": (torch.zeros(2), 3)}, TypeError, "example must be a tuple of two tensors"),
        (
            {"example": (torch.zeros(2, device="meta"), torch.zeros(2))},
            ValueError,
            "example's labels must be on .* meta",
        ),
        ({"autocast_dtype": torch.float16}, ValueError, "float16 needs a GradScaler"),
        ({"warmup": 0}, ValueError, "warmup must be a positive integer; got 0"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], error: type[Exception], match: str):
    model = network()
    arguments = {"model": model, "optimizer": OPTIMIZERS["sgd"](model.parameters()), "example": batches(1)[0]}
    with pytest.raises(error, match=match):
        graph_step(**{"loss_fn": F.cross_entropy, **arguments, **change})


def test_a_closure_and_a_loss_per_image_are_refused():
    model, (batch,) = network(), batches(1)
    with pytest.raises(ValueError, match="optimizer must step without a closure; got LBFGS"):
        graph_step(model, F.cross_entropy, torch.optim.LBFGS(model.parameters()), batch)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = graph_step(model, lambda out, labels: F.cross_entropy(out, labels, reduction="none"), optimizer, batch)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor; got shape \(6,\)"):
        step(*batch)
