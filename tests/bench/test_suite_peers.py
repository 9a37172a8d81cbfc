"""Peers: those that are installed give right numbers, and say why not where they cannot take part."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.correctness import JudgedTask
from fused_resnet.bench.suite.registry import contenders
from fused_resnet.bench.suite.task import Contender
from fused_resnet.bench.suite.task_lists import block_tasks


def basic() -> nn.Module:
    """The stem and two stages of torchvision's network, of a block each."""
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(128, 10)
    return model


def by_name(name: str) -> Contender:
    (found,) = (contender for contender in contenders() if contender.name == name)
    return found


def model_task(dtype: torch.dtype = torch.float32, mode: str = INFERENCE) -> JudgedTask:
    return JudgedTask(f"{__name__}:basic", mode, 2, dtype, image_size=32)


@pytest.mark.parametrize(
    ("package", "name", "dtype"),
    [
        ("onnxruntime", "onnxruntime", torch.float32),
        ("openvino", "openvino", torch.float32),
        ("openvino", "openvino", torch.bfloat16),
    ],
    ids=str,
)
def test_runtimes_are_right_on_a_network_and_on_a_block(package: str, name: str, dtype: torch.dtype):
    pytest.importorskip(package)
    block = block_tasks([f"{__name__}:basic"], [INFERENCE], [2], [dtype], "cpu", 32)[1]
    for task in (model_task(dtype), block):
        contender = by_name(name)
        assert contender.why_absent(task) == []
        prepared = contender.prepare(task)
        error, wrong = task.why_wrong(prepared)
        assert wrong is None and error is not None
        outs = [torch.from_numpy(prepared.run().copy()) for _ in range(4)]  # type: ignore[attr-defined]
        assert torch.allclose(outs[0], outs[3])
        assert not torch.allclose(outs[0], outs[1])


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_a_runtime_with_another_model_is_called_wrong(package: str):
    pytest.importorskip(package)
    task = model_task()
    kept = task.module.get_parameter("fc.bias").detach().clone()
    _ = task.expected
    with torch.no_grad():
        task.module.get_parameter("fc.bias").add_(1.0)
        prepared = by_name(package).prepare(task)
        task.module.get_parameter("fc.bias").copy_(kept)
    assert (task.why_wrong(prepared)[1] or "").startswith("the error of output")


@pytest.mark.parametrize(
    ("name", "dtype", "mode", "reason"),
    [
        ("onnxruntime", torch.bfloat16, INFERENCE, "it takes float32 here"),
        ("onnxruntime", torch.float32, TRAINING_STEP, "it does inference only"),
        ("openvino", torch.float16, INFERENCE, "it takes float32 and bfloat16 here"),
    ],
)
def test_who_cannot_do_a_task_says_why(name: str, dtype: torch.dtype, mode: str, reason: str):
    (found,) = by_name(name).why_absent(model_task(dtype, mode))
    assert found.startswith(reason)


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fused_resnet.bench.suite.preparing._is_there", lambda package: False)
    assert by_name("openvino").why_absent(model_task()) == ["openvino is not installed"]
    assert by_name("onnxruntime").why_absent(model_task()) == ["onnxruntime is not installed"]
