"""Random inputs of the passes over one activation, all that they take, made when first asked for."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fused_resnet import arguments
from fused_resnet.ops import reference
from fused_resnet.ops.reference.mask import pack_mask
from fused_resnet.ops.reference.norm import normalize

EPS = 1e-5
NEAR_ZERO = 0.05
"""No gradient comes where the ReLU's input is nearer to 0: rounding alone decides there which way it goes."""


class Norm:
    """An activation of some shape, channels_last, all that the passes over it take, and random values in all of it.
    ``mean`` and ``invstd`` are those of x."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.values = shape[0] * shape[2] * shape[3]  # of each channel
        self.x = self._activation() * 2 + 0.5
        self.weight, self.bias = (torch.rand(shape[1], device=self.device) + 0.5 for _ in range(2))

    @cached_property
    def residual(self) -> Tensor:
        return self._activation()

    @cached_property
    def second(self) -> Norm:
        """The shortcut's, at the end of a block with a projection."""
        return Norm(self.shape, self.dtype, self.device)

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        mean, invstd = reference.bn_stats(self.x.double(), (None, None, 0.0, EPS))
        return mean.float(), invstd.float()

    @property
    def norm(self) -> arguments.Norm:
        return arguments.Norm(*self.statistics, self.weight, self.bias)

    def norm_in(self, dtype: torch.dtype) -> arguments.Norm:
        """The same in another dtype."""
        return arguments.Norm(*(vector.to(dtype) for vector in (*self.statistics, self.weight, self.bias)))

    @cached_property
    def running(self) -> tuple[Tensor, Tensor]:
        """Mean and variance such that eager's eval mode normalises as ``norm``."""
        mean, invstd = self.statistics
        return mean, (invstd.double() ** -2 - EPS).float()

    @cached_property
    def activation_alone(self) -> Tensor:
        """After norm and ReLU, with no residual."""
        return reference.bn_apply(self.x, self.norm, None, True)

    @cached_property
    def out(self) -> Tensor:
        """After norm, residual and ReLU."""
        return reference.bn_apply(self.x, self.norm, self.residual, True)

    @cached_property
    def mask(self) -> Tensor:
        return pack_mask(normalize(self.x, self.norm) + self.residual)

    @cached_property
    def grad_out(self) -> Tensor:
        z = normalize(self.x, self.norm)
        near = (z.abs() < NEAR_ZERO) | ((z + self.residual).abs() < NEAR_ZERO)
        return self._activation().masked_fill_(near, 0)

    @cached_property
    def dz(self) -> Tensor:
        """``grad_out`` where the ReLU after norm and residual let it pass."""
        return torch.where(self.out > 0, self.grad_out, 0)

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Of ``grad_out``."""
        return self._sums(self.grad_out, False)

    @cached_property
    def sums_recomputed(self) -> tuple[Tensor, Tensor]:
        """Of ``grad_out`` after a ReLU with no residual before it."""
        return self._sums(self.grad_out, True)

    @cached_property
    def sums_of_bits(self) -> tuple[Tensor, Tensor]:
        """Of ``dz``."""
        return self._sums(self.dz, False)

    @cached_property
    def sums_for_eager(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Those above as ``torch.batch_norm_backward_elemt`` takes them: of dz and dz * (x - mean), and the count."""
        count = torch.full((1,), self.values, dtype=torch.int32, device=self.device)
        sums = {"sums": self.sums, "sums_recomputed": self.sums_recomputed, "sums_of_bits": self.sums_of_bits}
        return {name: (first, second / self.statistics[1], count) for name, (first, second) in sums.items()}

    def _sums(self, grad: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
        found = reference.bn_grad_stats(grad.double(), self.x.double(), None, self.norm_in(torch.float64), relu)
        return found[0].float(), found[1].float()

    def _activation(self) -> Tensor:
        empty = torch.empty(self.shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        return empty.normal_()
