"""The ``separate`` backend: PyTorch's own convolution (cuDNN, oneDNN), then scale, shift, add and ReLU in one pass.

For every convolution that no kernel of ours does, or not as fast. Beside the convolution it reads 1T (2T with a
residual) and writes 1T; PyTorch's batch_norm, add and relu move 6T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm
from fused_resnet.ops.layout import conv_memory_format
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.route.choose import choose_automatically
from fused_resnet.ops.route.packing import flat


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    settings: ConvSettings,
    relu: bool,
) -> Tensor:
    out = F.conv2d(x, conv_weight, None, *settings)
    out = out.contiguous(memory_format=conv_memory_format(x, conv_weight))
    dtype, channels = statistics_dtype(x), conv_weight.shape[0]
    zero = torch.zeros(channels, dtype=dtype, device=x.device)
    scale = torch.ones_like(zero) if scale is None else scale.to(dtype)
    arguments = (out, Norm(zero, scale, None, shift), residual, relu)
    return choose_automatically("bn_apply", tuple(flat("bn_apply", arguments))).bn_apply(*arguments)
