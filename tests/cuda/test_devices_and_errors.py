"""Every op of the cuda backend on a second device, and when a launch fails."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.ops.backends.cuda import conv as cuda_conv
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from tests.cuda.cases import (
    HALF,
    STREAM,
    TWO_LAUNCHES,
    assert_same_bits,
    call,
    convolution,
    every_call,
    every_name,
    host_only,
    image,
    same_bits,
    with_own_running,
    x_of,
)
from tests.cuda.on_host import Host

ERRORS = {719: "cudaErrorLaunchFailure", 1: "cudaErrorInvalidValue", 9: "cudaErrorInvalidConfiguration"}


def name_in_errors(op: str) -> str:
    """The function of csrc/cuda/ops.h that is behind an op."""
    return op.removesuffix("_mask")


class Runtime:
    """The host's CUDA runtime, asked as the kernels ask it."""

    def __init__(self, host: Host) -> None:
        self.library = host.library

    def current_device(self) -> int:
        device = ctypes.c_int(-1)
        assert self.library._Z13cudaGetDevicePi(ctypes.byref(device)) == 0
        return device.value

    def set_current_device(self, device: int) -> None:
        assert self.library._Z13cudaSetDevicei(device) == 0

    def pending_error(self) -> int:
        return self.library._Z19cudaPeekAtLastErrorv()


@pytest.fixture
def on_second_device(monkeypatch: pytest.MonkeyPatch):
    """A function after which every op runs on device 1, in the words of tensors that are on the CPU."""

    def use() -> None:
        class Kernels:
            def __getattr__(self, name: str) -> Any:
                return getattr(cuda_launch.extension.cuda, name)

            def Place(self, *values: Any) -> Any:
                return cuda_launch.extension.cuda.Place(*values[:5], 1, STREAM)

        kernels = Kernels()
        for module in (cuda_launch, cuda_conv):
            monkeypatch.setattr(module, "kernels", lambda: kernels)
        monkeypatch.setattr(cuda_launch, "_places", {})  # those of device 0 are remembered

    return use


