"""What is right: the results in float64, and how far PyTorch's eager mode is from them in the task's dtype.

The rule is the project's, at most twice eager's error and a floor, where eager is the worse of its two memory formats:
what may be a matter of luck in one of them is not held against anybody. How an error is measured depends on the result:

- Outputs and losses: the largest difference, as a fraction of the largest exact value. The floor is a few units in the
  last place.
- Buffers (running statistics): the norm of the difference as a fraction of the exact norm, with the same floor.
- Gradients: the norms as well, but with a floor of a tenth. Wherever a ReLU's input is as small as its rounding error,
  the gradient there is passed in one computation and stopped in another, both rightly. In float32 a few such places a
  batch decide the whole error, and eager may have one more or less. A forgotten mask or residual makes an error near 1
  in the gradients around it. Where eager's own error is 1 or more (batch statistics of a few values, in bfloat16)
  nothing is left of the gradient in this dtype, and nobody is judged by it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.bench.accuracy import Results
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.suite.training import Training, result_names

FORMATS = (torch.channels_last, torch.contiguous_format)
UNITS = 16
"""Of the last place, allowed beyond eager's error: sums of different order through some fifty layers."""
TURNED_RELUS, NOTHING_LEFT = 0.1, 1.0
OUTPUT, GRADIENT, BUFFER = "output", "gradient", "buffer"


class JudgedTask(NetworkTask):
    """A `NetworkTask` that knows what is right."""

    @functools.cached_property
    def expected(self) -> Expected:
        return expected_results(self)

    def why_wrong(self, prepared: Prepared) -> tuple[float | None, str | None]:
        return self.expected.why_wrong(prepared.results())


@dataclass(frozen=True)
class Expected:
    """What a task's results should be, each with its name, and the errors that eager makes in them."""

    names: list[str]
    exact: list[Tensor | None]
    eager_errors: list[float]
    dtype: torch.dtype

    def why_wrong(self, results: Results) -> tuple[float | None, str | None]:
        """(the largest difference of all results as a fraction of the largest exact value, what is wrong or None)."""
        if len(results) != len(self.exact):
            return None, f"it gives {len(results)} results, not {len(self.exact)}"
        largest, worst, wrong = 0.0, 0.0, None
        for name, exact, theirs, ours in zip(self.names, self.exact, self.eager_errors, results, strict=True):
            if exact is None:  # a parameter that the network does not use
                continue
            if ours is None or ours.shape != exact.shape:
                shape = "missing" if ours is None else f"of shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
                return None, f"{name} is {shape}"
            ours, kind = ours.to(exact.device), kind_of(name)
            largest = _larger(largest, error_of(OUTPUT, ours, exact))
            if kind == GRADIENT and theirs >= NOTHING_LEFT and ours.isfinite().all():
                continue
            eps = torch.finfo(self.dtype).eps
            floor = TURNED_RELUS if kind == GRADIENT else UNITS * eps if self.dtype == torch.float32 else eps
            found, limit = error_of(kind, ours, exact), 2 * theirs + floor
            if not found <= limit and not found / limit < worst:  # NaN is wrong
                worst = found / limit
                wrong = f"the error of {name} is {found:.3g} against float64, PyTorch's own {theirs:.3g}"
        return largest, wrong


def kind_of(name: str) -> str:
    """Of a result, by its name in `result_names`."""
    if name in ("output", "loss"):
        return OUTPUT
    return GRADIENT if name.startswith("gradient of ") else BUFFER


def error_of(kind: str, result: Tensor, exact: Tensor) -> float:
    """As a fraction of the exact result: of its largest value, or of its norm; where that is 0, absolute."""
    if exact.numel() == 0:
        return 0.0
    norm = float("inf") if kind == OUTPUT else 2.0
    error, size = (torch.linalg.vector_norm(x, norm).item() for x in (result.double() - exact.double(), exact.double()))
    return error / size if size > 0 else error


def expected_results(task: NetworkTask) -> Expected:
    """Runs the task in float64, then in eager in both memory formats.

    Where float64 does not fit in the device's memory, what is right is float32 without TF32.
    """
    names = result_names(task)
    try:
        exact = _results(task, torch.float64, torch.contiguous_format)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        with _full_float32():
            exact = _results(task, torch.float32, torch.contiguous_format)
    errors = [0.0] * len(names)
    for memory_format in FORMATS:
        for i, (result, right) in enumerate(zip(_results(task, None, memory_format), exact, strict=True)):
            if result is not None and right is not None:
                errors[i] = _larger(errors[i], error_of(kind_of(names[i]), result, right))
    return Expected(names, exact, errors, task.dtype)


def _results(task: NetworkTask, dtype: torch.dtype | None, memory_format: torch.memory_format) -> list[Tensor | None]:
    module = task.copy()
    if task.training:
        return Training(task, module, memory_format=memory_format, dtype=dtype).first_results()
    dtype = task.dtype if dtype is None else dtype
    module = module.to(dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
    with torch.inference_mode():
        return [module(task.inputs[0].to(dtype).to(memory_format=memory_format))]


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    settings: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _larger(a: float, b: float) -> float:
    """The larger of the two; NaN if one is."""
    return a if a > b or a != a else b
