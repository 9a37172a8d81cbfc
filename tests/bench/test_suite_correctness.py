"""Whether the suite's rule calls right what is right, and wrong what is wrong: with mistakes put into a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.correctness import JudgedTask, error_of, expected_results
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import prepared_module
from fused_resnet.bench.suite.task_lists import block_tasks
from fused_resnet.bench.suite.training import Training, result_names
from fused_resnet.models.cifar import CIFARResNet

DTYPES = (torch.float32, torch.bfloat16)
SIZE, BATCH = 32, 4
WHERE = "layer2.1"
FORMATS = (torch.contiguous_format, torch.channels_last)


def small() -> nn.Module:
    return CIFARResNet(14)


def shortcut(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


class WithoutMask(nn.Module):
    """A block whose first ReLU lets every gradient pass."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = out + (out.relu() - out).detach()
        return (self.bn2(self.conv2(out)) + shortcut(self, x)).relu()


class WithoutResidual(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()


class WithoutResidualGradient(nn.Module):
    """Right in forward; the shortcut passes no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + shortcut(self, x).detach()).relu()


def with_class(block_class: type[nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.get_submodule(WHERE if hasattr(model, "fc") else "").__class__ = block_class

    return change


def keep_stale_statistics(model: nn.Module) -> None:
    norm = model.get_submodule(f"{WHERE}.bn2" if hasattr(model, "fc") else "bn2")
    norm.momentum = 0.0


def use_running_statistics(model: nn.Module) -> None:
    norm = model.get_submodule(f"{WHERE}.bn2" if hasattr(model, "fc") else "bn2")
    norm.eval()


def leave_a_bias_out(model: nn.Module) -> None:
    model.get_submodule("bn1").bias.data.zero_()


MISTAKES = {
    "a ReLU's mask left out": (with_class(WithoutMask), (TRAINING_STEP,)),
    "no residual": (with_class(WithoutResidual), (INFERENCE, TRAINING_STEP)),
    "no gradient through the residual": (with_class(WithoutResidualGradient), (TRAINING_STEP,)),
    "stale running statistics": (keep_stale_statistics, (TRAINING_STEP,)),
    "running statistics in training": (use_running_statistics, (TRAINING_STEP,)),
    "no bias": (leave_a_bias_out, (INFERENCE, TRAINING_STEP)),
}
TASKS: dict[tuple[str, str, torch.dtype], NetworkTask] = {}


def task_of(level: str, mode: str, dtype: torch.dtype) -> NetworkTask:
    """What is right is computed once for all tests of a task."""
    if (level, mode, dtype) not in TASKS:
        if level == "model":
            task = JudgedTask(f"{__name__}:small", mode, BATCH, dtype, image_size=SIZE)
        else:
            task = block_tasks(["resnet18"], [mode], [BATCH], [dtype], "cpu", SIZE)[1]
        expected = task.expected
        TASKS[level, mode, dtype] = task
        task.__dict__["kept"] = expected
    task = TASKS[level, mode, dtype]
    task.__dict__["expected"] = task.__dict__["kept"]  # given back when another task was used
    return task


def run(task: NetworkTask, change: Callable[[nn.Module], None], memory_format: torch.memory_format) -> str | None:
    module = task.copy()
    change(module)
    return task.why_wrong(prepared_module(task, module, memory_format=memory_format))[1]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("mode", [INFERENCE, TRAINING_STEP])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", ["model", "block"])
def test_eager_is_right_judged_by_its_other_memory_format_alone(
    level: str, dtype: torch.dtype, mode: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
):
    task = task_of(level, mode, dtype)
    other = [each for each in FORMATS if each != memory_format]
    monkeypatch.setattr("fused_resnet.bench.suite.correctness.FORMATS", other)
    task.__dict__["expected"] = expected_results(task)
    assert run(task, lambda module: None, memory_format) is None


@pytest.mark.parametrize(
    ("mistake", "mode"), [(name, mode) for name, (_, modes) in MISTAKES.items() for mode in modes], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mistake_in_a_network_is_found(mistake: str, mode: str, dtype: torch.dtype):
    wrong = run(task_of("model", mode, dtype), MISTAKES[mistake][0], torch.channels_last)
    assert wrong is not None and ("against float64, PyTorch's own" in wrong or "is missing" in wrong)


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name != "running statistics in training"])
def test_a_mistake_in_a_block_is_found(mistake: str):
    change, modes = MISTAKES[mistake]
    assert run(task_of("block", modes[-1], torch.float32), change, torch.channels_last) is not None


def test_nan_a_missing_result_and_another_shape_are_wrong():
    task = task_of("model", INFERENCE, torch.float32)
    (exact,) = task.expected.exact
    assert task.expected.why_wrong([exact.float()]) == (pytest.approx(0, abs=1e-7), None)
    broken = exact.float().clone()
    broken[0, 0] = float("nan")
    error, wrong = task.expected.why_wrong([broken])
    assert error != error and wrong is not None and "nan" in wrong
    for results, message in (([None], "output is missing"), ([exact[:1]], "not (4, 10)"), ([], "0 results, not 1")):
        error, wrong = task.expected.why_wrong(results)
        assert error is None and wrong is not None and message in wrong


def test_nan_in_a_gradient_is_wrong_even_where_nothing_is_left_of_it():
    task = task_of("model", TRAINING_STEP, torch.float32)
    expected = task.expected
    errors = [1.5] * len(expected.names)
    results = [value.float() for value in expected.exact]
    judged = type(expected)(expected.names, expected.exact, errors, torch.float32)
    assert judged.why_wrong(results)[1] is None
    results[1] = torch.full_like(results[1], float("nan"))
    assert "gradient of conv1.weight" in (judged.why_wrong(results)[1] or "")


def test_the_worst_result_is_named():
    task = task_of("model", TRAINING_STEP, torch.float32)
    results = [value.float() for value in task.expected.exact]
    results[3] = results[3] * 1.5
    results[5] = results[5] * 2.5
    wrong = task.expected.why_wrong(results)[1]
    assert wrong is not None and f"the error of {task.expected.names[5]} is 1.5 " in wrong


def test_results_are_named_in_order():
    names = result_names(task_of("block", TRAINING_STEP, torch.float32))
    assert names[:3] == ["gradient of the input", "gradient of conv1.weight", "gradient of bn1.weight"]
    assert names[-1] == "downsample.1.running_var"
    assert result_names(task_of("model", TRAINING_STEP, torch.float32))[:2] == ["loss", "gradient of conv1.weight"]


def test_float32_stands_in_where_float64_has_no_room(monkeypatch: pytest.MonkeyPatch):
    task = task_of("model", INFERENCE, torch.bfloat16)
    convert = nn.Module.to

    def without_room(self, *args, **kwargs):
        if kwargs.get("dtype") == torch.float64:
            raise torch.OutOfMemoryError("no room")
        return convert(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", without_room)
    stand_in = expected_results(task)
    assert stand_in.exact[0].dtype == torch.float32
    assert error_of("output", stand_in.exact[0], task.expected.exact[0]) < 1e-5


def test_training_in_float16_scales_its_loss_and_gives_unscaled_gradients():
    task = JudgedTask("fused_resnet.models.cifar:cifar_resnet20", TRAINING_STEP, 2, torch.float16, image_size=8)
    plain = JudgedTask("fused_resnet.models.cifar:cifar_resnet20", TRAINING_STEP, 2, torch.float32, image_size=8)
    exact = plain.expected.exact
    try:
        results = Training(task, plain.copy()).first_results()
    except RuntimeError as error:
        pytest.skip(f"no float16 convolution on this CPU ({error})")
    index = result_names(plain).index("gradient of fc.weight")
    assert error_of("gradient", results[index], exact[index]) < 0.05
