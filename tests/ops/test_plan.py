"""At which level a convolution trains: what is asked for, what stands against it, and the automatic choice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops import (
    requested_fusion_level,
    training_level,
    use_backend,
    use_fusion_level,
    why_not_fused_training,
)
from fused_resnet.ops.backends.native.conv import why_no_kernels
from fused_resnet.ops.plan import measured_plan, plan_file, plan_key
from fused_resnet.ops.route import fusion_level as plan
from fused_resnet.ops.route import request
from tests.ops.step import NEEDS_NATIVE

ROOT = Path(__file__).resolve().parents[2]
SIZES = ([1, 1], [1, 1], [1, 1])


def convolution(groups: int = 1, dtype: torch.dtype = torch.float32) -> tuple:
    """The arguments of ``training_level``: a 3x3 convolution of an image in channels_last."""
    x = torch.randn(2, 4, 5, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return (x, torch.randn(8, 4 // groups, 3, 3, dtype=dtype), *SIZES, groups)


def level(*arguments) -> int:
    """``training_level``, which is 0 if and only if there is a reason, unless 0 was asked for."""
    found = training_level(*arguments)
    assert (found == 0) == bool(why_not_fused_training(*arguments))
    return found


def test_nothing_is_requested_unless_asked_for():
    requested = os.environ.get(request.LEVEL_VARIABLE) or "auto"
    assert requested_fusion_level() == (None if requested == "auto" else int(requested))


def test_levels_nest_and_are_restored():
    before = requested_fusion_level()
    with use_fusion_level(3):
        with use_fusion_level(1):
            assert requested_fusion_level() == 1
            with use_fusion_level(None):
                assert requested_fusion_level() is None
        assert requested_fusion_level() == 3
        with pytest.raises(ZeroDivisionError), use_fusion_level(0):
            1 / 0  # noqa: B018
        assert requested_fusion_level() == 3
    assert requested_fusion_level() == before


def test_requests_of_threads_that_overlap_are_their_own():
    before, entered, left = requested_fusion_level(), threading.Barrier(2), threading.Event()
    seen = {}

    def ask(level, last):
        with use_fusion_level(level):
            entered.wait()
            seen[level] = [requested_fusion_level()]
            if last:
                left.wait()
            seen[level].append(requested_fusion_level())
        left.set()
        seen[level].append(requested_fusion_level())

    threads = [threading.Thread(target=ask, args=arguments) for arguments in ((1, False), (2, True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1: [1, 1, None], 2: [2, 2, None]}
    assert requested_fusion_level() == before


def test_what_backward_computes_anew_is_under_the_request_of_its_caller():
    """Deep inside other backwards, autograd takes a thread of its own on a CPU too."""
    seen, caller = [], threading.get_ident()

    class Deeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((threading.get_ident(), requested_fusion_level()))
            if threading.get_ident() == caller:
                with torch.enable_grad():
                    Deeper.apply(torch.ones(1, requires_grad=True)).backward()
            return grad

    with use_fusion_level(2):
        Deeper.apply(torch.ones(1, requires_grad=True)).backward()
    threads, levels = zip(*seen, strict=True)
    assert threads[-1] != caller
    assert set(levels) == {2}


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (4, ValueError, "level must be None or 0 to 3; got 4"),
        (-1, ValueError, "level must be None or 0 to 3; got -1"),
        (True, TypeError, "level must be an int or None; got bool"),
        ("3", TypeError, "level must be an int or None; got str"),
        (2.0, TypeError, "level must be an int or None; got float"),
    ],
)
def test_other_levels_are_refused_at_once(value, error, message):
    before = requested_fusion_level()
    with pytest.raises(error, match=f"^{message}$"):
        use_fusion_level(value)
    assert requested_fusion_level() == before


def level_in_a_new_process(value: str) -> subprocess.CompletedProcess[str]:
    code = "from fused_resnet import ops; print(ops.requested_fusion_level())"
    environment = {**os.environ, request.LEVEL_VARIABLE: value, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(("value", "expected"), [("2", "2"), ("", "None")])
def test_the_environment_asks_for_a_level(value, expected):
    finished = level_in_a_new_process(value)
    assert finished.stdout.strip() == expected, finished.stderr


@pytest.mark.parametrize("value", ["4", "-1", "fast", "²"])
def test_the_environment_is_checked_when_it_is_read(monkeypatch, value):
    """isdecimal, not isdigit: int("²") would raise an error that names nothing."""
    monkeypatch.setenv(request.LEVEL_VARIABLE, value)
    with pytest.raises(ValueError, match=f"^{request.LEVEL_VARIABLE} must be .* 0 to 3; got '?{value}"):
        request.from_environment()
    monkeypatch.setenv(request.LEVEL_VARIABLE, "auto")
    assert request.from_environment().level is None


@NEEDS_NATIVE
def test_the_automatic_level_on_the_cpu_is_2_where_the_cpp_convolutions_take_it():
    """Else 0: oneDNN's convolutions, and the passes of C++ beside them."""
    if not plan.why_not_device("triton", torch.device("cpu")):
        pytest.skip("Triton's interpreter runs the kernels of a GPU here")
    kernels = not why_no_kernels(torch.float32)
    x, *others = convolution()
    with use_backend("auto"), use_fusion_level(None):
        assert level(x, *others) == (2 if kernels else 0)
        assert level(x.contiguous(), *others) == 0
        for dtype in (torch.bfloat16, torch.float64):
            assert level(*convolution(dtype=dtype)) == 0
            assert str(dtype) in why_not_fused_training(*convolution(dtype=dtype))[0]
        if kernels:
            assert why_not_fused_training(x.contiguous(), *others) == ["x is not channels_last"]
            padded = (x, others[0], [1, 1], [3, 3], [1, 1], 1)
            assert "padding that is less" in why_not_fused_training(*padded)[0]


