"""Training side by side, on a network small enough to follow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_resnet.training.loop import accuracy, one_cycle, start_run, train_side_by_side


def network() -> nn.Module:
    features = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(8, 2))


def two_kinds(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images brighter on the left (label 0) or with more contrast (label 1)."""
    labels = torch.arange(count) % 2
    images = torch.randn(count, 3, 8, 8) * (1 + 3 * labels)[:, None, None, None]
    return images, labels


def test_equal_models_have_equal_losses_and_learn():
    model = network()
    images, labels = two_kinds(64)
    runs = [start_run(copy.deepcopy(model)) for _ in range(2)]
    steps: list[int] = []
    train_side_by_side(runs, [(images, labels)] * 30, one_cycle(0.1, 30), lambda: steps.append(1))
    assert runs[0].losses == runs[1].losses
    assert len(runs[0].losses) == len(runs[0].seconds) == len(steps) == 30
    assert runs[0].losses[-1] < 0.5 * runs[0].losses[0]
    assert accuracy(runs[0], images, labels, batch_size=10) > 0.9
    assert runs[0].model.training


def test_a_run_is_plain_sgd():
    model = network()
    images, labels = two_kinds(16)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    expected_losses = []
    for rate in (0.1, 0.2):
        optimizer.param_groups[0]["lr"] = rate
        loss = nn.functional.cross_entropy(expected(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected_losses.append(loss.item())
    run = start_run(model)
    train_side_by_side([run], [(images, labels)] * 2, [0.1, 0.2], lambda: None)
    assert run.losses == expected_losses
    for name, value in expected.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


def test_the_timing_leaves_out_the_warmup():
    run = start_run(network())
    run.seconds += [9.0, 1.0, 2.0]
    assert run.timing(1).samples == (1.0, 2.0)


def test_runs_see_their_memory_format():
    seen = []
    model = network()
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run = start_run(model, memory_format=torch.channels_last)
    train_side_by_side([run], [two_kinds(4)], [0.1], lambda: None)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("steps", [1, 2, 5, 66])
def test_one_cycle_rises_to_the_peak_and_falls(steps):
    rates = one_cycle(0.5, steps)
    top = rates.index(max(rates))
    assert len(rates) == steps
    assert max(rates) == 0.5
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(rate > 0 for rate in rates)


def test_rates_and_batches_must_be_as_many():
    with pytest.raises(ValueError):
        train_side_by_side([start_run(network())], [two_kinds(4)] * 2, [0.1], lambda: None)
