"""The convolutions of a training step, compiled for GPUs that are not here (tests/kernels/compiled.py)."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from fused_resnet import kernels
from fused_resnet.arguments import ConvSettings, Norm, PoolSettings
from tests.kernels.compiled import CHIPS, WITH_LITTLE_SHARED_MEMORY, Compiled, check_resources, empty

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1: there is no compiler in this process")

# Of ResNet-50 at batch 256: (image), filters, kernel, stride, padding.
CONVOLUTIONS = {
    "1x1 narrowing": ((256, 256, 56, 56), 64, 1, 1, 0),
    "1x1 widening": ((256, 64, 56, 56), 256, 1, 1, 0),
    "1x1 deep": ((256, 2048, 7, 7), 512, 1, 1, 0),
    "3x3": ((256, 128, 28, 28), 128, 3, 1, 1),
    "3x3 narrow": ((256, 64, 56, 56), 64, 3, 1, 1),
    "3x3 strided": ((256, 256, 28, 28), 256, 3, 2, 1),
    "projection": ((256, 512, 28, 28), 1024, 1, 2, 0),
    "one image": ((1, 512, 7, 7), 512, 3, 1, 1),
    "unaligned": ((32, 37, 14, 14), 51, 3, 1, 1),
    "stem": ((256, 3, 224, 224), 64, 7, 2, 3),
}
UNALIGNED = ("unaligned", "stem")
LARGE = ("1x1 narrowing", "1x1 widening", "1x1 deep", "3x3", "3x3 narrow", "3x3 strided", "projection")
"""Where the tile is large enough for the warp-group instructions of sm_90."""


def arguments(convolution: tuple[Any, ...], dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """The launchers and their arguments, with everything there."""
    shape, filters, kernel, stride, padding = convolution
    size = (shape[2] + 2 * padding - kernel) // stride + 1
    x, y = empty(shape, dtype), empty((shape[0], filters, size, size), dtype)
    weight = empty((filters, shape[1], kernel, kernel), dtype)
    norm = Norm(*(torch.empty(shape[1]),) * 4)
    running = (torch.empty(filters), torch.empty(filters), 0.1, 1e-5)
    coefficients = torch.empty(4, filters)
    settings = ConvSettings((stride, stride), (padding, padding))
    return {
        "conv_stats": (x, weight, norm, running, settings, True),
        "conv_grad_input": (y, y, coefficients, weight, x, norm, x, settings),
        "conv_grad_weight": (y, y, coefficients, x, norm, weight, settings),
    }


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("op", ["conv_stats", "conv_grad_input", "conv_grad_weight"])
def test_bfloat16(compile_launches, chip: int, op: str, name: str) -> None:
    """No spills, matrix instructions, asynchronous copies in the main loop, shared memory within the chip's."""
    kernel, *others = compile_launches(getattr(kernels, op), *arguments(CONVOLUTIONS[name], torch.bfloat16)[op])
    check(kernel, chip, "bf16.bf16", copies=name not in UNALIGNED, name=name)
    whole_tiles = chip == 90 and name.startswith("1x1")
    assert (kernel.count(r"cp\.async\.bulk\.tensor") > 0) == whole_tiles, "tensor descriptors"
    for other in others:
        check_resources(other, 128)


# Two pipeline stages instead of four (1x1), another tile (3x3), both (projection).
@WITH_LITTLE_SHARED_MEMORY
@pytest.mark.parametrize("name", ["1x1 widening", "3x3", "projection"])
@pytest.mark.parametrize("op", ["conv_stats", "conv_grad_input", "conv_grad_weight"])
def test_bfloat16_with_little_shared_memory(compile_launches, chip: int, op: str, name: str) -> None:
    test_bfloat16(compile_launches, chip, op, name)


@pytest.mark.parametrize("name", ["1x1 widening", "3x3", "3x3 strided"])
@pytest.mark.parametrize("op", ["conv_stats", "conv_grad_input", "conv_grad_weight"])
def test_tf32(compile_launches, chip: int, op: str, name: str, fp32_precision: str) -> None:
    kernel, *_ = compile_launches(getattr(kernels, op), *arguments(CONVOLUTIONS[name], torch.float32)[op])
    check(kernel, chip, "tf32.tf32", copies=True, name=name)


@pytest.mark.parametrize("name", ["1x1 widening", "3x3"])
@pytest.mark.parametrize("op", ["conv_stats", "conv_grad_input", "conv_grad_weight"])
def test_64_bit_offsets(compile_launches, chip: int, op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensor descriptors too, whose coordinates have 32 bits."""
    monkeypatch.setattr(sys.modules[f"fused_resnet.kernels.{op}"], "WIDE_ELEMENTS", 1)
    kernel, *_ = compile_launches(getattr(kernels, op), *arguments(CONVOLUTIONS[name], torch.bfloat16)[op])
    check_resources(kernel, 255)


@pytest.mark.parametrize("op", ["conv_stats", "conv_grad_input", "conv_grad_weight"])
def test_sizes_of_one(compile_launches, chip: int, op: str) -> None:
    """Triton makes a constant of an argument that is 1, which has no methods."""
    for kernel, padding in ((1, 0), (3, 1)):
        ones = arguments(((1, 1, 1, 1), 1, kernel, 1, padding), torch.bfloat16)
        for launched in compile_launches(getattr(kernels, op), *ones[op]):
            check_resources(launched, 255)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_passes_beside_them(compile_launches, chip: int, dtype: torch.dtype) -> None:
    """The pooling of ResNet-50's stem at batch 256, and the coefficients of its widest norm."""
    x, pooled = empty((256, 64, 112, 112), dtype), empty((256, 64, 56, 56), dtype)
    place, window = empty((256, 64, 56, 56), torch.uint8), PoolSettings((3, 3), (2, 2), (1, 1))
    norm, wide = Norm(*(torch.empty(64),) * 4), Norm(*(torch.empty(2048),) * 3)
    launches = [
        (kernels.bn_apply_pool, x, norm, window),
        (kernels.bn_pool_grad_stats, pooled, place, x, norm, window),
        (kernels.bn_pool_grad_apply, pooled, place, x, norm, norm[:2], window),
        (kernels.bn_grad_coefficients, wide[:2], wide, 256 * 49),
    ]
    for launcher, *args in launches:
        for kernel in compile_launches(launcher, *args):
            check_resources(kernel, 128)


def check(kernel: Compiled, chip: int, kind: str, copies: bool, name: str) -> None:
    check_resources(kernel, 255)
    assert kernel.shared <= CHIPS[chip][1]
    wgmma = kernel.count(rf"wgmma\.mma_async[.\w]*\.{re.escape(kind)}")
    mma = kernel.count(rf"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.f32\.{re.escape(kind)}")
    assert wgmma + mma > 0
    if chip == 90 and name in LARGE:
        assert wgmma > 0 and mma == 0
    if copies:
        loops = re.findall(r"^(\$L__BB0_\d+):((?:(?!^\$L__BB0_\d+:)[\s\S])*?)bra(?:\.uni)?\s+\1;", kernel.ptx, re.M)
        assert any("cp.async" in body and "mma" in body for _, body in loops)
