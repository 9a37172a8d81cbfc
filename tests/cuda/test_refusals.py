"""What the cuda backend refuses, by name and with reasons, and what is done then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_resnet.ops import BackendError, reference, use_backend
from fused_resnet.ops.route import choose, reasons
from tests.cuda.cases import (
    DTYPES,
    by_reference,
    call,
    convolution,
    every_call,
    host_only,
    image,
    names_of_calls,
    outputs,
    statistics,
    vectors,
    with_own_running,
)

HALF = torch.float16
NAMES = names_of_calls()
every_name = pytest.mark.parametrize("name", NAMES)


def x_of(op: str, args: list[Any]) -> Tensor:
    return args[1] if "grad" in op else args[0]


@pytest.mark.filterwarnings("ignore:var_mean")  # of nothing, which torch warns of
@every_name
def test_nothing_is_refused_by_name_or_done_elsewhere(name: str, device) -> None:
    """Of no images: BackendError where the backend was asked for, the reference's empty result where it was not."""
    op, args = every_call(HALF, device)[name]
    keep = args[1] if op in ("conv_bn_act", "stem") else None  # a weight; all else of several dimensions has rows
    empty = [each[:0] if isinstance(each, Tensor) and each.dim() > 1 and each is not keep else each for each in args]
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot run {op}: x is empty"):
        call(op, *empty)
    if op == "avgpool" or device.type != "cpu":
        return
    with use_backend("auto"):
        found = call(op, *with_own_running(op, tuple(empty)))
    for a, b in zip(outputs(found), outputs(by_reference(op, *with_own_running(op, tuple(empty)))), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@every_name
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 8, 1, 1), (1, 1, 3, 2), (1, 2049, 1, 1)], ids=str)
def test_smallest_shapes(name: str, shape: tuple[int, ...], device) -> None:
    """One row, one channel, and one channel more than whole slices: the numbers of the reference."""
    if name in ("conv_bn_act", "stem"):
        pytest.skip("takes no such image")
    op, args = every_call(torch.float32, device, shape)[name]
    found = call(op, *with_own_running(op, tuple(args)))
    baseline = by_reference(op, *with_own_running(op, tuple(args)))
    for a, b in zip(outputs(found), outputs(baseline), strict=True):
        if a.dtype == torch.uint8 and a.numel():
            a, b = (reference.unpack_mask(mask, x_of(op, args)).float() for mask in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_name
def test_x_must_be_channels_last(name: str, device) -> None:
    op, args = every_call(HALF, device)[name]
    if op == "stem":
        pytest.skip("takes any strides")
    x = x_of(op, args)
    changed = [each.contiguous() if each is x else each for each in args]
    with pytest.raises(BackendError, match=f"cannot run {op}: x is not channels_last"):
        call(op, *changed)


@every_name
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_dtypes_of_x(name: str, dtype: torch.dtype, device) -> None:
    op, args = every_call(HALF, device)[name]
    x = x_of(op, args)
    changed = [each.to(dtype) if each is x else each for each in args]
    with pytest.raises(BackendError, match=f"cannot run {op}: .*x is {dtype}; it.* takes"):
        call(op, *changed)


@pytest.mark.parametrize("name", ["conv_bn_act", "stem"])
def test_convolutions_take_16_bits(name: str, device) -> None:
    op, args = every_call(HALF, device)[name]
    changed = [each.float() if isinstance(each, Tensor) else each for each in args]
    with pytest.raises(BackendError, match=r"is torch.float32; .*takes float16 and bfloat16"):
        call(op, *changed)
    other = [*args]
    other[1] = args[1].bfloat16()
    with pytest.raises(BackendError, match="torch.bfloat16|torch.float16"):
        call(op, *other)


def wrong_shapes(op: str, args: list[Any]) -> list[tuple[int, Tensor]]:
    """For each tensor but x: one channel, row or image less, and a rank too little."""
    found = []
    for index, tensor in enumerate(args):
        if not isinstance(tensor, Tensor) or tensor is x_of(op, args):
            continue
        found.append((index, tensor[:-1]))
        if tensor.dim() == 4:
            found += [(index, tensor[:, :-1]), (index, tensor[0])]
            if op != "conv_bn_act" or index != 1:  # a kernel may have any size
                found.append((index, tensor[:, :, :-1]))
        if tensor.dtype == torch.uint8:
            found += [(index, tensor[:, :-1]), (index, tensor.float())]
    return found


@every_name
def test_wrong_shapes(name: str, device) -> None:
    """No kernel sees a tensor that ends before it does."""
    op, args = every_call(HALF, device)[name]
    for index, tensor in wrong_shapes(op, args):
        changed = [tensor if place == index else each for place, each in enumerate(args)]
        with pytest.raises(BackendError) as raised:
            call(op, *changed)
        named = str(tuple(tensor.shape)), f"{tensor.shape[0]} filters"
        assert any(name in str(raised.value) for name in named), str(raised.value)


@every_name
def test_a_vector_where_an_image_belongs(name: str, device) -> None:
    """And an image where a vector belongs: neither reaches a kernel."""
    op, args = every_call(HALF, device)[name]
    if op in ("conv_bn_act", "stem"):
        pytest.skip("test_wrong_shapes")
    x = x_of(op, args)
    (vector,) = vectors(x.shape[1], device, 1)
    for index, tensor in enumerate(args):
        if not isinstance(tensor, Tensor) or tensor is x or tensor.dtype == torch.uint8:
            continue
        changed = [*args]
        changed[index] = vector if tensor.dim() == 4 else x
        with pytest.raises((BackendError, RuntimeError)):
            call(op, *changed)


@every_name
def test_tensors_on_another_device(name: str, device) -> None:
    """Only asked for reasons, since an address of another device would end the process."""
    op, args = every_call(HALF, device)[name]
    for index, tensor in enumerate(args):
        if not isinstance(tensor, Tensor):
            continue
        changed = [*args]
        changed[index] = tensor.to("meta")
        found = choose.why_not("cuda", op, *changed)
        assert found and "meta" in "; ".join(found), f"argument {index} of {op} on another device is taken"


def test_a_stem_without_filters_is_refused(device) -> None:
    x = torch.zeros(1, 3, 9, 9, dtype=HALF, device=device)
    weight = torch.zeros(0, 3, 7, 7, dtype=HALF, device=device)
    with pytest.raises(BackendError, match="conv_weight"):
        call("stem", x, weight, None, None, None, None)


def test_what_a_stem_refuses(device) -> None:
    x = torch.zeros(1, 3, 9, 9, dtype=HALF, device=device)
    weight = torch.zeros(64, 3, 7, 7, dtype=HALF, device=device)
    scale = torch.ones(64, device=device)
    three = [1.0, 1.0, 1.0]
    bytes_of_x = x.to(torch.uint8)
    refused: list[tuple[list[Any], str]] = [
        ([x[:, :2], weight, scale, scale, None, None], r"x is \(1, 2, 9, 9\); it takes \(N, 3, H, W\)"),
        ([x[0], weight, scale, scale, None, None], r"x is \(3, 9, 9\)"),
        ([x, weight[:32], None, None, None, None], r"conv_weight is \(32, 3, 7, 7\); .* K a multiple of 64"),
        ([x, weight[..., :5, :5], scale, scale, None, None], r"conv_weight is \(64, 3, 5, 5\)"),
        ([x, weight, scale[:-1], scale, None, None], r"is \(63,\)"),
        ([x, weight, scale, scale[:-1], None, None], r"is \(63,\)"),
        ([bytes_of_x, weight, scale, scale, None, None], r"x is torch.uint8"),
        ([x, weight, scale, scale, three, three], r"x is torch.float16; .* with a pixel_scale, torch.uint8"),
        ([bytes_of_x, weight, scale, scale, three, None], "pixel_scale and pixel_shift must be three numbers each"),
        ([bytes_of_x, weight, scale, scale, three[:2], three], "pixel_scale and pixel_shift must be three numbers"),
        ([bytes_of_x, weight, scale, scale, three, [*three, 1.0]], "pixel_scale and pixel_shift must be three numbers"),
    ]
    for args, message in refused:
        with pytest.raises(BackendError, match=message):
            call("stem", *args)


def test_what_a_convolution_refuses(device) -> None:
    x, weight, scale, shift, residual, *rest = convolution((1, 16, 6, 6), 24, (3, 3), HALF, device)
    refused: list[tuple[list[Any], str]] = [
        ([x[:, :12], weight[:, :12], scale, shift, residual, *rest], "12 channels and 24 filters; .* multiples of 8"),
        ([x, weight[:20], scale[:20], shift[:20], residual[:, :20], *rest], "16 channels and 20 filters"),
        ([x, weight[:0], None, None, None, *rest], "conv_weight is empty"),
        ([x, weight[:, :8], scale, shift, residual, *rest[:3], 2, True], "groups is 2; it takes 1"),
        ([x, weight, scale, shift, residual, *rest[:2], [3, 3], 1, True], "the output would be 0 x 0"),
        ([x, weight, scale, shift, residual[:, :, :-1], *rest], r"residual is \(1, 24, 3, 4\)"),
        (
            [x, weight[:, :8], scale, shift, residual, *rest],
            r"\(24, 8, 3, 3\), takes 8 channels; x has 16",
        ),
    ]
    for args, message in refused:
        with pytest.raises(BackendError, match=message):
            call("conv_bn_act", *args)


def test_a_name_that_the_backend_does_not_have(device) -> None:
    x = image((1, 8, 4, 4), HALF, device)
    with pytest.raises(BackendError, match="cannot run bn_apply_pool: it has no bn_apply_pool"):
        call("bn_apply_pool", x, *statistics(x), None, None, [3, 3], [2, 2], [1, 1])


@host_only
def test_the_automatic_choice_is_this_backend(device, host) -> None:
    """Where it takes the arguments, of each op that it has."""
    for dtype in DTYPES:
        for name, (op, args) in every_call(dtype, device).items():
            assert choose.choose_automatically(op, tuple(args)) is reasons.module("cuda"), name
