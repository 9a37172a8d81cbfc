"""BatchNorm + residual add + ReLU as two passes over memory forward and two backward, with gradients.

Forward, training: ``bn_stats`` reads x; ``bn_apply`` reads x (and the residual) and writes the output. Eager's
``batch_norm``, ``add_`` and ``relu_`` read or write 6T with a residual where this moves 4T, 5T against 3T without.

Backward: ``bn_grad_stats`` and ``bn_grad_apply``. Without a residual, the ReLU's mask is recomputed from x, which they
read anyway: 5T. With one, it is the sign of the output, which the next layer has saved anyway, and the masked gradient,
which is the residual's, is written on the way: 7T. Eager spends 8T on either. Nothing but x, the output and vectors of
C is kept for backward.

The statistics are computed outside the ``autograd.Function``: that leaves the one op that changes a buffer with no
gradient to define. Between the two passes, either way, several processes make their statistics one
(``ops/synchronize.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops import checks
from fused_resnet.ops.backend import has_fused_backend
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.synchronize import group_to_share, statistics_over_ranks, sums_over_ranks

_ops = torch.ops.fused_resnet


class BatchNorm(NamedTuple):
    """What ``F.batch_norm`` takes beside x: vectors of C (or None), and how to use them."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    process_group: Any = None
    """The ranks, a ``torch.distributed.ProcessGroup``, that share their statistics when training, as in
    ``nn.SyncBatchNorm``; None for this process alone."""


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    process_group: Any = None,
) -> Tensor:
    """``act(F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps) + residual)``.

    Gradients and the updated running statistics are those of that expression too.

    Args:
        x: (N, C, H, W), floating point. float32, float16 and bfloat16 run fused: on the CPU in any memory format, on
            CUDA in channels_last. Everything else runs as the expression above.
        weight, bias: (C,), or None for 1 and 0.
        running_mean, running_var: (C,); moved in place by ``momentum`` when training. None only when training.
        residual: x's shape, any memory format; or None.
        training: normalise with x's own statistics (else with the running ones).
        activation: "relu" or None.
        process_group: a ``torch.distributed.ProcessGroup`` whose ranks normalise with the statistics of all their x,
            as ``nn.SyncBatchNorm``, when training; None for this process alone. Every rank has to call, with any N, 0
            too. One all_gather forward and, for the gradient of x, one all_reduce backward; the gradients of weight and
            bias are those of this rank's x. What does not run fused then runs as ``ops/reference.py``.

    Returns:
        A tensor of x's shape, dtype and (if dense) strides. A residual of a wider dtype promotes it, as ``+`` does.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong rank, shape, device or value; one value per channel when training, as ``nn.BatchNorm2d``.
        BackendError: the backend asked for by ``use_backend`` cannot run this.
        NotImplementedError: statistics are shared with other ranks inside ``torch.func`` or forward-mode
            differentiation, or a backward pass through them is run with ``create_graph=True``.
    """
    relu = checks.check_activation(activation)
    checks.check_image("x", x)
    norm = BatchNorm(weight, bias, running_mean, running_var, training, momentum, eps, process_group)
    norm = _checked_batch_norm(x, norm)
    checks.check_residual("residual", residual, x, x.shape)
    if residual is None or residual.dtype == x.dtype:
        return _bn_act(x, norm, residual, relu)
    z = _bn_act(x, norm, None, False) + residual
    return F.relu(z) if relu else z


def bn_act_dual(x: Tensor, norm: BatchNorm, x2: Tensor, norm2: BatchNorm, *, activation: str | None = "relu") -> Tensor:
    """``act(batch_norm(x) + batch_norm(x2))``: the end of a block whose shortcut is a projection, in one pass.

    Args:
        x, x2: (N, C, H, W), the same shape; as in ``bn_act``.
        norm, norm2: how each is normalised.
        activation: "relu" or None.

    Returns:
        A tensor of x's shape, dtype and (if dense) strides.

    Raises:
        TypeError, ValueError, BackendError, NotImplementedError: as ``bn_act``.
    """
    relu = checks.check_activation(activation)
    checks.check_image("x", x)
    checks.check_residual("x2", x2, x, x.shape)
    checks.check_image("x2", x2)
    for name, value in (("norm", norm), ("norm2", norm2)):
        if not isinstance(value, BatchNorm):
            raise TypeError(f"{name} must be a BatchNorm; got {type(value).__name__}")
    norm, norm2 = _checked_batch_norm(x, norm), _checked_batch_norm(x2, norm2, "2")
    # Ranks that share both go one way, whatever x is on each: backward, two separate norms come to their collectives in
    # the other order.
    both_shared = norm.process_group is not None and norm2.process_group is not None
    if not (both_shared or has_fused_backend(x)) or x2.dtype != x.dtype:
        z = _bn_act(x, norm, None, False) + _bn_act(x2, norm2, None, False)
        return F.relu(z) if relu else z
    mean, invstd, share = _statistics(x, norm)
    mean2, invstd2, share2 = _statistics(x2, norm2)
    if not wants_gradient(x, norm.weight, norm.bias, x2, norm2.weight, norm2.bias):
        first, second = (x, mean, invstd, norm.weight, norm.bias), (x2, mean2, invstd2, norm2.weight, norm2.bias)
        return _ops.bn_apply_dual(*first, *second, relu)
    return _BNActDual.apply(
        *(x, norm.weight, norm.bias, mean, invstd, share),
        *(x2, norm2.weight, norm2.bias, mean2, invstd2, share2),
        (not norm.training, norm.eps, norm.process_group),
        (not norm2.training, norm2.eps, norm2.process_group),
        relu,
    )


