"""``graph_step`` with CUDA's graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.cuda_graph.graph_step import graph_step
from tests.cuda_graph import steps
from tests.cuda_graph.steps import (
    OPTIMIZERS,
    Make,
    assert_same,
    batches,
    everything,
    network,
)


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
