"""Inputs that the tests of the cuda backend share, the accuracy rule on all that an op returns, and small machines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops import reference
from fused_resnet.ops.backends.cuda import conv as cuda_conv
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.backends.cuda import norm as cuda_norm
from fused_resnet.ops.route.packing import packed
from tests.accuracy import assert_at_most_twice
from tests.cuda.on_host import Host

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]

SHAPES = [
    (2, 64, 7, 7),  # whole vectors; 98 rows are no multiple of a tile
    (1, 64, 1, 1),  # one row
    (5, 24, 1, 1),  # one pixel of several images; three vectors of 8
    (3, 1, 9, 7),  # one channel
    (2, 13, 5, 3),  # all prime: nothing is aligned
    (1, 12, 31, 5),  # vectors of 4, not of 8: other paths with and without a mask
    (2, 72, 11, 13),  # 9 vectors: lanes beside the last channel
    (1, 2049, 3, 2),  # one element at a time, one channel more than 64 slices
    (1, 2048, 7, 7),  # layer4 of ResNet-50
    (1, 256, 14, 14),  # layer3 of ResNet-18
    (1, 64, 56, 56),  # layer1: many tiles
]
SMALL = [SHAPES[0], SHAPES[4], SHAPES[5], SHAPES[6]]

host_only = pytest.mark.parametrize("device", ["host"], indirect=True)
"""Of a test that sets up the machine, which a real one does not allow."""

_FIRST_DEVICE = 40  # of the small machines: properties_of (csrc/cuda/launch.h) asks once, so each has its own number


def call(op: str, *args: Any) -> Any:
    """What a user of the op gets, by whatever backend is asked for."""
    return getattr(torch.ops.fused_resnet, op)(*args)


def by_reference(op: str, *args: Any) -> Any:
    """What the reference makes of the same."""
    return getattr(reference, op)(*packed(op, args))


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, mean: float = 0.5) -> Tensor:
    """Normally distributed, channels_last, every channel with a deviation of its own."""
    deviation = torch.linspace(0.5, 2, shape[1])[None, :, None, None]
    return channels_last((torch.randn(shape) * deviation + mean).to(device, dtype))


def vectors(channels: int, device: torch.device, count: int = 2) -> list[Tensor]:
    return [torch.randn(channels).to(device) for _ in range(count)]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return by_reference("bn_stats", x, None, None, 0.1, 1e-5)


def misaligned(tensor: Tensor, elements: int = 1) -> Tensor:
    """The same values and strides, so many elements behind an address that is a multiple of 16 bytes."""
    dense = tensor.permute(0, 2, 3, 1).contiguous() if tensor.dim() == 4 else tensor.contiguous()
    buffer = torch.empty(tensor.numel() + elements, dtype=tensor.dtype, device=tensor.device)
    view = buffer[elements:].view(dense.shape).copy_(dense)
    assert view.data_ptr() % 16 == elements * tensor.element_size() % 16
    return view.permute(0, 3, 1, 2) if tensor.dim() == 4 else view


def with_own_running(op: str, args: tuple[Any, ...]) -> list[Any]:
    """Copies of the running statistics, which the op writes; all else as it lies, misaligned where it is."""
    written = (1, 2) if op in ("bn_stats", "bn_stats_apply") else ()
    return [each.clone() if index in written and each is not None else each for index, each in enumerate(args)]


def widened(args: tuple[Any, ...]) -> list[Any]:
    """Copies in float64."""
    return [
        each.to(torch.float64, copy=True) if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in args
    ]


def check(op: str, *args: Any, terms: int = 1, magnitude: float | None = None) -> Any:
    """The op's result, after the accuracy rule on every output and on every tensor that was given to it.

    A uint8 output is a mask, whose bits must be those of the reference in the same dtype; an empty one must be empty.
    `magnitude` is that of the first output. Means are small sums of large numbers: theirs is the largest |x|.
    """
    before = [each.clone() if isinstance(each, Tensor) else each for each in args]
    ours, theirs, wide = with_own_running(op, args), with_own_running(op, args), widened(args)
    actual, baseline, exact = call(op, *ours), by_reference(op, *theirs), by_reference(op, *wide)
    as_tuples = (actual, baseline, exact) if isinstance(actual, tuple) else ((actual,), (baseline,), (exact,))
    x = args[1] if "grad" in op else args[0]
    largest = x.double().abs().max().item() if x.isfinite().all() else None
    means = {"bn_stats": 0, "bn_stats_apply": 2}.get(op)
    for index, (a, b, e) in enumerate(zip(*as_tuples, strict=True)):
        what = f"{op}: output {index}"
        assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {tuple(a.shape)} {a.dtype}"
        if b.numel() == 0:
            continue
        if a.dtype == torch.uint8:
            different = reference.unpack_mask(a, x) != reference.unpack_mask(b, x)
            assert not different.any(), f"{what}: {int(different.sum())} bits differ"
            continue
        assert strides(a) == strides(b), f"{what}: strides {a.stride()}, not {b.stride()}"
        size = largest if index == means else magnitude if index == 0 else None
        assert_at_most_twice(a, b, e, what=what, terms=terms, magnitude=size)
    for index, (a, b, e) in enumerate(zip(ours, theirs, wide, strict=True)):
        if not isinstance(a, Tensor):
            continue
        if a is args[index]:
            assert same_bits(a, before[index]), f"{op} wrote argument {index}"
            continue
        if a.dtype == torch.float64:  # only float32's digits are promised
            a, b = a.float(), b.float()
        size = largest if index == 1 else None
        assert_at_most_twice(a, b, e, what=f"{op}: argument {index} afterwards", magnitude=size)
    return actual


def strides(tensor: Tensor) -> list[int]:
    """Those that say where an element is."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def convolution(
    shape: tuple[int, ...],
    filters: int,
    kernel: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    relu: bool = True,
) -> list[Any]:
    """The arguments of conv_bn_act, everything channels_last, the outputs around 1."""
    x = channels_last(torch.randn(shape).to(device, dtype))
    fan_in = shape[1] * kernel[0] * kernel[1]
    weight = channels_last((torch.randn(filters, shape[1], *kernel) / fan_in**0.5).to(device, dtype))
    sizes = [list(stride), list(padding), list(dilation)]
    out = F.conv2d(x.to("meta"), weight.to("meta"), None, *sizes)
    residual = channels_last(torch.randn(out.shape).to(device, dtype))
    return [x, weight, *vectors(filters, device), residual, *sizes, 1, relu]