def _checked_batch_norm(x: Tensor, norm: BatchNorm, suffix: str = "") -> BatchNorm:
    """``norm`` itself, its ``process_group`` None where there is nothing to share."""
    checks.check_batch_norm(x, *norm[:-1], channels=x.shape[1], suffix=suffix)
    checks.check_process_group("process_group" + suffix, norm.process_group)
    if norm.process_group is not None:
        norm = norm._replace(process_group=group_to_share(norm))
    if norm.training and norm.process_group is None:
        checks.check_several_values_per_channel(x)
    return norm


def _bn_act(x: Tensor, norm: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """``bn_act`` of checked arguments, the residual of x's dtype."""
    if norm.process_group is None and not has_fused_backend(x):
        z = _batch_norm(x, norm)
        z = z if residual is None else z + residual
        return F.relu(z) if relu else z
    mean, invstd, share = _statistics(x, norm)
    if not wants_gradient(x, norm.weight, norm.bias, residual):
        return _ops.bn_apply(x, mean, invstd, norm.weight, norm.bias, residual, relu)
    settings = (not norm.training, norm.eps, norm.process_group)
    return _BNAct.apply(x, norm.weight, norm.bias, residual, mean, invstd, share, settings, relu)


def _batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """``F.batch_norm``, also of vectors whose dtypes it does not take together with x's."""
    *vectors, training, momentum, eps, _ = norm
    dtypes = {vector.dtype for vector in vectors if vector is not None}
    wide = statistics_dtype(x)
    if not (dtypes <= {x.dtype} or dtypes == {wide}):
        vectors = [None if vector is None else vector.to(wide) for vector in vectors]
    weight, bias, running_mean, running_var = vectors
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if training:
        for running, moved in ((norm.running_mean, running_mean), (norm.running_var, running_var)):
            if running is not None and moved is not None and moved is not running:
                running.copy_(moved)
    return out


def _statistics(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor | None]:
    """(mean, 1/sqrt(variance + eps), share) to normalise x with; moves the running statistics when training.

    ``share`` is this rank's part of the values behind them; None if they are not shared.
    """
    grad_mode = torch.is_grad_enabled()
    with torch.no_grad():
        if norm.process_group is not None:
            if x.numel() > 0:
                mean, invstd = _ops.bn_stats(x, None, None, 0.0, 0.0)
            else:
                mean = invstd = x.new_zeros(x.shape[1], dtype=statistics_dtype(x))
            return statistics_over_ranks(mean, invstd, x.numel() // x.shape[1], norm)
        if norm.training:
            return (*_ops.bn_stats(x, norm.running_mean, norm.running_var, norm.momentum, norm.eps), None)
        assert norm.running_mean is not None and norm.running_var is not None
        dtype = statistics_dtype(x)
        mean = norm.running_mean.to(dtype, copy=grad_mode)  # a copy: backward needs it as it is now
        return mean, torch.rsqrt(norm.running_var.to(dtype) + norm.eps), None


def wants_gradient(*tensors: Tensor | None) -> bool:
    """True if autograd is to record what is done with these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Normalization(NamedTuple):
    """A batch norm whose statistics are known: ``constant`` when they do not depend on x (eval mode), and with a
    ``share`` when they depend on what other ranks have too."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    share: Tensor | None
    constant: bool
    eps: float
    process_group: Any


class _BNAct(torch.autograd.Function):
    """``bn_act`` and its gradients, the statistics given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        share: Tensor | None,
        settings: tuple[bool, float, Any],
        relu: bool,
    ) -> Tensor:
        out = _ops.bn_apply(x, mean, invstd, weight, bias, residual, relu)
        ctx.save_for_backward(x, weight, bias, mean, invstd, share, out if relu and residual is not None else None)
        ctx.settings, ctx.relu = settings, relu
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, share, out = ctx.saved_tensors
        norm = _Normalization(weight, bias, mean, invstd, share, *ctx.settings)
        grads = _backward(grad_out, x, out, norm, ctx.relu, ctx.needs_input_grad[:4])
        return (*grads, None, None, None, None, None)


class _BNActDual(torch.autograd.Function):
    """``bn_act_dual`` and its gradients, the statistics given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        share: Tensor | None,
        x2: Tensor,
        weight2: Tensor | None,
        bias2: Tensor | None,
        mean2: Tensor,
        invstd2: Tensor,
        share2: Tensor | None,
        settings: tuple[bool, float, Any],
        settings2: tuple[bool, float, Any],
        relu: bool,
    ) -> Tensor:
        out = _ops.bn_apply_dual(x, mean, invstd, weight, bias, x2, mean2, invstd2, weight2, bias2, relu)
        saved = (x, weight, bias, mean, invstd, share, x2, weight2, bias2, mean2, invstd2, share2)
        ctx.save_for_backward(*saved, out if relu else None)
        ctx.settings, ctx.settings2, ctx.relu = settings, settings2, relu
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, invstd, share, x2, weight2, bias2, mean2, invstd2, share2, out = ctx.saved_tensors
        norm = _Normalization(weight, bias, mean, invstd, share, *ctx.settings)
        norm2 = _Normalization(weight2, bias2, mean2, invstd2, share2, *ctx.settings2)
        need, need2 = ctx.needs_input_grad[:3], ctx.needs_input_grad[6:9]
        # To the first normalisation the second is a residual: its gradient is dz, the mask already applied.
        *grads, dz = _backward(grad_out, x, out, norm, ctx.relu, (*need, any(need2)))
        grads2: list[Tensor | None] = [None, None, None]
        if dz is not None:
            *grads2, _ = _backward(dz, x2, None, norm2, False, (*need2, False))
        return (*grads, None, None, None, *grads2, None, None, None, None, None, None)


def _backward(
    grad_out: Tensor, x: Tensor, out: Tensor | None, norm: _Normalization, relu: bool, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, weight, bias, residual), None for those not in ``need``; no pass for what nobody asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        return _differentiable_backward(grad_out, x, out, norm, relu, need)
    need_x, need_weight, need_bias, need_residual = need
    weight, bias, mean, invstd, share, constant, _, process_group = norm
    dz, sum_dz, sum_dz_xhat = grad_out, None, None
    if need_weight or need_bias or (need_x and not constant) or out is not None:
        sum_dz, sum_dz_xhat, written = _ops.bn_grad_stats(grad_out, x, out, mean, invstd, weight, bias, relu)
        if out is not None:
            dz, relu = written, False
    grad_x = None
    if need_x:
        sums = (None, None) if constant else (sum_dz, sum_dz_xhat)
        if share is not None:
            assert sum_dz is not None and sum_dz_xhat is not None
            sums = sums_over_ranks(sum_dz, sum_dz_xhat, share, process_group)
        grad_x = _ops.bn_grad_apply(dz, x, mean, invstd, weight, bias, *sums, relu)
    return (
        grad_x,
        _cast_like(sum_dz_xhat, weight) if need_weight else None,
        _cast_like(sum_dz, bias) if need_bias else None,
        dz if need_residual else None,
    )


def _cast_like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)


