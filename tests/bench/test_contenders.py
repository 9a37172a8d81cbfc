"""The contenders compute the same thing, so that only their speed differs."""

from __future__ import annotations

import copy
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from fused_resnet.bench.contenders import (
    FUSED,
    PLAIN_FORMATS,
    build,
    builder_names,
    faster_plain,
    inference_contenders,
    plain_twin,
    relative_difference,
    settle_statistics,
    training_contenders,
)
from fused_resnet.bench.timer import Timing


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = build("resnet18", num_classes=10)
    settle_statistics(model, torch.randn(8, 3, 64, 64))
    return model


def test_the_ten_builders():
    assert len(builder_names()) == 10
    with pytest.raises(ValueError, match="name must be one of resnet18, .*; got 'resnet19'"):
        build("resnet19")


def test_the_twin_has_the_weights_and_runs_plain_pytorch(model):
    check_twin(model, "torchvision")


def test_without_torchvision_the_twin_is_ours_unfused(model, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # so that importing it raises ImportError
    check_twin(model, "fused_resnet.unfuse")


def check_twin(model: nn.Module, expected_code: str) -> None:
    twin, code = plain_twin(model, "resnet18", num_classes=10)
    assert code == expected_code
    assert {name for name, _ in twin.named_parameters()} == {name for name, _ in model.named_parameters()}
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
    x = torch.randn(2, 3, 64, 64)
    assert backward_nodes(twin(x))["NativeBatchNormBackward0"] == 20
    assert "NativeBatchNormBackward0" not in backward_nodes(model(x))


def backward_nodes(output: torch.Tensor) -> Counter[str]:
    """How many nodes of each kind there are in the graph behind a tensor."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [parent for parent, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def test_inference_contenders_agree(model):
    plain, _ = plain_twin(model, "resnet18", num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    logits = {name: run() for name, run in inference_contenders(model, plain, images).items()}
    assert len(logits) == 4
    for name, actual in logits.items():
        assert relative_difference(actual, logits["plain NCHW"]) < 1e-5, name


def test_training_contenders_agree_and_leave_the_model_alone(model):
    before = copy.deepcopy(model.state_dict())
    plain, _ = plain_twin(model, "resnet18", num_classes=10)
    steps = training_contenders(model, plain, torch.randn(4, 3, 64, 64), torch.arange(4))
    assert set(steps) == {*PLAIN_FORMATS, FUSED}
    first = {name: step().item() for name, step in steps.items()}
    second = {name: step().item() for name, step in steps.items()}
    assert first == pytest.approx(dict.fromkeys(steps, first["plain NCHW"]), rel=1e-5)
    assert all(second[name] != first[name] for name in steps)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_settled_statistics_are_those_of_the_images():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None)).eval()
    images = torch.randn(4, 3, 8, 8) * 5 + 2
    settle_statistics(model, images)
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, images.var((0, 2, 3)))
    assert model[0].momentum is None
    assert not model.training


def test_the_faster_plain_has_the_lower_median():
    timings = {"plain NCHW": Timing((2.0, 2.0, 9.0)), "plain channels_last": Timing((3.0, 3.0, 3.0))}
    assert faster_plain(timings) == "plain NCHW"


def test_relative_difference():
    assert relative_difference(torch.tensor([1.0, -3.5]), torch.tensor([1.0, -4.0])) == 0.125
