"""The meaning of the convolutions fused with what stands in front of them and behind them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm, RunningStatistics
from fused_resnet.ops.layout import conv_memory_format, dense
from fused_resnet.ops.reference.norm import (
    bn_apply,
    bn_grad_stats,
    bn_stats,
    grad_before_relu,
    per_channel,
    statistics_dtype,
)


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    settings: ConvSettings,
    relu: bool,
) -> Tensor:
    """relu(conv2d(x, conv_weight) * scale + shift + residual), the normalisation given as per-channel scale and shift.

    Inference. One kernel would read x, the weight and the residual and write the output once; this way also writes
    and reads the convolution's raw output.
    """
    out = F.conv2d(x, conv_weight, None, *settings)
    z = out.to(statistics_dtype(x))
    if scale is not None:
        z = z * per_channel(scale)
    if shift is not None:
        z = z + per_channel(shift)
    if residual is not None:
        z = z + residual
    z = F.relu(z) if relu else z
    return torch.empty_like(z, dtype=x.dtype, memory_format=conv_memory_format(x, conv_weight)).copy_(z)


def conv_stats(
    x: Tensor,
    conv_weight: Tensor,
    norm: Norm | None,
    running: RunningStatistics,
    settings: ConvSettings,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean of y, invstd of y): a convolution in training, with the norm and ReLU in front of it and the statistics
    of the norm behind it.

    y = conv2d(a, conv_weight), where ``a = relu(xhat * weight + bias)`` if ``norm`` is given (x is then the raw output
    of the convolution before) and x itself if not. The padding is of a: it is 0, whatever norm and ReLU would make of a
    0 in x. The statistics are those of y as it is written, in its own dtype; ``bn_stats`` says what they are and how
    the running ones move. Without ``statistics`` both are empty and nothing moves.

    One kernel reads x and conv_weight and writes y. This way also writes and reads a, and reads y again.
    """
    x = dense(x)
    a = x if norm is None else bn_apply(x, norm, None, True)
    y = F.conv2d(a, conv_weight, None, *settings)
    y = y.contiguous(memory_format=conv_memory_format(x, conv_weight))
    if not statistics:
        return y, _no_vector(x), _no_vector(x)
    return (y, *bn_stats(y, running))


def conv_grad_input(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    conv_weight: Tensor,
    x: Tensor,
    norm: Norm | None,
    residual: Tensor | None,
    settings: ConvSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, sum of it, sum of it * xhat): backward of ``conv_stats`` towards its input, and with it the first half
    of the backward of the norm and ReLU in front.

    ``dy = A * dz + B * (y - mean_y) + C`` with ``bn_grad_coefficients``; without y, ``dy = A * dz``; without
    coefficients, dy = dz. ``da`` is the gradient of conv2d's input for dy, plus ``residual``. If ``norm`` is given, x
    is the raw output of the convolution before: the gradient is then da where ``xhat * weight + bias`` is not <= 0, and
    the sums are of it as written. Else the gradient is da, x says its shape, dtype and strides only, and the sums are
    empty.

    One kernel reads dz, y, conv_weight, [x], [residual] and writes the gradient. This way also writes and reads dy, da.
    """
    dy = _conv_output_grad(dz, y, coefficients)
    da = _conv_backward(dy, x, conv_weight, settings, wanted=0)
    da = da.to(statistics_dtype(x)) if residual is None else da.to(statistics_dtype(x)) + residual
    if norm is None:
        return torch.empty_like(dense(x)).copy_(da), _no_vector(x), _no_vector(x)
    grad = torch.empty_like(dense(x)).copy_(grad_before_relu(da, x, None, norm, True))
    return (grad, *bn_grad_stats(grad, x, None, norm, False)[:2])


def conv_grad_weight(
    dz: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    x: Tensor,
    norm: Norm | None,
    conv_weight: Tensor,
    settings: ConvSettings,
) -> Tensor:
    """The gradient of ``conv_stats``' conv_weight (of which only the shape is read), in float32 (float64 for float64).

    dy as in ``conv_grad_input`` and the activation as in ``conv_stats`` are both made again on the way. One kernel
    reads dz, y and x. This way also writes and reads dy and the activation.
    """
    dy = _conv_output_grad(dz, y, coefficients)
    a = x if norm is None else bn_apply(x, norm, None, True)
    wide = statistics_dtype(x)
    like = torch.empty_like(conv_weight, dtype=wide, memory_format=torch.channels_last)
    return _conv_backward(dy.to(wide), a.to(wide), like, settings, wanted=1)


def _conv_output_grad(dz: Tensor, y: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """dy, in dz's dtype."""
    if coefficients is None:
        return dz
    slope_dz, slope_y, offset, mean = map(per_channel, coefficients)
    dy = dz.to(coefficients.dtype) * slope_dz
    if y is not None:
        dy = dy + (y.to(coefficients.dtype) - mean) * slope_y + offset
    return torch.empty_like(dense(dz)).copy_(dy)


def _conv_backward(dy: Tensor, x: Tensor, conv_weight: Tensor, settings: ConvSettings, wanted: int) -> Tensor:
    """conv2d's gradient of its input (wanted = 0) or of its weight (wanted = 1)."""
    found = convolution_backward(dy, x, conv_weight, settings, wanted == 0, wanted == 1)[wanted]
    assert found is not None
    return found


def convolution_backward(
    dy: Tensor, x: Tensor, conv_weight: Tensor, settings: ConvSettings, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """conv2d's gradients of its input and of its weight, by PyTorch; None for what is not needed.

    For the gradient of a weight of one pixel, stride 2 and fewer than 16 channels, channels_last, the oneDNN of torch
    2.13 writes past the end of its memory. With the pixels in between left out the stride is 1.
    """
    stride, padding, dilation, groups = settings
    narrow = x.is_cpu and conv_weight.shape[2:] == (1, 1) and conv_weight.shape[1] < 16
    if need_weight and narrow and padding == (0, 0) and stride != (1, 1):
        every = x[:, :, :: stride[0], :: stride[1]]
        more = settings._replace(stride=(1, 1))
        grad = convolution_backward(dy, x, conv_weight, settings, True, False)[0] if need_input else None
        return grad, convolution_backward(dy, every, conv_weight, more, False, True)[1]
    arguments = (None, stride, padding, dilation, False, [0, 0], groups, [need_input, need_weight, False])
    grad, grad_weight, _ = torch.ops.aten.convolution_backward(dy, x, conv_weight, *arguments)
    return grad if need_input else None, grad_weight if need_weight else None


def _no_vector(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=statistics_dtype(x))
