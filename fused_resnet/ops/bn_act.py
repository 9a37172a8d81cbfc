"""BatchNorm + residual add + ReLU as two passes over memory forward and two backward, with gradients.

Forward, training: ``bn_stats`` reads x; ``bn_apply`` reads x (and the residual) and writes the output. Eager's
``batch_norm``, ``add_`` and ``relu_`` read or write 6T with a residual where this moves 4T, 5T against 3T without.

Backward: ``bn_grad_stats`` and ``bn_grad_apply``. Without a residual, the ReLU's mask is recomputed from x, which they
read anyway: 5T. With one, it is the sign of the output, which the next layer has saved anyway, and the masked gradient,
which is the residual's, is written on the way: 7T. Eager spends 8T on either. Nothing but x, the output and vectors of
C is kept for backward. Where the CUDA C++ kernels run, forward keeps a bit of each element instead of the output, and
both passes read that: 6T and an eighth.

Where they run and x fits in the shared memory of the whole device, the two passes forward are one: it reads x once.

The statistics are computed outside the ``autograd.Function``: that leaves the one op that changes a buffer with no
gradient to define. Between the two passes, either way, several processes make their statistics one
(``ops/synchronize.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.arguments import NO_RUNNING_STATISTICS, Norm
from fused_resnet.ops import checks
from fused_resnet.ops.batch_norm import BatchNorm, batch_norm
from fused_resnet.ops.bn_act_autograd import BNAct, BNActDual
from fused_resnet.ops.layout import resolved, resolved_or_none
from fused_resnet.ops.reference import statistics_dtype
from fused_resnet.ops.route.routes import DISPATCHED, PassRoute, pass_route
from fused_resnet.ops.synchronize import group_to_share, statistics_over_ranks


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
            bias are those of this rank's x. What does not run fused then runs as ``ops/reference/``.

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
    x, residual = resolved(x), resolved_or_none(residual)
    if residual is None or residual.dtype == x.dtype:
        return normalize(x, norm, residual, relu)
    z = normalize(x, norm, None, False) + residual
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
            raise checks.WrongType(f"{name} must be a BatchNorm; got {type(value).__name__}")
    norm, norm2 = _checked_batch_norm(x, norm), _checked_batch_norm(x2, norm2, "2")
    return normalize_dual(resolved(x), norm, resolved(x2), norm2, relu)


def normalize_dual(x: Tensor, norm: BatchNorm, x2: Tensor, norm2: BatchNorm, relu: bool) -> Tensor:
    """``bn_act_dual`` of arguments that are known to fit."""
    # Ranks that share both go one way, whatever x is on each: backward, two separate norms come to their collectives in
    # the other order.
    both_shared = norm.process_group is not None and norm2.process_group is not None
    route = pass_route(x, *norm[:4], x2, *norm2[:4])
    if (route is None and not both_shared) or x2.dtype != x.dtype:
        z = normalize(x, norm, None, False) + normalize(x2, norm2, None, False)
        return F.relu(z) if relu else z
    route = route or DISPATCHED
    mean, invstd, share = _statistics(x, norm, route)
    mean2, invstd2, share2 = _statistics(x2, norm2, route)
    if not wants_gradient(x, norm.weight, norm.bias, x2, norm2.weight, norm2.bias):
        vectors, vectors2 = Norm(mean, invstd, *norm[:2]), Norm(mean2, invstd2, *norm2[:2])
        return route.passes.bn_apply_dual(x, vectors, x2, vectors2, relu)
    return BNActDual.apply(
        *(x, norm.weight, norm.bias, mean, invstd, share),
        *(x2, norm2.weight, norm2.bias, mean2, invstd2, share2),
        (not norm.training, norm.eps, norm.process_group),
        (not norm2.training, norm2.eps, norm2.process_group),
        *(relu, route),
    )


def _checked_batch_norm(x: Tensor, norm: BatchNorm, suffix: str = "") -> BatchNorm:
    """``norm`` itself, its ``process_group`` None where there is nothing to share, its parameters as they are."""
    checks.check_batch_norm(x, *norm[:-1], channels=x.shape[1], suffix=suffix)
    norm = norm.resolved()
    checks.check_process_group("process_group" + suffix, norm.process_group)
    if norm.process_group is not None:
        norm = norm._replace(process_group=group_to_share(norm))
    if norm.training and norm.process_group is None:
        checks.check_several_values_per_channel(x)
    return norm


def normalize(x: Tensor, norm: BatchNorm, residual: Tensor | None, relu: bool) -> Tensor:
    """``bn_act`` of arguments that are known to fit, the residual of x's dtype."""
    route = pass_route(x, *norm[:4], residual)
    if route is None and norm.process_group is None:
        z = batch_norm(x, norm)
        z = z if residual is None else z + residual
        return F.relu(z) if relu else z
    route = route or DISPATCHED
    settings = (not norm.training, norm.eps, norm.process_group)
    differentiable = wants_gradient(x, norm.weight, norm.bias, residual)
    if norm.training and norm.process_group is None and route.one_launch is not None:
        with_mask = differentiable and relu and residual is not None
        running = (norm.running_mean, norm.running_var, norm.momentum, norm.eps)
        with torch.no_grad():
            made = route.one_launch.bn_stats_apply(x, running, norm.weight, norm.bias, residual, relu, with_mask)
        out, mask, mean, invstd = made
        if not differentiable:
            return out
        done = (out, mask if with_mask else None)
        return BNAct.apply(x, norm.weight, norm.bias, residual, mean, invstd, None, settings, relu, done, route)
    mean, invstd, share = _statistics(x, norm, route)
    if not differentiable:
        return route.passes.bn_apply(x, Norm(mean, invstd, *norm[:2]), residual, relu)
    return BNAct.apply(x, norm.weight, norm.bias, residual, mean, invstd, share, settings, relu, None, route)


def _statistics(x: Tensor, norm: BatchNorm, route: PassRoute) -> tuple[Tensor, Tensor, Tensor | None]:
    """(mean, 1/sqrt(variance + eps), share) to normalise x with; moves the running statistics when training.

    ``share`` is this rank's part of the values behind them; None if they are not shared.
    """
    x = x.detach()
    if norm.process_group is not None:
        if x.numel() > 0:
            mean, invstd = route.passes.bn_stats(x, NO_RUNNING_STATISTICS)
        else:
            mean = invstd = x.new_zeros(x.shape[1], dtype=statistics_dtype(x))
        return statistics_over_ranks(mean, invstd, x.numel() // x.shape[1], norm)
    if norm.training:
        return (*route.passes.bn_stats(x, (norm.running_mean, norm.running_var, norm.momentum, norm.eps)), None)
    assert norm.running_mean is not None and norm.running_var is not None
    dtype = statistics_dtype(x)
    mean = norm.running_mean.detach().to(dtype, copy=torch.is_grad_enabled())  # backward needs it as it is now
    return mean, (norm.running_var.detach().to(dtype) + norm.eps).rsqrt_(), None


def wants_gradient(*tensors: Tensor | None) -> bool:
    """True if autograd is to record what is done with these."""
    return torch.is_grad_enabled() and any([tensor is not None and tensor.requires_grad for tensor in tensors])
