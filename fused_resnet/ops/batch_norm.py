"""What ``F.batch_norm`` takes, in one value, and ``F.batch_norm`` itself for every mix of dtypes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops.layout import is_negated, resolved_or_none
from fused_resnet.ops.reference import statistics_dtype


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

    def resolved(self) -> BatchNorm:
        """The same; no lazily negated view among what is only read."""
        if not any(vector is not None and is_negated(vector) for vector in self[:4]):
            return self
        weight, bias = resolved_or_none(self.weight), resolved_or_none(self.bias)
        if self.training:  # in which the running statistics are written to
            return self._replace(weight=weight, bias=bias)
        running_mean, running_var = resolved_or_none(self.running_mean), resolved_or_none(self.running_var)
        return self._replace(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)


def batch_norm(x: Tensor, norm: BatchNorm) -> Tensor:
    """``F.batch_norm``, also of vectors whose dtypes it does not take together with x's."""
    *vectors, training, momentum, eps, _ = norm
    dtypes = {vector.dtype for vector in vectors if vector is not None}
    wide = statistics_dtype(x)
    if not (dtypes <= {x.dtype} or dtypes == {wide}):
        vectors = [None if vector is None else vector.to(wide) for vector in vectors]
    weight, bias, running_mean, running_var = vectors
    if weight is not None:  # for a channels_last x, backward of torch 2.13 reads it as if it lay contiguously
        weight = weight.contiguous()
    out = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if training:
        for running, moved in ((norm.running_mean, running_mean), (norm.running_var, running_var)):
            if running is not None and moved is not None and moved is not running:
                running.copy_(moved)
    return out
