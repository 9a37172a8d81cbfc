"""Peers: those that are installed give right numbers; those that need a GPU are run on stand-ins of their interface."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from fused_resnet.bench.result import INFERENCE, TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.suite import apex, cudnn_frontend
from fused_resnet.bench.suite.block_task import block_tasks
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.model_task import ModelTask
from fused_resnet.bench.suite.op_conv_training import FORWARD, GRAD_WEIGHT, ConvTrainingTask
from fused_resnet.bench.suite.op_sites import conv_sites
from fused_resnet.bench.suite.preparing import prepared_inference
from fused_resnet.bench.suite.registry import contenders


def basic() -> nn.Module:
    """The stem and two stages of torchvision's network, of a block each."""
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(128, 10)
    return model


def by_name(name: str) -> Contender:
    (found,) = (contender for contender in contenders() if contender.name == name)
    return found


def model_task(dtype: torch.dtype = torch.float32, mode: str = INFERENCE) -> ModelTask:
    return ModelTask(f"{__name__}:basic", mode, 2, dtype, image_size=32)


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


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING_STEP])
def test_timms_network_has_the_same_numbers(mode: str):
    pytest.importorskip("timm")
    task = ModelTask("resnet18", mode, 2, image_size=64)
    contender = by_name("timm")
    assert contender.why_absent(task) == []
    assert task.why_wrong(contender.prepare(task))[1] is None
    block = block_tasks(["resnet50"], [mode], [2], [torch.float32], "cpu", 32)[0]
    assert block.why_wrong(contender.prepare(block))[1] is None


def test_every_builders_network_has_a_twin_in_timm_with_the_same_parameters():
    pytest.importorskip("timm")
    why_absent = by_name("timm").why_absent
    absent = {
        name: why_absent(ModelTask(name, INFERENCE, 1, image_size=32))
        for name in ("resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11", "shufflenet_v2_x1_0")
    }
    assert {name for name, reasons in absent.items() if not reasons} == {
        *("resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2")
    }
    assert absent["shufflenet_v2_x1_0"] == ["timm has no shufflenet_v2_x1_0"]
    assert why_absent(ModelTask("timm:resnet18", INFERENCE, 1)) == ["eager is timm's already"]


@pytest.mark.parametrize(
    ("name", "dtype", "mode", "reason"),
    [
        ("onnxruntime", torch.bfloat16, INFERENCE, "its CPU kernels compute in float32 only"),
        ("onnxruntime", torch.float32, TRAINING_FORWARD, "it does inference only"),
        ("openvino", torch.float16, INFERENCE, "it takes float32 and bfloat16 here"),
        ("torch_tensorrt", torch.float32, INFERENCE, "it needs a CUDA device; the task is on cpu"),
        ("apex", torch.float16, INFERENCE, "it has residual blocks only, no whole networks"),
        ("nvidia-cudnn-frontend", torch.float16, TRAINING_STEP, "its fused graphs are of one convolution in training"),
    ],
)
def test_who_cannot_do_a_task_says_why(name: str, dtype: torch.dtype, mode: str, reason: str):
    (found,) = by_name(name).why_absent(model_task(dtype, mode))
    assert found.startswith(reason)


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fused_resnet.bench.suite.conditions._is_there", lambda package: False)
    assert by_name("openvino").why_absent(model_task()) == ["openvino is not installed"]
    assert by_name("onnxruntime").why_absent(model_task()) == ["onnxruntime is not installed"]


class ApexBottleneck(nn.Module):
    """What apex's source says of its block: (N, H, W, C), weights likewise, the stride in the first convolution."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1, **settings: bool) -> None:
        super().__init__()
        assert settings == {"use_cudnn": True, "explicit_nhwc": True}
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, stride, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.permute(0, 2, 3, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        out = self._norm(self.bn1, self._conv(self.conv1, x)).relu()
        out = self._norm(self.bn2, self._conv(self.conv2, out)).relu()
        out = self._norm(self.bn3, self._conv(self.conv3, out))
        shortcut = x if self.downsample is None else self._norm(self.downsample[1], self._conv(self.downsample[0], x))
        return (out + shortcut).relu().permute(0, 2, 3, 1)

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, conv.weight.permute(0, 3, 1, 2), None, conv.stride, conv.padding)

    def _norm(self, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return norm(x)


@pytest.mark.parametrize("index", [0, 1], ids=["projection", "identity"])
def test_apexs_block_gets_the_weights(index: int, monkeypatch: pytest.MonkeyPatch):
    stand_in = types.ModuleType("apex.contrib.bottleneck")
    stand_in.Bottleneck = ApexBottleneck  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.contrib.bottleneck", stand_in)
    task = block_tasks(["resnet50"], [INFERENCE], [2], [torch.float32], "cpu", 32)[index]
    block = apex.apex_block(task.copy())
    inputs = [x.permute(0, 2, 3, 1).contiguous() for x in task.inputs]
    prepared = prepared_inference(task, block, inputs, guard=torch.no_grad, output=lambda y: y.permute(0, 3, 1, 2))
    assert task.why_wrong(prepared)[1] is None


def test_apex_refuses_what_its_block_does_not_do():
    tasks = block_tasks(["resnet50", "resnext50_32x4d"], [INFERENCE], [1], [torch.float16], "cpu", 32)
    reasons = {task.subject: apex._block(task) for task in tasks}
    assert reasons["resnet50 layer1.0"] == []
    assert reasons["resnet50 layer2.0"] == [
        "its stride is in the first convolution, where this block has it in the second"
    ]
    assert reasons["resnext50_32x4d layer1.1"] == ["its convolutions have no groups"]


class Node:
    """A tensor of a graph of cuDNN's: how it is made, and what was said of it."""

    def __init__(self, compute: Callable[[dict[Node, Tensor]], Tensor] | None = None) -> None:
        self.compute, self.is_output, self.type, self.dim = compute, compute is None, None, None

    def value(self, bound: dict[Node, Tensor]) -> Tensor:
        return bound[self].float() if self.compute is None else self.compute(bound)

    def set_output(self, is_output: bool) -> Node:
        self.is_output = is_output
        return self

    def set_data_type(self, data_type: Any) -> Node:
        self.type = data_type
        return self

    def set_dim(self, dim: list[int]) -> Node:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Node:
        return self