def every_call(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] = (2, 24, 5, 3)
) -> dict[str, tuple[str, list[Any]]]:
    """A name, an op and its arguments for every path of the backend that takes this dtype."""
    x, x2, grad, residual = (image(shape, dtype, device) for _ in range(4))
    (mean, invstd), second = statistics(x), statistics(x2)
    weight, bias, running_mean = vectors(shape[1], device, 3)
    running_var = running_mean.abs()
    norm, norm2 = [x, mean, invstd, weight, bias], [x2, *second, None, bias]
    out, mask = by_reference("bn_apply_mask", *norm, residual)
    sums = by_reference("bn_grad_stats", grad, x, None, mean, invstd, weight, bias, True)[:2]
    of_stats = [x, running_mean, running_var, 0.1, 1e-5]
    calls: dict[str, tuple[str, list[Any]]] = {
        "bn_stats": ("bn_stats", of_stats),
        "bn_apply": ("bn_apply", [*norm, None, False]),
        "bn_apply with residual": ("bn_apply", [*norm, residual, True]),
        "bn_apply_mask": ("bn_apply_mask", [*norm, residual]),
        "bn_apply_dual": ("bn_apply_dual", [*norm, *norm2, True]),
        "bn_apply_dual_mask": ("bn_apply_dual_mask", [*norm, *norm2]),
        "bn_stats_apply": ("bn_stats_apply", [*of_stats, weight, bias, residual, True, False]),
        "bn_stats_apply with mask": ("bn_stats_apply", [*of_stats, weight, bias, residual, True, True]),
        "bn_grad_stats": ("bn_grad_stats", [grad, x, None, mean, invstd, weight, bias, False]),
        "bn_grad_stats of x": ("bn_grad_stats", [grad, x, None, mean, invstd, weight, bias, True]),
        "bn_grad_stats of out": ("bn_grad_stats", [grad, x, out, mean, invstd, weight, bias, True]),
        "bn_grad_stats_mask": ("bn_grad_stats_mask", [grad, x, mask, mean, invstd, True]),
        "bn_grad_apply": ("bn_grad_apply", [grad, x, mean, invstd, weight, bias, *sums, False]),
        "bn_grad_apply of x": ("bn_grad_apply", [grad, x, mean, invstd, weight, bias, *sums, True]),
        "bn_grad_apply_mask": ("bn_grad_apply_mask", [grad, x, mask, mean, invstd, weight, *sums, True]),
        "avgpool": ("avgpool", [x]),
    }
    if dtype != torch.float32:
        settings = {"stride": (2, 1), "padding": (1, 1)}
        calls["conv_bn_act"] = ("conv_bn_act", convolution(shape, 16, (3, 3), dtype, device, **settings))
        pixels = torch.randn(2, 3, 19, 23).to(device, dtype)
        kernel = (torch.randn(64, 3, 7, 7) / 12).to(device, dtype)
        calls["stem"] = ("stem", [pixels, kernel, *vectors(64, device), None, None])
    return calls


