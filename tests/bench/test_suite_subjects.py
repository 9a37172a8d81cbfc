"""Networks by name, their tasks, and the shapes of their blocks."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.correctness import JudgedTask
from fused_resnet.bench.suite.subjects import build, builder_names, find_subject, settle_statistics
from fused_resnet.bench.suite.task_lists import block_tasks, model_tasks, residual_blocks

CIFAR = "fused_resnet.models.cifar:cifar_resnet20"


def no_module() -> int:
    return 3


@pytest.mark.parametrize(("name", "source"), [("resnet18", "torchvision"), ("timm:resnet18", "timm"), (CIFAR, "user")])
def test_every_kind_of_name_is_found_and_built_twice_alike(name: str, source: str):
    subject = find_subject(name)
    assert (subject.name, subject.source) == (name, source)
    one, other = subject.build(), subject.build()
    for (key, value), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again), key


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet51", "no model is named 'resnet51'; close to it are .*resnet50"),
        ("timm:resnet51", "close to it are .*timm:resnet50"),
        ("fused_resnet.models.cifar:cifar_resnet21", "has no attribute 'cifar_resnet21'"),
        ("fused_resnet.nowhere:net", "No module named 'fused_resnet.nowhere'"),
        ("torch:float32", "must be a callable; got dtype"),
    ],
)
def test_an_unknown_name_says_what_comes_close(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        find_subject(name)


def test_the_ten_builders():
    assert len(builder_names()) == 10
    with pytest.raises(ValueError, match="name must be one of resnet18, .*; got 'resnet19'"):
        build("resnet19")


def test_without_torchvision_a_builders_network_is_ours_unfused(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # so that importing it raises ImportError
    subject = find_subject("resnet18")
    assert subject.source == "fused_resnet.unfuse"
    seen: list[torch.Size] = []
    model = subject.build()
    model.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(torch.randn(2, 3, 32, 32))
    assert seen


def test_settled_statistics_are_those_of_the_images():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None)).eval()
    images = torch.randn(4, 3, 8, 8) * 5 + 2
    settle_statistics(model, images)
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, images.var((0, 2, 3)))
    assert model[0].momentum is None
    assert not model.training


def test_torchvision_networks_are_plain_ones_and_ours_are_unfused():
    assert type(find_subject("resnet18").build()) is resnet.ResNet
    x = torch.randn(2, 3, 32, 32)
    model = find_subject(CIFAR).build()
    seen: list[torch.Size] = []
    model.bn1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(x)  # a fused forward would not call its norms
    assert seen


def test_a_callable_must_give_a_module():
    with pytest.raises(TypeError, match="no_module must give a torch.nn.Module; got int"):
        find_subject(f"{__name__}:no_module").build()


def test_nothing_random_is_left_in_training():
    task = JudgedTask("efficientnet_b0", TRAINING_STEP, 2, image_size=32)
    results = []
    for _ in range(2):
        model = task.copy()
        results.append(model(task.inputs[0]))
    assert torch.equal(*results)


def test_running_statistics_are_settled_by_other_images_than_those_that_are_measured():
    task = JudgedTask(CIFAR, INFERENCE, 16, image_size=32)
    model = task.copy()
    norm: nn.BatchNorm2d = model.layer3[2].bn2
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        out = model(task.inputs[0])
    variance = seen[0].var((0, 2, 3))
    assert out.isfinite().all()
    assert 0.5 < (variance / norm.running_var).median() < 2
    assert not torch.allclose(variance, norm.running_var, rtol=1e-4)


def test_inputs_rotate_and_are_numbers_of_the_dtype():
    task = JudgedTask(CIFAR, INFERENCE, 2, torch.bfloat16, image_size=8)
    assert len({x.sum().item() for x in task.inputs}) == 3
    for x in task.inputs:
        assert x.dtype == torch.float32
        assert torch.equal(x, x.bfloat16().float())


def test_tasks_of_every_combination_in_order():
    tasks = model_tasks(
        ["resnet18", CIFAR], [INFERENCE, TRAINING_STEP], [1, 4], [torch.float32, torch.bfloat16], "cpu", 32
    )
    assert len(tasks) == len(set(map(repr, tasks))) == 2 * 2 * 2 * 2
    assert [task.subject for task in tasks] == ["resnet18"] * 8 + [CIFAR] * 8
    assert [task.batch_size for task in tasks[:2]] == [1, 4]


def test_flop_are_those_of_the_published_count():
    inference = JudgedTask("resnet50", INFERENCE, 2).flop()
    assert inference == pytest.approx(2 * 2 * 4.089e9, rel=0.001)  # multiply-adds an image, without norms and pools
    assert JudgedTask("resnet50", TRAINING_STEP, 2).flop() == pytest.approx(3 * inference, rel=0.03)


def test_blocks_of_resnet50_alike_ones_once():
    blocks = residual_blocks(find_subject("resnet50"), 224)
    assert [(b.path, b.input_shape, b.output_shape) for b in blocks] == [
        ("layer1.0", (64, 56, 56), (256, 56, 56)),
        ("layer1.1", (256, 56, 56), (256, 56, 56)),
        ("layer2.0", (256, 56, 56), (512, 28, 28)),
        ("layer2.1", (512, 28, 28), (512, 28, 28)),
        ("layer3.0", (512, 28, 28), (1024, 14, 14)),
        ("layer3.1", (1024, 14, 14), (1024, 14, 14)),
        ("layer4.0", (1024, 14, 14), (2048, 7, 7)),
        ("layer4.1", (2048, 7, 7), (2048, 7, 7)),
    ]
    assert len(residual_blocks(find_subject("timm:resnet50"), 64)) == 8


def test_a_block_task_is_the_networks_block_on_its_shapes():
    task = block_tasks(["resnet18"], [TRAINING_STEP], [2], [torch.float32], "cpu", 64)[1]
    assert (task.level, task.subject) == ("block", "resnet18 layer2.0")
    assert task.input_shape() == (2, 64, 16, 16)
    block = task.copy()
    assert block.training and type(block) is resnet.BasicBlock
    assert block(task.inputs[0]).shape == task.targets[0].shape == (2, 128, 8, 8)
    assert block_tasks(["vgg11"], [INFERENCE], [1], [torch.float32], "cpu", 32) == []


def test_only_one_task_holds_its_tensors_and_they_come_back_the_same():
    first, second = model_tasks([CIFAR], [INFERENCE], [1, 2], [torch.float32], "cpu", 8)
    before = copy.deepcopy(first.inputs[0])
    weights = first.module.state_dict()
    _ = second.inputs
    assert "inputs" not in first.__dict__ and "module" not in first.__dict__
    assert torch.equal(first.inputs[0], before)
    for name, value in first.module.state_dict().items():
        assert torch.equal(value, weights[name])