def _differentiable_backward(
    grad_out: Tensor, x: Tensor, out: Tensor | None, norm: _Normalization, relu: bool, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``_backward`` for a second derivative: the same gradients, built of operations that autograd knows."""
    weight, bias, mean, invstd, share, constant, eps, _ = norm
    if share is not None:
        raise NotImplementedError(
            "create_graph must be False in a backward pass through a norm that shares its statistics with other ranks; "
            "as of torch.nn.SyncBatchNorm, there is no second derivative"
        )
    # Views: x may be made of the same weight, and what weight does there is no part of this norm.
    x = x.view_as(x)
    weight, bias = (None if vector is None else vector.view_as(vector) for vector in (weight, bias))
    if constant:
        variance = invstd.double().pow(-2).to(invstd.dtype) - eps
        z = _batch_norm(x, BatchNorm(weight, bias, mean, variance, False, 0.0, eps))
    else:
        z = _batch_norm(x, BatchNorm(weight, bias, None, None, True, 0.0, eps))
    dz = torch.where((z if out is None else out).detach() <= 0, 0, grad_out) if relu else grad_out
    wanted = [t for t, needed in zip((x, weight, bias), need[:3], strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(z, wanted, dz, create_graph=True) if wanted else ())
    grad_x, grad_weight, grad_bias = (next(found) if needed else None for needed in need[:3])
    return grad_x, grad_weight, grad_bias, dz if need[3] else None
