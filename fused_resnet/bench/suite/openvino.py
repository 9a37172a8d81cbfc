"""OpenVINO on the CPU."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch

from fused_resnet.bench.suite.conditions import cpu_only, dtypes, inference_only, installed, network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import prepared_inference
from fused_resnet.bench.suite.task import Prepared

PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16"}


def openvino_contenders() -> list[Contender]:
    """One, tuned for latency, with as many threads as PyTorch. They are not pinned to cores, for PyTorch's threads,
    which run in turn with them, are not either. In bfloat16 its input and output stay float32, and what is between
    them is its own choice."""
    conditions = (inference_only, cpu_only, dtypes(*PRECISION), installed("openvino"))
    return [network_contender("openvino", _prepare, *conditions)]


def _prepare(task: NetworkTask) -> Prepared:
    openvino = importlib.import_module("openvino")
    inputs = task.inputs_as(torch.float32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(task.copy(), example_input=inputs[0], input=[tuple(inputs[0].shape)])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": PRECISION[task.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def call(x: Any) -> Any:
        return request.infer([x], share_inputs=True, share_outputs=True)[0]

    return prepared_inference(task, call, [x.numpy() for x in inputs], output=torch.from_numpy)
