"""The passes and the inference convolution, compiled for GPUs that are not here (tests/kernels/compiled.py)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fused_resnet import kernels
from fused_resnet.arguments import ConvSettings, Norm
from fused_resnet.kernels import conv
from tests.kernels.compiled import CHIPS, WITH_LITTLE_SHARED_MEMORY, check_resources, empty

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1: there is no compiler in this process")

DTYPES = [torch.bfloat16, torch.float32]
BN_REGISTERS = 96  # of 64 Ki: five programs of 128 threads, two of 256, on a multiprocessor
FINALIZE_REGISTERS = 128


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bn_passes(compile_launches, dtype: torch.dtype) -> None:
    """A stage of ResNet-50: nothing spills, everything moves 16 bytes at a time."""
    vectors_of_a_thread = 16 * dtype.itemsize // 16  # in an elementwise tile: 16 elements
    x, vector = empty((256, 256, 56, 56), dtype), torch.empty(256)
    norm, running = Norm(*(vector,) * 4), (vector, vector, 0.1, 1e-5)
    apply_passes = {
        1: (kernels.bn_apply, x, norm, None, True),
        2: (kernels.bn_apply, x, norm, x, True),
        3: (kernels.bn_apply_dual, x, norm, x, norm, True),
        4: (kernels.bn_grad_apply, x, x, norm, (vector, vector), True),
    }
    for case, (launcher, *args) in apply_passes.items():
        (kernel,) = compile_launches(launcher, *args)
        reads = 1 if case == 1 else 2
        assert kernel.count(r"ld\.global[.\w:]*\.v4\.b32") >= reads * vectors_of_a_thread, kernel.name
        assert kernel.count(r"st\.global[.\w:]*\.v4\.b32") == vectors_of_a_thread, kernel.name
        check_resources(kernel, BN_REGISTERS)

    reductions = {
        1: (kernels.bn_stats, x, running),
        2: (kernels.bn_grad_stats, x, x, None, norm, True),
        3: (kernels.bn_grad_stats, x, x, x, norm, True),
    }
    for reads, (launcher, *args) in reductions.items():
        partial, finalize = compile_launches(launcher, *args)
        copies = re.findall(r"cp\.async\.cg\.shared\.global.*?, 0x10", partial.ptx)  # of 16 bytes
        assert len(copies) >= 2 * reads * dtype.itemsize // 2, "fewer than two tiles in flight"
        assert partial.count(r"cp\.async\.ca") == 0, "copies of less than 16 bytes"
        check_resources(partial, BN_REGISTERS)
        check_resources(finalize, FINALIZE_REGISTERS)


@pytest.mark.parametrize("channels", [1, 17, 2049])
def test_bn_passes_of_unaligned_channels(compile_launches, channels: int) -> None:
    x, vector = empty((64, channels, 14, 14), torch.bfloat16), torch.empty(channels)
    norm, running = Norm(*(vector,) * 4), (vector, vector, 0.1, 1e-5)
    for launcher, *args in (
        (kernels.bn_stats, x, running),
        (kernels.bn_apply, x, norm, x, True),
        (kernels.bn_grad_stats, x, x, x, norm, True),
        (kernels.bn_grad_apply, x, x, norm, (vector, vector), True),
    ):
        for kernel in compile_launches(launcher, *args):
            check_resources(kernel, 168)


# (image), filters, kernel size, stride, padding
CONVOLUTIONS = {
    "stem": ((256, 3, 224, 224), 64, 7, 2, 3),
    "3x3": ((256, 64, 56, 56), 64, 3, 1, 1),
    "3x3, wide": ((256, 256, 14, 14), 256, 3, 1, 1),
    "1x1": ((256, 64, 56, 56), 256, 1, 1, 0),
    "projection": ((256, 256, 56, 56), 512, 1, 2, 0),
    "CIFAR": ((128, 16, 32, 32), 16, 3, 1, 1),
    "one image": ((1, 512, 7, 7), 512, 3, 1, 1),
    "unaligned": ((32, 45, 28, 28), 65, 3, 1, 1),
}
SMALL_TILES = {"one image"}  # wgmma takes 64 rows
SCALAR_LOADS = {("stem", 2), ("unaligned", 2)}  # cp.async copies 4 bytes or more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(compile_launches, chip: int, name: str, dtype: torch.dtype) -> None:
    """Matrix instructions on asynchronously copied tiles, no spills, within the chip's shared memory."""
    if dtype == torch.float32 and name in ("3x3, wide", "projection"):
        pytest.skip("the same code as 3x3 and 1x1 but for the number of steps; bfloat16 compiles both")
    (kernel,) = compile_launches(kernels.conv_bn_act, *convolution(*CONVOLUTIONS[name], dtype))
    check_resources(kernel, 255)
    assert kernel.shared <= CHIPS[chip][1]
    if chip == 90 and name not in SMALL_TILES:
        kind = "bf16" if dtype == torch.bfloat16 else "tf32"
        assert kernel.count(rf"wgmma\.mma_async[.\w]*\.{kind}\.{kind}") > 0
    else:
        kind = "bf16.bf16" if dtype == torch.bfloat16 else "tf32.tf32"
        assert kernel.count(rf"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.{kind}") > 0
    if (name, dtype.itemsize) not in SCALAR_LOADS:
        # The main loop is the only one: what follows the label it jumps back to.
        (loop,) = re.findall(
            r"^(\$L__BB0_\d+):(?:(?!^\$L__BB0_\d+:)[\s\S])*?bra(?:\.uni)?\s+\1;", kernel.ptx, re.M
        ) or [""]
        assert loop, "no main loop found"
        body = kernel.ptx.split(f"{loop}:", 1)[1].split(f"{loop};", 1)[0]
        assert "cp.async" in body and "mma" in body


# The largest tiles, of which the most operands are in flight.
@WITH_LITTLE_SHARED_MEMORY
@pytest.mark.parametrize("name", ["3x3, wide", "1x1", "projection"])
def test_convolution_with_little_shared_memory(compile_launches, chip: int, name: str) -> None:
    test_convolution(compile_launches, chip, name, torch.bfloat16)


def test_convolution_in_full_float32(compile_launches) -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        (kernel,) = compile_launches(kernels.conv_bn_act, *convolution(*CONVOLUTIONS["3x3"], torch.float32))
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    check_resources(kernel, 128)
    assert kernel.count("tf32") == 0 and kernel.count(r"fma\.rn\.f32") > 0


def test_convolution_with_64_bit_offsets(compile_launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take more registers: the largest tile still does not spill."""
    monkeypatch.setattr(conv, "WIDE_ELEMENTS", 1)
    for name in ("3x3", "1x1", "stem"):
        (kernel,) = compile_launches(kernels.conv_bn_act, *convolution(*CONVOLUTIONS[name], torch.bfloat16))
        check_resources(kernel, 255)


def convolution(
    shape: tuple[int, ...], filters: int, kernel: int, stride: int, padding: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The arguments of conv_bn_act with everything there."""
    size = (shape[2] + 2 * padding - kernel) // stride + 1
    weight = empty((filters, shape[1], kernel, kernel), dtype)
    residual = empty((shape[0], filters, size, size), dtype)
    vector = torch.empty(filters)
    settings = ConvSettings((stride, stride), (padding, padding))
    return empty(shape, dtype), weight, vector, vector, residual, settings, True
