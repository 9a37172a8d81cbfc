"""What every op of the cuda backend promises beside numbers: launches, streams, devices, errors."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet.ops import reference
from fused_resnet.ops.backends.cuda import conv as cuda_conv
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from tests.accuracy import assert_at_most_twice
from tests.cuda.cases import (
    DTYPES,
    HALVES,
    assert_same_bits,
    call,
    channels_last,
    convolution,
    every_call,
    host_only,
    image,
    misaligned,
    names_of_calls,
    outputs,
    same_bits,
    with_own_running,
)
from tests.cuda.host_build import CSRC
from tests.cuda.on_host import Host

pytestmark = pytest.mark.xdist_group("cuda_on_host")

HALF = torch.float16
NAMES = names_of_calls()
TWO_LAUNCHES = [name for name in NAMES if name.startswith(("bn_stats", "bn_grad_stats")) and "apply" not in name]
STREAM = 0x1234
ERRORS = {719: "cudaErrorLaunchFailure", 1: "cudaErrorInvalidValue", 9: "cudaErrorInvalidConfiguration"}
every_name = pytest.mark.parametrize("name", NAMES)


def x_of(op: str, args: list[Any]) -> Tensor:
    return args[1] if "grad" in op else args[0]


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


# Launches


@host_only
@every_name
def test_how_many_launches(name: str, device, host) -> None:
    """Statistics take two, everything else one; bn_stats_apply's is cooperative, and no other is."""
    op, args = every_call(HALF, device)[name]
    host.launches()
    call(op, *args)
    launches = host.launches()
    if op == "conv_bn_act":
        assert len(launches) in (1, 2)
    else:
        assert len(launches) == (2 if name in TWO_LAUNCHES else 1)
    assert [launch.cooperative for launch in launches] == [op == "bn_stats_apply"] * len(launches)


@host_only
@every_name
def test_the_stream_reaches_every_launch(name: str, device, host, monkeypatch) -> None:
    op, args = every_call(HALF, device)[name]
    host.launches()
    call(op, *args)
    assert {launch.stream for launch in host.launches()} == {0}
    for module in (cuda_launch, cuda_conv):
        monkeypatch.setattr(module, "current_stream", lambda device: STREAM)
    call(op, *args)
    launches = host.launches()
    assert launches and {launch.stream for launch in launches} == {STREAM}


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


# Errors


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


FORBIDDEN = [
    r"cuda\w*Synchronize",
    r"cudaMalloc\w*",
    r"cudaFree\w*",
    r"cudaMem(cpy|set)\w*",
    r"cudaEvent\w*",
    r"cudaStreamWait\w*",
    r"<<<",
    r"\bnew\b",
    r"\bmalloc\b",
    r"\batomic\w*\(",  # sums in any order would not be the same bits in every run
    r"\bprintf\b",
]


@pytest.mark.parametrize("forbidden", FORBIDDEN)
def test_nothing_waits_or_allocates(forbidden: str) -> None:
    """So every op can be captured in a CUDA graph."""
    for path in sorted((CSRC / "cuda").iterdir()):
        code = re.sub(r"//.*", "", path.read_text())
        assert not re.search(forbidden, code), path.name


@host_only
@every_name
def test_memory_comes_from_pytorch(name: str, device, host) -> None:
    """Once asked, a device is not asked again, and outputs do not share memory with arguments or each other."""
    op, args = every_call(HALF, device)[name]
    results = [tensor for tensor in outputs(call(op, *args)) if tensor.numel()]
    places = [tensor.untyped_storage().data_ptr() for tensor in results]
    given = [tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)]
    assert len({*places}) == len(places) and not {*places} & {*given}


# Sizes of what the kernels get


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    images=st.integers(1, 2**15),
    channels=st.integers(1, 5000) | st.integers(1, 600).map(lambda eighth: 8 * eighth),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    offset=st.booleans(),
    mask=st.booleans(),
)
@host_only
def test_workspaces_and_grids_are_large_enough(device, host, images, channels, size, dtype, offset, mask) -> None:
    """Of any size, aligned or not: partial results fit in the workspace, and every launch is one that CUDA takes.
    Nothing runs, so nothing is read."""
    kernels, address = host.module.cuda, 4096
    place = kernels.Place(images, channels, *size, getattr(host.module.DType, dtype), 0, 0)
    norm = [address] * 4
    x, bits = address + 4 * offset, address if mask else 0
    available = kernels.bn_workspace_bytes(place)
    host.skip_launches(True)
    host.launches()
    kernels.bn_stats(place, x, address, address, 0, 0, 0.1, 1e-5, address)
    kernels.bn_grad_stats(place, x, x, 0, bits, *norm, True, 0, address, address, address)
    if kernels.fits_on_chip(place) and not offset and (mask or channels % 8 == 0):
        kernels.bn_stats_apply(place, x, 0, 0, 0, *[address] * 4, 0.1, 1e-5, True, address, bits, address)
    for launch in host.launches()[::2]:  # bn_stats, bn_grad_stats, bn_stats_apply; not those that merge
        assert launch.grid[1] * channels * 12 <= available
    kernels.bn_apply(place, x, *norm, x, True, address, bits)
    kernels.bn_apply_dual(place, x, *norm, x, *norm, True, address, bits)
    kernels.bn_grad_apply(place, x, x, bits, *norm, address, address, True, address, address)
    kernels.avgpool(place, x, address)
    assert len(host.launches()) == 4


