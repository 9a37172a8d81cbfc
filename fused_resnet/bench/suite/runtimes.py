"""Other runtimes, on the CPU: ONNX Runtime on the network that PyTorch exports, and OpenVINO."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import (
    cpu_only,
    dtypes,
    inference_only,
    installed,
    network_contender,
    prepared_inference,
)
from fused_resnet.bench.suite.rounds import Method, measure_rounds
from fused_resnet.bench.suite.task import Contender, Prepared

PROVIDERS = ["CPUExecutionProvider"]
TRIAL = Method(rounds=5, min_seconds=0.0, most_rounds=5, sample_seconds=0.0, pause=0.0)
PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16"}


def onnxruntime_contender() -> Contender:
    """With as many threads as PyTorch, in float32, which is all that its kernels take here. Whether the threads spin
    between the operators of a run (its own choice, which loses where cores are busy) is tried when it is made ready,
    and the faster way kept. After a run they never spin, for they would take the cores of whoever is measured next."""
    conditions = (inference_only, cpu_only, dtypes(torch.float32), installed("onnxruntime"), installed("onnxscript"))
    return network_contender("onnxruntime", _prepare_onnx, *conditions)


def _onnx_bytes(module: nn.Module, x: Tensor) -> bytes:
    """A module in eval mode as a serialised ONNX model for inputs of exactly x's shape."""
    settings: dict[str, Any] = {"dynamo": True, "verbose": False, "optimize": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, (x,), **settings, input_names=["input"], output_names=["output"])
    assert program is not None
    return program.model_proto.SerializeToString()


def _prepare_onnx(task: NetworkTask) -> Prepared:
    inputs = task.inputs_as()
    model, feeds = _onnx_bytes(task.copy(), inputs[0]), [{"input": x.numpy()} for x in inputs]
    sessions = {str(spins): _session(model, spins) for spins in (True, False)}
    runs = {name: functools.partial(session.run, ["output"], feeds[0]) for name, session in sessions.items()}
    timings, _ = measure_rounds(runs, "cpu", TRIAL)
    session = sessions[min(timings, key=lambda name: timings[name].median)]
    return prepared_inference(task, lambda feed: session.run(["output"], feed)[0], feeds, output=torch.from_numpy)


def _session(model: bytes, spins: bool) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=PROVIDERS)


def openvino_contender() -> Contender:
    """Tuned for latency, with as many threads as PyTorch. They are not pinned to cores, for PyTorch's threads, which
    run in turn with them, are not either. In bfloat16 its input and output stay float32, and what is between them is
    its own choice."""
    conditions = (inference_only, cpu_only, dtypes(*PRECISION), installed("openvino"))
    return network_contender("openvino", _prepare_openvino, *conditions)


def _prepare_openvino(task: NetworkTask) -> Prepared:
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