@host_only
@every_name
def test_a_second_device(name: str, device, host, on_second_device) -> None:
    """The op runs there, and the device that was current is current again, whichever it was and whatever happens."""
    op, args = every_call(HALF, device)[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    runtime = Runtime(host)
    on_second_device()
    host.launches()
    for current in (0, 1):
        runtime.set_current_device(current)
        assert_same_bits(call(op, *with_own_running(op, tuple(args))), expected, x_of(op, args), name)
        assert {launch.device for launch in host.launches()} == {1}
        assert runtime.current_device() == current
        host.fail_next_launch(719)
        with pytest.raises(RuntimeError, match="on CUDA device 1: cudaErrorLaunchFailure"):
            call(op, *args)
        assert runtime.current_device() == current
        host.launches()
    runtime.set_current_device(0)


@host_only
def test_a_device_that_is_not_there(device, host) -> None:
    kernels, address = host.module.cuda, 4096
    place = kernels.Place(1, 8, 2, 2, host.module.DType.float32, 7, 0)
    norm = (address, address, 0, 0)
    with pytest.raises(RuntimeError, match=r"bn_apply of \(1, 8, 2, 2\) float32 on CUDA device 7: cudaErrorInvalidDev"):
        kernels.bn_apply(place, address, *norm, 0, True, address, 0)
    assert Runtime(host).pending_error() == 0 and Runtime(host).current_device() == 0
    for number in (-1, 64):
        with pytest.raises(RuntimeError, match=str(number)):
            kernels.bn_workspace_bytes(kernels.Place(1, 8, 2, 2, host.module.DType.float32, number, 0))


@host_only
@every_name
@pytest.mark.parametrize("error", ERRORS)
def test_a_launch_that_fails(name: str, error: int, device, host) -> None:
    """Op, shape, dtype, device and CUDA's name of the error; nothing is left behind, and nothing was moved."""
    op, args = every_call(HALF, device)[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    before = [each.clone() if isinstance(each, Tensor) else each for each in args]
    x = x_of(op, args)
    host.fail_next_launch(error)
    with pytest.raises(RuntimeError) as raised:
        call(op, *args)
    message = str(raised.value)
    assert message.startswith(f"{name_in_errors(op)} of {tuple(x.shape)} float16 on CUDA device 0: {ERRORS[error]} (")
    assert Runtime(host).pending_error() == 0
    for index, (now, then) in enumerate(zip(args, before, strict=True)):
        assert not isinstance(now, Tensor) or same_bits(now, then), f"argument {index} was written"
    assert_same_bits(call(op, *args), expected, x, name)


@contextlib.contextmanager
def failing_second_launch(host: Host, error: int) -> Iterator[None]:
    """While the first launch inside runs, and it runs without Python's lock, the next one is made to fail."""
    stopped = threading.Event()

    def wait_and_fail() -> None:
        while host.library.host_execution_launch_count() == 0 and not stopped.is_set():
            pass
        host.fail_next_launch(error)

    host.launches()
    thread = threading.Thread(target=wait_and_fail, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        host.fail_next_launch(0)


@host_only
@pytest.mark.parametrize("name", [*TWO_LAUNCHES, "conv_bn_act"])
def test_a_second_launch_that_fails(name: str, device, host, monkeypatch) -> None:
    if name == "conv_bn_act":
        op, args = name, convolution((1, 256, 14, 14), 64, (3, 3), HALF, device)
        choose = cuda_conv._conv_choice

        def split(*sizes: Any) -> Any:
            shape, *_ = choose(*sizes)
            chosen = cuda_launch.kernels().ConvChoice(2, 3)
            return shape, chosen, cuda_launch.kernels().conv_workspace_bytes(shape, chosen)

        monkeypatch.setattr(cuda_conv, "_conv_choice", split)
    else:
        op, args = every_call(HALF, device, (1, 64, 61, 47))[name]
    x = x_of(op, args)
    expected = call(op, *with_own_running(op, tuple(args)))
    message = ""
    for _ in range(50):  # a busy machine may let the second launch through
        with failing_second_launch(host, 719):
            try:
                call(op, *with_own_running(op, tuple(args)))
            except RuntimeError as error:
                message = str(error)
        if message:
            break
    assert len(host.launches()) == 1
    assert message.startswith(f"{name_in_errors(op)} of {tuple(x.shape)} float16 on CUDA device 0: {ERRORS[719]} (")
    assert Runtime(host).pending_error() == 0
    assert_same_bits(call(op, *args), expected, x, name)


@host_only
@pytest.mark.parametrize("name", ["bn_stats_apply", "bn_stats_apply with mask"])
def test_a_refused_cooperative_launch_becomes_three(name: str, device, host) -> None:
    """cudaErrorCooperativeLaunchTooLarge: under MPS, or in a green context, a process has a part of the device."""
    op, args = every_call(HALF, device)[name]
    again = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    expected = call(op, *args)
    host.launches()
    host.fail_next_launch(720)
    actual = call(op, *again)
    assert [launch.cooperative for launch in host.launches()] == [False, False, False]
    for ours, theirs in zip(actual, expected, strict=True):
        if ours.dtype == torch.uint8:
            assert ours.shape == theirs.shape
        else:  # merged of other parts
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@host_only
def test_running_statistics_of_another_dtype_wait_for_the_launch(device, host) -> None:
    """They are moved as float32 copies, which a launch that failed must not bring back."""
    x = image((2, 24, 5, 3), HALF, device)
    running = [torch.rand(24, dtype=torch.float64) for _ in range(2)]
    before = [vector.clone() for vector in running]
    for rest in ((), (None, None, None, True, True)):
        host.fail_next_launch(719)
        with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
            call("bn_stats_apply" if rest else "bn_stats", x, *running, 0.1, 1e-5, *rest)
        assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))
