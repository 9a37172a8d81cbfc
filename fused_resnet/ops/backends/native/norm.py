"""The ``native`` backend's passes over an activation, as it lies in memory: NHWC or NCHW."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.backends.native.address import NormVectors, address, as_vector, dtype_of
from fused_resnet.ops.backends.native.buffers import empty_strided
from fused_resnet.ops.layout import dense, dense_like, is_channels_last

_ELEMENTS_PER_THREAD = 16 * 1024  # with fewer a second thread gains nothing, and on a busy machine it is waited for


def bn_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    mean, invstd = _channel_vector(x), _channel_vector(x)
    moved_mean, moved_var = as_vector(running_mean), as_vector(running_var)
    extension.bn_stats(
        _shape(x),
        address(x),
        address(mean),
        address(invstd),
        address(moved_mean),
        address(moved_var),
        momentum,
        eps,
    )
    for running, moved in ((running_mean, moved_mean), (running_var, moved_var)):
        if running is not None and moved is not None and moved is not running:
            running.copy_(moved)
    return mean, invstd


def bn_apply(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    x = dense(x)
    residual = _like(residual, x)
    out = _empty_like(x)
    with NormVectors(mean, invstd, weight, bias) as norm:
        extension.bn_apply(_shape(x), address(x), norm, address(residual), relu, address(out))
    return out


def bn_apply_dual(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x2: Tensor,
    mean2: Tensor,
    invstd2: Tensor,
    weight2: Tensor | None,
    bias2: Tensor | None,
    relu: bool,
) -> Tensor:
    x = dense(x)
    x2 = dense_like(x2.to(x.dtype), x)
    out = _empty_like(x)
    with NormVectors(mean, invstd, weight, bias) as norm, NormVectors(mean2, invstd2, weight2, bias2) as norm2:
        extension.bn_apply_dual(_shape(x), address(x), norm, address(x2), norm2, relu, address(out))
    return out


def bn_grad_stats(
    grad_out: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    grad_out, out = dense_like(grad_out.to(x.dtype), x), _like(out, x)
    sum_dz, sum_dz_xhat = _channel_vector(x), _channel_vector(x)
    dz = x.new_empty(0) if out is None else _empty_like(x)
    if out is not None and not relu:
        dz.copy_(grad_out)
    tensors = (grad_out, x, out, None if out is None else dz)
    with NormVectors(mean, invstd, weight, bias) as norm:
        extension.bn_grad_stats(_shape(x), *map(address, tensors), norm, relu, address(sum_dz), address(sum_dz_xhat))
    return sum_dz, sum_dz_xhat, dz


def bn_grad_apply(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_dz: Tensor | None,
    sum_dz_xhat: Tensor | None,
    relu: bool,
) -> Tensor:
    x = dense(x)
    grad_out = dense_like(grad_out.to(x.dtype), x)
    sum_dz, sum_dz_xhat = as_vector(sum_dz), as_vector(sum_dz_xhat)
    grad_x = _empty_like(x)
    with NormVectors(mean, invstd, weight, bias) as norm:
        extension.bn_grad_apply(
            _shape(x),
            *map(address, (grad_out, x)),
            norm,
            *map(address, (sum_dz, sum_dz_xhat)),
            relu,
            address(grad_x),
        )
    return grad_x


def _shape(x: Tensor):
    images, channels, height, width = x.shape
    threads = min(torch.get_num_threads(), max(x.numel() // _ELEMENTS_PER_THREAD, 1))
    return extension.Activation(images, channels, height * width, is_channels_last(x), dtype_of(x.dtype), threads)


def _empty_like(x: Tensor) -> Tensor:
    return empty_strided(x.shape, x.stride(), x.dtype)


def _channel_vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device="cpu")


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else dense_like(tensor.to(x.dtype), x)