@host_only
def test_sizes_that_no_kernel_can_take(device, host) -> None:
    kernels, dtype = host.module.cuda, host.module.DType.float16
    for sizes in ((0, 8, 2, 2), (1, 0, 2, 2), (1, 8, -1, 2), (1, 8, 2, 2**31)):
        with pytest.raises(ValueError, match=r"images, channels, height and width must be 1 to 2\^31 - 1"):
            kernels.Place(*sizes, dtype, 0, 0)
    place = kernels.Place(1, 8, 4, 4, dtype, 0, 0)
    for filters, kernel in ((0, (1, 1)), (12, (1, 1)), (8, (5, 5))):
        with pytest.raises(ValueError, match="multiples of 8, and at least one output pixel"):
            kernels.ConvShape(place, filters, kernel, (1, 1), (0, 0), (1, 1))
    shape = kernels.ConvShape(place, 8, (1, 1), (1, 1), (0, 0), (1, 1))
    arguments = [4096, 4096, 0, 0, 0, True, 4096, 4096]
    for index in (0, 1, 2, 3, 4, 6, 7):
        wrong = list(arguments)
        wrong[index] = 4104
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            kernels.conv_bn_act(place, shape, kernels.ConvChoice(0, 1), *wrong)
    with pytest.raises(ValueError, match="takes a workspace"):
        kernels.conv_bn_act(place, shape, kernels.ConvChoice(0, 2), *arguments[:-1], 0)


@pytest.mark.parametrize("channels", [1, 3, 8, 31, 32, 33, 64, 2049])
def test_rows_of_a_mask(channels: int, device) -> None:
    """As ops/reference/mask.py says, where backward looks for them."""
    assert (5, cuda_launch.kernels().mask_stride(channels)) == reference.mask_shape((5, channels, 1, 1))


# Where tensors begin


@every_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [2, 4, 8])
def test_misaligned_addresses(name: str, dtype: torch.dtype, offset: int, device) -> None:
    """Each tensor alone so many bytes behind a multiple of 16. Passes without sums give the same bits; where rows go to
    other threads, sums are added in another order."""
    calls = every_call(dtype, device)
    if name not in calls or offset % dtype.itemsize:
        pytest.skip(f"{dtype} has no such {name}")
    op, args = calls[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    x = x_of(op, args)
    for index, tensor in enumerate(args):
        if not isinstance(tensor, Tensor) or offset % tensor.element_size():
            continue
        other = with_own_running(op, tuple(args))
        other[index] = misaligned(tensor, offset // tensor.element_size())
        found = call(op, *other)
        if op in ("bn_stats", "bn_stats_apply", "bn_grad_stats", "bn_grad_stats_mask", "avgpool"):
            for part, (a, b) in enumerate(zip(outputs(found), outputs(expected), strict=True)):
                if a.is_floating_point():
                    unit = torch.finfo(a.dtype).eps
                    size = b.abs().max().item() if b.numel() else 0
                    torch.testing.assert_close(a, b, rtol=0, atol=8 * unit * size, msg=f"{name}: {index}, {part}")
        else:
            assert_same_bits(found, expected, x, f"{name}, argument {index}")


# On a real device


@pytest.mark.gpu
@every_name
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_captured_in_a_graph(name: str, dtype: torch.dtype, device) -> None:
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    op, args = every_call(dtype, device, (4, 64, 28, 28))[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    own = with_own_running(op, tuple(args))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(op, *own)
    for _ in range(3):
        for tensor in outputs(found):
            tensor.zero_()
        graph.replay()
        assert_same_bits(found, expected, x_of(op, args), name)


@pytest.mark.gpu
@every_name
def test_on_a_stream_of_its_own(name: str, device) -> None:
    """Behind work on that stream which makes its input: on any other it would read zeros."""
    if device.type != "cuda":
        pytest.skip("streams are CUDA's")
    op, args = every_call(HALF, device, (4, 64, 28, 28))[name]
    expected = call(op, *with_own_running(op, tuple(args)))
    x = x_of(op, args)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        found = call(op, *(late if each is x else each for each in with_own_running(op, tuple(args))))
    stream.synchronize()
    assert_same_bits(found, expected, x, name)


@pytest.mark.gpu
def test_past_two_to_the_31(device) -> None:
    """Offsets past 2^31 elements: the last image of 2.2e9 elements is what it is alone."""
    if device.type != "cuda":
        pytest.skip("too large for the host")
    shape = (33, 64, 1024, 1024)
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("20 GB of free memory are needed")
    torch.use_deterministic_algorithms(False)  # no time for filling
    x = torch.zeros(shape, dtype=HALF, device=device, memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[-1] = torch.randn(shape[1:], device=device)
    mean, invstd = call("bn_stats", x, None, None, 0.1, 1e-5)
    last, count = x[-1:].double(), 33 * 2**20
    torch.testing.assert_close(mean.double(), last.sum((0, 2, 3)) / count, rtol=1e-5, atol=1e-8)
    variance = last.square().sum((0, 2, 3)) / count - mean.double().square()
    torch.testing.assert_close(invstd.double(), torch.rsqrt(variance + 1e-5), rtol=1e-5, atol=0)
    out, mask = call("bn_apply_mask", x, mean, invstd, None, None, None)
    alone, bits = call("bn_apply_mask", channels_last(x[-1:]), mean, invstd, None, None, None)
    assert same_bits(out[-1:], alone) and torch.equal(mask[-(2**20) :], bits)
    exact = reference.bn_apply(last, mean.double(), invstd.double(), None, None, None, True)
    baseline = reference.bn_apply(x[-1:], mean, invstd, None, None, None, True)
    assert_at_most_twice(out[-1:], baseline, exact, what="the last image")
