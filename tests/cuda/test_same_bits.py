"""Every op of the cuda backend gives the same bits in every run, in whatever order threads and blocks run."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.ops.backends.cuda import conv as cuda_conv
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from tests.cuda.cases import (
    assert_same_bits,
    call,
    convolution,
    every_call,
    host_only,
    names_of_calls,
    use_small_machine,
    with_own_running,
)

RUNS_ON_HOST, RUNS_ON_DEVICE = 100, 20
NAMES = names_of_calls()


def check_runs(op: str, args: list, host, runs: int) -> None:
    """The running statistics too."""
    x = args[1] if "grad" in op else args[0]
    first = None
    for seed in range(runs):
        if host is not None:
            host.set_seed(seed)
        own = with_own_running(op, tuple(args))
        result = call(op, *own)
        found = (
            *(result if isinstance(result, tuple) else (result,)),
            *(own[1:3] if op.startswith("bn_stats") else ()),
        )
        first = found if first is None else first
        assert_same_bits(found, first, x, f"{op}, run {seed}")


@host_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_order_of_threads(name: str, dtype: torch.dtype, device, host, monkeypatch) -> None:
    """On a machine of 3 multiprocessors, so that blocks take several tiles; 260 rows of 16 channels are 3 parts."""
    calls = every_call(dtype, device, (2, 16, 13, 10))
    if name not in calls:
        pytest.skip(f"{name} does not take {dtype}")
    use_small_machine(host, monkeypatch, 3)
    op, args = calls[name]
    if op == "stem":
        args[0] = args[0][:1]
    check_runs(op, args, host, RUNS_ON_HOST)


@host_only
@pytest.mark.parametrize("channels", [13, 12])
@pytest.mark.parametrize("name", [name for name in NAMES if "stats" in name or "mask" in name])
def test_any_order_of_threads_that_take_one_element_each(name: str, channels: int, device, host, monkeypatch) -> None:
    use_small_machine(host, monkeypatch, 3)
    op, args = every_call(torch.float16, device, (2, channels, 13, 10))[name]
    check_runs(op, args, host, RUNS_ON_HOST)


@host_only
@pytest.mark.parametrize("tile", [0, 1, 2])
@pytest.mark.parametrize("splits", [1, 3])
def test_convolutions(tile: int, splits: int, device, host, monkeypatch) -> None:
    """Every tile, with the sum in one piece and in three."""
    choose = cuda_conv._conv_choice

    def forced(*sizes):
        shape, *_ = choose(*sizes)
        chosen = cuda_launch.kernels().ConvChoice(tile, splits)
        return shape, chosen, cuda_launch.kernels().conv_workspace_bytes(shape, chosen)

    monkeypatch.setattr(cuda_conv, "_conv_choice", forced)
    args = convolution((1, 72, 3, 4), 16, (2, 2), torch.float16, device, padding=(1, 0))
    check_runs("conv_bn_act", args, host, 30 if tile == 0 else 50)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (8, 13, 29, 31), (2, 2048, 7, 7)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_device(name: str, shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    if device.type != "cuda":
        pytest.skip("test_any_order_of_threads")
    if shape[1] == 13 and name == "conv_bn_act":
        pytest.skip("channels are multiples of 8")
    calls = every_call(dtype, device, shape)
    if name not in calls:
        pytest.skip(f"{name} does not take {dtype}")
    check_runs(*calls[name], None, RUNS_ON_DEVICE)
