"""NVIDIA apex: its bottleneck is one cuDNN call a convolution, in float16, with constant statistics."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.suite.conditions import (
    blocks_only,
    cuda_only,
    dtypes,
    inference_only,
    installed,
    network_contender,
)
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import prepared_inference
from fused_resnet.bench.suite.task import Prepared

VECTORS = ("weight", "bias", "running_mean", "running_var")


def apex_contenders() -> list[Contender]:
    """``apex.contrib.bottleneck.Bottleneck`` with its cuDNN kernels. Its norm is frozen, so it is inference here; a
    training step of it is another task than ours."""
    conditions = (inference_only, blocks_only, cuda_only, dtypes(torch.float16), installed("apex"), _block, _kernels)
    return [network_contender("apex", _prepare, *conditions)]


def _block(task: NetworkTask) -> list[str]:
    block: Any = task.network.without_memory(task.path)
    if not hasattr(block, "conv3"):
        return ["it has the Bottleneck only"]
    reasons = []
    if block.conv2.groups != 1:
        reasons.append("its convolutions have no groups")
    if block.conv2.stride != (1, 1):
        reasons.append("its stride is in the first convolution, where this block has it in the second")
    return reasons


def _kernels(task: NetworkTask) -> list[str]:
    try:
        importlib.import_module("apex.contrib.bottleneck")
    except ImportError as error:
        return [f"apex.contrib.bottleneck cannot be imported ({error})"]
    return []


def _prepare(task: NetworkTask) -> Prepared:
    block = apex_block(task.copy()).to(task.device, task.dtype)
    inputs = [x.permute(0, 2, 3, 1).contiguous() for x in task.inputs_as(task.dtype)]
    return prepared_inference(
        task, block, inputs, guard=torch.no_grad, output=lambda result: result.permute(0, 3, 1, 2)
    )


def apex_block(block: Any) -> nn.Module:
    """apex's block, which takes and gives (N, H, W, C), with the weights of a Bottleneck whose stride is 1."""
    bottleneck = importlib.import_module("apex.contrib.bottleneck").Bottleneck
    conv1, conv2, conv3 = block.conv1, block.conv2, block.conv3
    twin: Any = bottleneck(
        conv1.in_channels, conv1.out_channels, conv3.out_channels, use_cudnn=True, explicit_nhwc=True
    )
    norms = {"bn1": block.bn1, "bn2": block.bn2, "bn3": block.bn3}
    convs = {"conv1": conv1, "conv2": conv2, "conv3": conv3}
    if block.downsample is not None:
        convs["downsample.0"], norms["downsample.1"] = block.downsample
    if (block.downsample is None) != (getattr(twin, "downsample", None) is None):
        raise ValueError("apex's block has a shortcut where this one has none, or none where it has one")
    for name, conv in convs.items():
        twin.get_submodule(name).weight.data = _nhwc(conv.weight.detach())
    for name, norm in norms.items():
        for vector in VECTORS:
            getattr(twin.get_submodule(name), vector).data.copy_(getattr(norm, vector))
    return twin.eval()


def _nhwc(weight: Tensor) -> Tensor:
    return weight.permute(0, 2, 3, 1).contiguous()
