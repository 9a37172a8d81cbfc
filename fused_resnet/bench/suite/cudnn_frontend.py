"""nvidia-cudnn-frontend: cuDNN's graphs of a training convolution with the norms around it, in float16.

They are the public rival of this package's training convolutions: scale, bias, ReLU, convolution and the sums behind it
as one kernel; and scale, bias, ReLU and the weight's gradient. What else belongs to the task is done in PyTorch: making
statistics of the sums, and the gradient through the norm behind, as eager makes it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.bench.norm_inputs import EPS
from fused_resnet.bench.suite.conditions import installed
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.op_base import without_gradients
from fused_resnet.bench.suite.op_conv_training import (
    FORWARD,
    GRAD_INPUT,
    GRAD_WEIGHT,
    ConvTrainingInputs,
    ConvTrainingTask,
)
from fused_resnet.bench.suite.task import Prepared, Results

NAME = "nvidia-cudnn-frontend"


def cudnn_frontend_contenders() -> list[Contender]:
    """One, of ops only."""
    return [Contender(NAME, _why_absent, _prepare)]


def _why_absent(task: Any) -> list[str]:
    if not isinstance(task, ConvTrainingTask):
        return ["its fused graphs are of one convolution in training; it has no networks, blocks or other ops of them"]
    if task.device.type != "cuda":
        return [f"it needs a CUDA device; the task is on {task.device}"]
    if reasons := installed("cudnn")(task):  # type: ignore[arg-type]
        return [reason.replace("cudnn", NAME) for reason in reasons]
    reasons = []
    if task.dtype != torch.float16:
        reasons.append("its fused graphs take float16")
    if task.site.conv.sizes.groups != 1:
        reasons.append("its fused graphs take no groups")
    if task.product == GRAD_INPUT:
        reasons.append("the sums behind an input's gradient (dbn_weight) are in its C++ interface only")
    if task.product == GRAD_WEIGHT and not task.site.normed:
        reasons.append("without a norm in front a weight's gradient is cuDNN's plain one, which eager is")
    capability = torch.cuda.get_device_capability(task.device)
    if not ((8, 0) <= capability < (8, 9) or capability >= (9, 0)):
        reasons.append(f"its fused graphs are for compute capability 8.0 to 8.8 and 9.0 on; this is {capability}")
    return reasons


def _prepare(task: ConvTrainingTask) -> Prepared:
    make = {FORWARD: forward, GRAD_WEIGHT: grad_weight}[task.product]
    handle = importlib.import_module("cudnn").create_handle()
    return task.prepare(NAME, functools.partial(make, handle))


def forward(handle: Any, inputs: ConvTrainingInputs) -> Callable[[], Results]:
    """y, mean and invstd of the convolution: (scale, bias, ReLU,) convolution, sums of y and of its squares."""
    graph = Graph(handle)
    image = _image(graph, inputs)
    weight = graph.input(inputs.weight)
    y = graph.graph.conv_fprop(image=image, weight=weight, **_settings(inputs))
    total, squares = graph.graph.genstats(name="genstats", input=y)
    channels = inputs.weight.shape[0]
    out = torch.empty_like(inputs.y)
    sums = torch.empty(2, 1, channels, 1, 1, device=out.device)
    graph.output(y, out)
    graph.output(total, sums[0])
    graph.output(squares, sums[1])
    execute = graph.build()
    values = out.numel() // channels

    def run() -> Results:
        execute()
        mean, mean_square = sums.view(2, channels) / values
        return [out, mean, torch.rsqrt((mean_square - mean * mean).clamp(min=0) + EPS)]

    return without_gradients(run)


def grad_weight(handle: Any, inputs: ConvTrainingInputs) -> Callable[[], Results]:
    """The weight's gradient: eager's pass through the norm behind, then scale, bias, ReLU and convolution."""
    graph = Graph(handle)
    gradient = torch.empty_like(inputs.y)
    loss = graph.input(gradient)
    dw = graph.graph.conv_wgrad(name="wgrad", image=_image(graph, inputs), loss=loss, **_settings(inputs))
    out = torch.empty_like(inputs.weight)
    dw.set_dim(list(out.shape)).set_stride(list(out.stride()))
    graph.output(dw, out)
    execute = graph.build()

    def run() -> Results:
        graph.bind(loss, _through_the_norm_behind(inputs))
        execute()
        return [out]

    return without_gradients(run)


class Graph:
    """One graph of cuDNN's, and the tensors that it reads and writes, which it finds at the same addresses each time.

    Args:
        handle: cuDNN's.
    """

    def __init__(self, handle: Any) -> None:
        self._cudnn, self._handle = importlib.import_module("cudnn"), handle
        half, single = self._cudnn.data_type.HALF, self._cudnn.data_type.FLOAT
        self.graph = self._cudnn.pygraph(
            io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=handle
        )
        self._bound: dict[Any, Tensor] = {}

    def input(self, tensor: Tensor) -> Any:
        """A tensor that is read, as the graph knows it."""
        name = f"input{len(self._bound)}"
        node = self.graph.tensor(
            name=name, dim=list(tensor.shape), stride=list(tensor.stride()), data_type=self._type(tensor)
        )
        self.bind(node, tensor)
        return node

    def output(self, node: Any, tensor: Tensor) -> None:
        """Has a result written to this tensor."""
        node.set_output(True).set_data_type(self._type(tensor))
        self.bind(node, tensor)

    def bind(self, node: Any, tensor: Tensor) -> None:
        """Another tensor like the one before."""
        self._bound[node] = tensor

    def build(self) -> Callable[[], None]:
        """Chooses kernels; what it returns runs them on the current stream.

        Raises:
            cudnn.cudnnGraphNotSupportedError: there is none for these shapes.
        """
        modes = self._cudnn.heur_mode
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([modes.A, modes.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        device = next(iter(self._bound.values())).device
        workspace = torch.empty(max(self.graph.get_workspace_size(), 1), device=device, dtype=torch.uint8)

        def execute() -> None:
            if device.type == "cuda":
                self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream(device).cuda_stream)
            self.graph.execute(self._bound, workspace, handle=self._handle)

        return execute

    def _type(self, tensor: Tensor) -> Any:
        return self._cudnn.data_type.HALF if tensor.dtype == torch.float16 else self._cudnn.data_type.FLOAT


def _image(graph: Graph, inputs: ConvTrainingInputs) -> Any:
    """The convolution's input: behind the norm and the ReLU in front of it, where they are there."""
    x = graph.input(inputs.x)
    if not inputs.normed:
        return x
    mean, invstd, weight, bias = inputs.before.norm
    scale = weight * invstd
    scale, shift = (vector.to(inputs.x.dtype).view(1, -1, 1, 1) for vector in (scale, bias - mean * scale))
    scaled = graph.graph.scale(name="scale", input=x, scale=graph.input(scale))
    shifted = graph.graph.bias(name="bias", input=scaled, bias=graph.input(shift))
    return graph.graph.relu(name="relu", input=shifted)


def _through_the_norm_behind(inputs: ConvTrainingInputs) -> Tensor:
    """The gradient of y, by PyTorch's pass for it (on a CPU by one that makes the sums again)."""
    norm = inputs.behind
    if inputs.dz.is_cuda:
        settings = (*norm.statistics, norm.weight, *norm.sums_for_eager["sums"])
        return torch.batch_norm_backward_elemt(inputs.dz, inputs.y, *settings)
    backward, wanted = torch.ops.aten.native_batch_norm_backward, [True, False, False]
    return backward(inputs.dz, inputs.y, norm.weight, *norm.running, *norm.statistics, True, EPS, wanted)[0]


def _settings(inputs: ConvTrainingInputs) -> dict[str, list[int]]:
    stride, padding, dilation, _ = inputs.settings
    return {"stride": stride, "padding": padding, "dilation": dilation}
