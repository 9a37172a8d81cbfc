"""Torch-TensorRT: the network compiled ahead of time by TensorRT."""

from __future__ import annotations

import importlib

import torch

from fused_resnet.bench.suite.conditions import cuda_only, inference_only, installed, network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import prepared_inference
from fused_resnet.bench.suite.task import Prepared


def tensorrt_contenders() -> list[Contender]:
    """One, with static shapes, in the task's dtype; TensorRT chooses the memory format inside."""
    return [network_contender("torch_tensorrt", _prepare, inference_only, cuda_only, installed("torch_tensorrt"))]


def _prepare(task: NetworkTask) -> Prepared:
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    module, inputs = task.copy().to(task.dtype), task.inputs_as(task.dtype)
    with torch.no_grad():
        compiled = torch_tensorrt.compile(
            module,
            ir="dynamo",
            arg_inputs=[inputs[0]],
            enabled_precisions={task.dtype},
            min_block_size=1,
            truncate_double=True,
        )
    return prepared_inference(task, compiled, inputs, guard=torch.no_grad)