@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_a_level_asked_for_by_number_runs_on_the_cpu_through_the_reference(asked):
    for name in ("auto", "reference"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            with use_backend(name), use_fusion_level(asked):
                assert level(*convolution(dtype=dtype)) == asked
    with use_fusion_level(0):
        assert why_not_fused_training(*convolution()) == ["level 0 was asked for"]


def test_the_reference_asked_for_by_name_runs_the_highest_level():
    """It runs what the fused kernels would, so that a test of it is one of theirs."""
    with use_backend("reference"), use_fusion_level(None):
        assert level(*convolution()) == plan.HIGHEST_LEVEL == 3


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_groups_stay_at_level_0(name):
    with use_backend(name), use_fusion_level(3):
        assert level(*convolution(groups=2)) == 0
        assert why_not_fused_training(*convolution(groups=2)) == ["groups is 2; the training kernels take 1"]


def test_a_backend_without_convolutions_trains_at_level_0_whatever_was_asked_for():
    """A backend that was asked for runs, or nothing does: the reference must not stand in for it."""
    for asked in (None, 3):
        with use_backend("separate"), use_fusion_level(asked):
            assert level(*convolution()) == 0
            assert "backend 'separate' was asked for" in why_not_fused_training(*convolution())[0]


@NEEDS_NATIVE
def test_the_native_backend_asked_for_by_name_has_levels_1_and_2():
    kernels = not why_no_kernels(torch.float32)
    for asked, expected in ((None, 2), (1, 1), (2, 2), (3, 0)):
        with use_backend("native"), use_fusion_level(asked):
            assert level(*convolution()) == (expected if kernels else 0)
            assert level(*convolution(dtype=torch.float64)) == 0
            if asked == 3:
                assert "which has levels 1 and 2" in why_not_fused_training(*convolution())[0]


def test_what_the_kernels_cannot_take_is_said_in_their_words(monkeypatch):
    """As on a machine with a GPU, told from the kernels' own reasons."""
    asked: list[tuple] = []

    def reasons(name: str, op: str, arguments: tuple[Tensor, ...]) -> list[str]:
        asked.append((name, op, len(arguments)))
        return ["x is torch.float64; it takes float32"] if arguments[0].dtype == torch.float64 else []

    monkeypatch.setattr(plan, "reasons_against", reasons)
    monkeypatch.setattr(plan, "is_native", lambda x: False)
    with use_backend("auto"), use_fusion_level(None):
        assert level(*convolution()) == 3
        assert level(*convolution(dtype=torch.float64)) == 0
        assert why_not_fused_training(*convolution(dtype=torch.float64)) == ["x is torch.float64; it takes float32"]
    names = torch.ops.fused_resnet.conv_stats.default._schema.arguments
    assert set(asked) == {("triton", "conv_stats", len(names))}


class OnCuda(torch.Tensor):
    """An image that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("precision", "expected"), [("ieee", 0), ("tf32", 3)])
def test_float32_is_fused_where_it_may_be_rounded_to_tf32(monkeypatch, precision, expected):
    """Without matrix instructions cuDNN is faster; asked for by number, the level is as asked. bfloat16 has them."""
    monkeypatch.setattr(plan, "reasons_against", lambda *arguments: [])
    monkeypatch.setattr(plan, "is_native", lambda x: False)
    before = torch.backends.cudnn.conv.fp32_precision
    x, *others = convolution()
    try:
        torch.backends.cudnn.conv.fp32_precision = precision
        with use_backend("auto"):
            with use_fusion_level(None):
                assert level(x.as_subclass(OnCuda), *others) == expected
                assert level(x.bfloat16().as_subclass(OnCuda), *others) == 3
            with use_fusion_level(2):
                assert level(x.as_subclass(OnCuda), *others) == 2
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a machine where the kernels run; gives a function that records the level of a convolution."""
    monkeypatch.setenv(plan_file.ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(plan_file, "SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(plan, "reasons_against", lambda *arguments: [])
    monkeypatch.setattr(plan, "is_native", lambda x: False)
    measured_plan.reload()

    def record(arguments: tuple, winner: str) -> None:
        x, weight, *settings = arguments
        key = plan_key.level_key(x, weight, ConvSettings.of(*settings))
        measured_plan.record(measured_plan.LEVEL, key, winner, {})

    yield record
    monkeypatch.undo()
    measured_plan.reload()


def test_a_measured_level_is_that_of_its_convolution(measured):
    x, weight, *settings = convolution()
    with use_backend("auto"), use_fusion_level(None):
        assert training_level(x, weight, *settings) == 3
        measured((x, weight, *settings), "1")
        assert training_level(x, weight, *settings) == 1
        assert training_level(x[:1], weight, *settings) == 3
        with measured_plan.ignoring_measured_plan():
            assert training_level(x, weight, *settings) == 3
        measured((x, weight, *settings), "0")
        assert training_level(x, weight, *settings) == 0
        measured((x, weight, *settings), "as fast as light")
        assert training_level(x, weight, *settings) == 3


def test_what_is_asked_for_overrules_what_was_measured(measured, monkeypatch):
    arguments = convolution()
    measured(arguments, "1")
    with use_backend("auto"):
        for asked in (0, 2, 3):
            with use_fusion_level(asked):
                assert training_level(*arguments) == asked
    with use_backend("reference"), use_fusion_level(None):
        assert training_level(*arguments) == 3
    monkeypatch.setattr(plan, "reasons_against", lambda *arguments: ["it cannot"])
    measured(arguments, "2")
    with use_backend("auto"), use_fusion_level(None):
        assert training_level(*arguments) == 0  # nothing that cannot run is measured into being
