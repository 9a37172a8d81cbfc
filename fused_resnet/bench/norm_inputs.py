"""Random inputs of the passes over one activation, all that they take, made when first asked for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_resnet.ops import reference
from fused_resnet.ops.reference.mask import pack_mask
from fused_resnet.ops.reference.norm import normalize

EPS = 1e-5
NEAR_ZERO = 0.05
"""No gradient comes where the ReLU's input is nearer to 0: rounding alone decides there which way it goes."""


class Norm:
    """An activation of some shape, channels_last, all that the passes over it take, and random values in all of it.

    Tensors are made when they are first asked for. ``mean`` and ``invstd`` are those of x.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.x = self._activation() * 2 + 0.5
        self.weight, self.bias, self.weight2, self.bias2 = (self._vector() for _ in range(4))

    @property
    def values(self) -> int:
        """Of each channel."""
        return self.shape[0] * self.shape[2] * self.shape[3]

    @functools.cached_property
    def residual(self) -> Tensor:
        return self._activation()

    @functools.cached_property
    def x2(self) -> Tensor:
        return self._activation() + 1

    @functools.cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        return exact_statistics(self.x)

    @functools.cached_property
    def statistics2(self) -> tuple[Tensor, Tensor]:
        return exact_statistics(self.x2)

    @property
    def norm(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mean, invstd, weight, bias."""
        return (*self.statistics, self.weight, self.bias)

    @property
    def norm2(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*self.statistics2, self.weight2, self.bias2)

    @functools.cached_property
    def out(self) -> Tensor:
        """Behind norm, residual and ReLU."""
        return reference.bn_apply(self.x, *self.norm, self.residual, True)

    @functools.cached_property
    def mask(self) -> Tensor:
        return pack_mask(normalize(self.x, *self.norm) + self.residual)

    @functools.cached_property
    def grad_out(self) -> Tensor:
        z = normalize(self.x, *self.norm)
        near = (z.abs() < NEAR_ZERO) | ((z + self.residual).abs() < NEAR_ZERO)
        return self._activation().masked_fill_(near, 0)

    @functools.cached_property
    def activation_alone(self) -> Tensor:
        """Behind norm and ReLU, with no residual."""
        return reference.bn_apply(self.x, *self.norm, None, True)

    @functools.cached_property
    def dz(self) -> Tensor:
        """``grad_out`` where the ReLU behind norm and residual let it pass."""
        return torch.where(self.out > 0, self.grad_out, 0)

    @functools.cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Of ``grad_out``."""
        return self._sums(self.grad_out, False)

    @functools.cached_property
    def sums_recomputed(self) -> tuple[Tensor, Tensor]:
        """Of ``grad_out`` behind a ReLU with no residual in front of it."""
        return self._sums(self.grad_out, True)

    @functools.cached_property
    def sums_of_bits(self) -> tuple[Tensor, Tensor]:
        """Of ``dz``."""
        return self._sums(self.dz, False)

    @functools.cached_property
    def sums_for_eager(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Those above as ``torch.batch_norm_backward_elemt`` takes them: of dz and dz * (x - mean), and the count."""
        count = torch.full((1,), self.values, dtype=torch.int32, device=self.device)
        sums = {"sums": self.sums, "sums_recomputed": self.sums_recomputed, "sums_of_bits": self.sums_of_bits}
        return {name: (first, second / self.statistics[1], count) for name, (first, second) in sums.items()}

    @functools.cached_property
    def running(self) -> tuple[Tensor, Tensor]:
        """Mean and variance such that eager's eval mode normalises as ``norm``."""
        return _running(self.statistics)

    @functools.cached_property
    def running2(self) -> tuple[Tensor, Tensor]:
        return _running(self.statistics2)

    def _sums(self, grad: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
        mean, invstd, weight, bias = (vector.double() for vector in self.norm)
        exact = (grad.double(), self.x.double())
        first, second, _ = reference.bn_grad_stats(*exact, None, mean, invstd, weight, bias, relu)
        return first.float(), second.float()

    def _activation(self) -> Tensor:
        empty = torch.empty(self.shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        return empty.normal_()

    def _vector(self) -> Tensor:
        return torch.rand(self.shape[1], device=self.device) + 0.5


def exact_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, invstd = reference.bn_stats(x.double(), None, None, 0.0, EPS)
    return mean.float(), invstd.float()


def _running(statistics: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return statistics[0], (statistics[1].double() ** -2 - EPS).float()
