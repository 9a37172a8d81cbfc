"""Which backend is asked first where several can run an op.

The one that was fastest here, where ``ops/plan/measured_plan.py`` knows of a measurement; the rest is written, by what
is known and not by measurement: no rule here was timed on a device yet. A pass over memory takes as long in CUDA C++ as
in Triton, but is launched in less time and, with a bit mask, moves less: ``cuda`` first. A convolution that fills a
chip with wgmma runs faster in Triton, whose matrix instructions there take their operands from shared memory; one that
does not fill it gains more from a sum split among idle multiprocessors, and from the cheaper launch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.plan import measured_plan

CUDA_FIRST = ("cuda", "triton", "native", "separate", "reference")
TRITON_FIRST = ("triton", "cuda", "native", "separate", "reference")

WGMMA_CAPABILITY = 9  # Hopper. Later chips have other instructions, which Triton uses too.
TILE = 128 * 128  # output elements of the tiles that wgmma needs to be worth it


def ranking(op: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The backends in the order in which they are asked whether they can run ``op`` on these arguments."""
    usual = written_ranking(op, args)
    if not measured_plan.speaks:
        return usual
    fastest = measured_plan.backend_for(op, args)
    if fastest not in usual:
        return usual
    return (fastest, *(name for name in usual if name != fastest))


def written_ranking(op: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The order where nothing was measured."""
    if op != "conv_bn_act" or not args[0].is_cuda:
        return CUDA_FIRST
    return TRITON_FIRST if _fills_with_wgmma(args[0], args[1], ConvSettings.of(*args[5:9])) else CUDA_FIRST


def _fills_with_wgmma(x: Tensor, conv_weight: Tensor, settings: ConvSettings) -> bool:
    capability, multiprocessors = _chip(x.device)
    if capability < WGMMA_CAPABILITY:
        return False
    height, width = settings.output_size(x.shape, conv_weight.shape)
    return x.shape[0] * height * width * conv_weight.shape[0] >= TILE * multiprocessors


@functools.cache
def _chip(device: torch.device) -> tuple[int, int]:
    """(major compute capability, multiprocessors)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count