def names_of_calls(dtype: torch.dtype = torch.float16) -> list[str]:
    return list(every_call(dtype, torch.device("cpu"), (1, 8, 2, 2)))


def outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN in the same places with the same bits, and zeros of the same sign."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal_kind = a.shape == b.shape and a.dtype == b.dtype
    return equal_kind and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def mask_bits(mask: Tensor, x: Tensor) -> Tensor:
    """Only those of channels: the others mean nothing."""
    return reference.unpack_mask(mask, x)


def assert_same_bits(first: Any, second: Any, x: Tensor, what: str) -> None:
    """Of all outputs of an op on x."""
    for index, (a, b) in enumerate(zip(outputs(first), outputs(second), strict=True)):
        if a.dtype == torch.uint8 and a.numel():
            a, b = (mask_bits(each, x).to(torch.uint8) for each in (a, b))
        assert same_bits(a, b), f"{what}: output {index} differs"


def use_small_machine(host: Host, monkeypatch: pytest.MonkeyPatch, multiprocessors: int) -> None:
    """Every op of this test runs on a device of 1 to 8 multiprocessors: few elements are then more tiles than parts."""
    number = _FIRST_DEVICE + multiprocessors
    dtype = host.module.DType.float16
    host.module.cuda.bn_workspace_bytes(host.module.cuda.Place(1, 8, 1, 1, dtype, 0, 0))  # device 0 stays what it is
    host.library.host_execution_set_device_count(number + 1)
    host.set_device(multiprocessors, 232448, 233472, 9, 0)

    def place_of(x: Tensor) -> Any:
        return cuda_launch.kernels().Place(*x.shape, cuda_launch.dtype_of(x.dtype), number, 0)

    for module in (cuda_norm, cuda_conv):
        monkeypatch.setattr(module, "place_of", place_of)


HALF = torch.float16
NAMES = names_of_calls()
TWO_LAUNCHES = [name for name in NAMES if name.startswith(("bn_stats", "bn_grad_stats")) and "apply" not in name]
STREAM = 0x1234  # of a stand-in for a stream's address
every_name = pytest.mark.parametrize("name", NAMES)


def x_of(op: str, args: list[Any]) -> Tensor:
    return args[1] if "grad" in op else args[0]
