"""The ``native`` backend: C++ over every core, for dense float32, float16 and bfloat16 activations on the CPU.

Same names and meaning as ``ops/reference.py``, which says what each reads and writes. Tensors become addresses here,
so what could make C++ read the wrong memory is settled here: layout, dtype, lifetime. Shapes and devices are settled
before: by the public functions, and by ``reasons_against`` for whoever calls an op by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_resnet import _C  # type: ignore[attr-defined]
from fused_resnet.ops.extension import empty_strided
from fused_resnet.ops.layout import dense, dense_like, is_channels_last

_ELEMENTS_PER_THREAD = 16 * 1024  # with fewer a second thread gains nothing, and on a busy machine it is waited for
_DTYPES = {
    torch.float32: _C.DType.float32,
    torch.float16: _C.DType.float16,
    torch.bfloat16: _C.DType.bfloat16,
}


def bn_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    mean, invstd = _channel_vector(x), _channel_vector(x)
    moved_mean, moved_var = _vector(running_mean), _vector(running_var)
    _C.bn_stats(
        _shape(x),
        _address(x),
        _address(mean),
        _address(invstd),
        _address(moved_mean),
        _address(moved_var),
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
    with _Norm(mean, invstd, weight, bias) as norm:
        _C.bn_apply(_shape(x), _address(x), norm, _address(residual), relu, _address(out))
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
    with _Norm(mean, invstd, weight, bias) as norm, _Norm(mean2, invstd2, weight2, bias2) as norm2:
        _C.bn_apply_dual(_shape(x), _address(x), norm, _address(x2), norm2, relu, _address(out))
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
    with _Norm(mean, invstd, weight, bias) as norm:
        _C.bn_grad_stats(_shape(x), *map(_address, tensors), norm, relu, _address(sum_dz), _address(sum_dz_xhat))
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
    sum_dz, sum_dz_xhat = _vector(sum_dz), _vector(sum_dz_xhat)
    grad_x = _empty_like(x)
    with _Norm(mean, invstd, weight, bias) as norm:
        _C.bn_grad_apply(
            _shape(x),
            *map(_address, (grad_out, x)),
            norm,
            *map(_address, (sum_dz, sum_dz_xhat)),
            relu,
            _address(grad_x),
        )
    return grad_x


def empty_cache() -> None:
    """Gives the memory of freed outputs, kept for the next of their sizes, back to the system."""
    _C.release_kept_buffers()


class _Norm:
    """A ``_C.Norm`` of float32 vectors, which it keeps alive for as long as the ``with`` lasts."""

    def __init__(self, *vectors: Tensor | None) -> None:
        self.vectors = [_vector(vector) for vector in vectors]

    def __enter__(self):
        return _C.Norm(*(_address(vector) for vector in self.vectors))

    def __exit__(self, *exception: object) -> None:
        self.vectors.clear()


def _shape(x: Tensor):
    images, channels, height, width = x.shape
    threads = min(torch.get_num_threads(), max(x.numel() // _ELEMENTS_PER_THREAD, 1))
    return _C.Activation(images, channels, height * width, is_channels_last(x), _DTYPES[x.dtype], threads)


def _empty_like(x: Tensor) -> Tensor:
    return empty_strided(x.shape, x.stride(), x.dtype)


def _address(tensor: Tensor | None) -> int:
    """0 for None."""
    if tensor is None:
        return 0
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:  # a subclass that wraps others, which C++ would take for None
        raise TypeError(f"the native backend takes tensors with memory of their own; got {type(tensor).__name__}")
    return address


def _vector(vector: Tensor | None) -> Tensor | None:
    """A per-channel vector as contiguous float32; itself if it is that already."""
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.to(torch.float32).contiguous()


def _channel_vector(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device="cpu")


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else dense_like(tensor.to(x.dtype), x)