class StandInGraph:
    """cuDNN's graph by the names and arguments of its Python interface, computed by PyTorch when it is executed."""

    def __init__(self, **settings: Any) -> None:
        assert set(settings) == {"io_data_type", "intermediate_data_type", "compute_data_type", "handle"}
        self.outputs: list[Node] = []
        self.stages: list[str] = []

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: Any) -> Node:
        return Node()

    def scale(self, *, name: str, input: Node, scale: Node) -> Node:
        return Node(lambda bound: input.value(bound) * scale.value(bound))

    def bias(self, *, name: str, input: Node, bias: Node) -> Node:
        return Node(lambda bound: input.value(bound) + bias.value(bound))

    def relu(self, *, name: str, input: Node) -> Node:
        return Node(lambda bound: input.value(bound).relu())

    def conv_fprop(self, *, image: Node, weight: Node, **settings: Any) -> Node:
        return self._made(lambda bound: F.conv2d(image.value(bound), weight.value(bound), None, **settings))

    def genstats(self, *, name: str, input: Node) -> tuple[Node, Node]:
        def summed(power: int) -> Node:
            return self._made(lambda bound: (input.value(bound) ** power).sum((0, 2, 3), keepdim=True))

        return summed(1), summed(2)

    def conv_wgrad(self, *, name: str, image: Node, loss: Node, **settings: Any) -> Node:
        def compute(bound: dict[Node, Tensor]) -> Tensor:
            assert node.dim is not None
            return torch.nn.grad.conv2d_weight(image.value(bound), node.dim, loss.value(bound), **settings)

        node = self._made(compute)
        return node

    def _made(self, compute: Callable[[dict[Node, Tensor]], Tensor]) -> Node:
        self.outputs.append(Node(compute))
        return self.outputs[-1]

    def validate(self) -> None:
        self.stages.append("validate")

    def build_operation_graph(self) -> None:
        self.stages.append("build_operation_graph")

    def create_execution_plans(self, modes: list[str]) -> None:
        self.stages.append("create_execution_plans")

    def check_support(self) -> None:
        self.stages.append("check_support")

    def build_plans(self) -> None:
        self.stages.append("build_plans")

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, bound: dict[Node, Tensor], workspace: Tensor, *, handle: Any) -> None:
        assert self.stages == [
            *("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
        ]
        for node in self.outputs:
            if node.is_output:
                bound[node].copy_(node.value(bound))


@pytest.mark.parametrize("product", [FORWARD, GRAD_WEIGHT])
@pytest.mark.parametrize("normed", [False, True], ids=["image", "behind a norm"])
def test_cudnns_graphs_are_built_as_the_task_means(product: str, normed: bool, monkeypatch: pytest.MonkeyPatch):
    stand_in = types.ModuleType("cudnn")
    for name, value in {
        "pygraph": StandInGraph,
        "data_type": types.SimpleNamespace(HALF="half", FLOAT="float"),
        "heur_mode": types.SimpleNamespace(A="a", FALLBACK="fallback"),
        "create_handle": lambda: "handle",
    }.items():
        setattr(stand_in, name, value)
    monkeypatch.setitem(sys.modules, "cudnn", stand_in)
    (site, *_) = (s for s in conv_sites("resnet18", 32) if s.normed == normed and s.takes_gradient)
    task = ConvTrainingTask(site, product, 2, torch.float32, "cpu")
    prepared = cudnn_frontend._prepare(task)
    error, wrong = task.why_wrong(prepared)
    assert wrong is None and error is not None
    prepared.run()
    assert cudnn_frontend._why_absent(task) == ["it needs a CUDA device; the task is on cpu"]
