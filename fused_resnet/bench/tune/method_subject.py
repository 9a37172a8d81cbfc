"""How our own C++ convolves on the CPU, in a frozen network."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fused_resnet.bench.suite.op_base import without_gradients
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceInputs, ConvInferenceTask
from fused_resnet.bench.suite.task import Prepared, Results
from fused_resnet.bench.tune.subject import Subject
from fused_resnet.ops.backends.native.conv import NativeConv, why_not_native
from fused_resnet.ops.plan import measured_plan, plan_key
from fused_resnet.ops.plan.plan_file import Key


class MethodSubject(Subject):
    """Candidates are the methods of ``csrc/cpu/conv.h`` that can do a convolution; there are none where it runs
    otherwise.

    Args:
        task: has the inputs, and knows which numbers are right.
    """

    def __init__(self, task: ConvInferenceTask) -> None:
        self.task, self.device, self.op = task, task.device, measured_plan.METHOD
        dtype = str(task.dtype).removeprefix("torch.")
        self.title = f"frozen {task.subject} x {task.batch_size} {dtype}"
        self._x_shape = task.site.conv.input_shape(task.batch_size)

    def make_key(self) -> Key:
        conv = self.task.site.conv
        return plan_key.method_key(self._x_shape, self.task.dtype, conv.weight_shape, *conv.settings)

    def heuristic(self) -> str:
        assert self._like is not None
        return self._like.estimated(self._x_shape, self.task.dtype)

    def candidates(self) -> dict[str, Callable[[], Prepared]]:
        return {} if self._like is None else {method: self._by(method) for method in self._like.candidates}

    def why_wrong(self, prepared: Prepared) -> str | None:
        return self.task.why_wrong(prepared)[1]

    def release(self) -> None:
        self.task.release()
        self.__dict__.pop("_like", None)

    @functools.cached_property
    def _like(self) -> NativeConv | None:
        """A convolution of the same shape, of no particular weights; None if it does not run in our own C++."""
        conv = self.task.site.conv
        weight = torch.zeros(conv.weight_shape, dtype=self.task.dtype, device=self.device)
        stride, padding, dilation, groups = conv.settings
        if why_not_native(weight[:1], weight, stride, dilation, groups):
            return None
        return NativeConv(weight, torch.zeros(conv.weight_shape[0]), stride, padding, dilation, groups, False)

    def _by(self, method: str) -> Callable[[], Prepared]:
        def make(inputs: ConvInferenceInputs) -> Callable[[], Results]:
            weight, bias = inputs.folded
            stride, padding, dilation, groups = inputs.settings
            native = NativeConv(weight, bias, stride, padding, dilation, groups, inputs.relu, method)
            return without_gradients(lambda: [native(inputs.x, inputs.residual)])

        return lambda: self.task.prepare(method, make)
