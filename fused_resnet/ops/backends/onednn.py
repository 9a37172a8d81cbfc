"""Inference convolutions on the CPU with the add and the ReLU as oneDNN post-ops and the weights in its own layout.

PyTorch reorders a convolution's weights at every call; packing them once and finishing the result in registers is
worth about a third of the time of a ResNet-50 here. The ops are those that ``torch.compile`` uses when it freezes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings


def why_not_packed(x: Tensor) -> list[str]:
    """The reasons why ``packed_conv_act`` cannot take x; an empty list means that it can."""
    if x.device.type != "cpu":
        return [f"x is on {x.device}; it takes CPU tensors"]
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return ["this PyTorch has no oneDNN, or it is switched off"]
    if x.dtype == torch.float32:
        return []
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    if x.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return []
    return [f"oneDNN does not compute in {x.dtype} on this processor"]


def pack_conv_weight(weight: Tensor, input_size: list[int], settings: ConvSettings) -> Tensor:
    """The weight of a convolution in the layout that oneDNN likes best for inputs of this size; opaque.

    Args:
        weight: (K, C / groups, kernel height, kernel width).
        input_size: [N, C, H, W]; inputs of other sizes work too, but may have it packed again at every call.
    """
    stride, padding, dilation, groups = settings
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, input_size)


def packed_conv_act(
    x: Tensor,
    packed_weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    settings: ConvSettings,
    relu: bool,
    overwrite: bool = False,
) -> Tensor:
    """``act(F.conv2d(x, weight, bias, *settings) + residual)`` as one oneDNN call
    (and an add where there are groups).

    Args:
        x: (N, C, H, W), for which ``why_not_packed`` is empty.
        packed_weight: from ``pack_conv_weight``.
        bias: (K,), x's dtype.
        residual: the result's shape and dtype; or None.
        overwrite: the result may take the residual's memory, which saves touching new pages.
    """
    stride, padding, dilation, groups = settings
    act = "relu" if relu else "none"
    if residual is None:
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed_weight, bias, padding, stride, dilation, groups, act, [], ""
        )
    if groups > 1:  # which PyTorch adds in a pass of its own, for float32 only
        out = packed_conv_act(x, packed_weight, bias, None, settings, False).add_(residual)
        return out.relu_() if relu else out
    finish: tuple[Any, ...] = ("add", 1.0, act if relu else None, [], None)
    arguments = (packed_weight, bias, padding, stride, dilation, groups, *finish)
    if overwrite:
        return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, *arguments)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, *arguments)
