"""Batch statistics of several ranks as one: the two collectives of ``nn.SyncBatchNorm``, one forward and one backward.

Both stand between the two passes of their direction. What a pass finds on this rank goes in, what the next one needs
comes out, and neither pass knows. Vectors of C only: no activation is read. Every rank of the group has to call, one
with an empty batch too, all in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fused_resnet.arguments import Sums
from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.route.context import is_transformed


def group_to_share(norm: BatchNorm) -> Any:
    """``norm.process_group`` where there is something to share: in training, among several ranks; else None.

    Raises:
        NotImplementedError: there is, inside ``torch.func`` or forward-mode differentiation.
    """
    group = norm.process_group
    if group is None or not norm.training or dist.get_world_size(group) <= 1:
        return None
    if is_transformed():
        raise NotImplementedError(
            "process_group must be None inside torch.func and forward-mode differentiation: collectives have no rules"
            " there"
        )
    return group


def statistics_over_ranks(mean: Tensor, invstd: Tensor, count: int, norm: BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of the whole group's values, from those of each rank; moves the running statistics.

    One ``all_gather``. The merge is Chan's formula for all ranks at once, in float64 and of the same numbers on every
    rank, so that all of them go on with the same bits. Nothing waits for the device.

    Args:
        mean: (C,), of this rank's values, in ``statistics_dtype``.
        invstd: (C,), 1/sqrt(biased variance) of them, without eps: infinite where the variance is 0.
        count: how many values each channel has here. With 0, ``mean`` and ``invstd`` may hold anything.
        norm: its ``process_group``, not None, says which ranks; its running statistics move by its ``momentum``, the
            variance unbiased over all values (both stay where they are if no rank has any).

    Returns:
        (mean, 1/sqrt(biased variance + norm.eps), share): two vectors of C in the dtype of ``mean``, and count / total
        count, a float64 tensor of no dimensions.
    """
    channels, ranks = mean.shape[0], dist.get_world_size(norm.process_group)
    mine = mean.new_zeros(1 + 2 * channels, dtype=torch.float64)  # exact for counts up to 2^53
    if count > 0:
        mine[0] = count
        mine[1 : 1 + channels] = mean
        mine[1 + channels :] = invstd.double().pow(-2) * count
    gathered = mine.new_empty(ranks * len(mine))  # flat: gloo refuses other shapes
    _all_gather()(gathered, mine, norm.process_group)
    counts, means, m2s = gathered.view(ranks, -1).split([1, channels, channels], dim=1)

    seen = counts.sum()
    total = seen.clamp(min=1)
    shares = counts / total
    global_mean = (shares * means).sum(0)
    variance = (m2s / total + shares * (means - global_mean).square()).sum(0)

    momentum = (seen > 0).double() * norm.momentum
    unbiased = variance * (total / (total - 1).clamp(min=1))
    for running, of_batch in ((norm.running_mean, global_mean), (norm.running_var, unbiased)):
        if running is not None:
            running.copy_(running.double() * (1 - momentum) + of_batch * momentum)
    return global_mean.to(mean.dtype), torch.rsqrt(variance + norm.eps).to(mean.dtype), count / total


def sums_over_ranks(sums: Sums, share: Tensor, process_group: Any) -> Sums:
    """Both sums over the whole group, times ``share``: divided by the *local* count, they are the group's means.

    One ``all_reduce``. The arguments stay as they are: they are this rank's gradients of bias and weight.

    Args:
        sums: (C,) each, this rank's, of one dtype; zeros where its batch is empty.
        share: what ``statistics_over_ranks`` returned.
        process_group: the ranks.

    Returns:
        Two vectors of C in their dtype.
    """
    stacked = torch.stack(sums)
    dist.all_reduce(stacked, group=process_group)
    sum_dz, sum_dz_xhat = stacked.mul_(share).unbind()
    return sum_dz, sum_dz_xhat


def _all_gather() -> Callable[..., Any]:
    """Newer PyTorch calls it ``all_gather_single``, and warns of the older name."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
