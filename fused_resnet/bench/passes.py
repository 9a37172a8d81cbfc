"""The passes of a norm one by one, as tasks: what each is given, and what eager runs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.accuracy import Results, listed
from fused_resnet.bench.norm_inputs import EPS, Norm
from fused_resnet.bench.result import TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.sites import ENDINGS, PROJECTION, RELU, RESIDUAL, NormSite
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.ops import reference

WRONG_BITS = 1e-5
"""The part of a mask's bits that rounding may turn over."""
Eager = Callable[[Norm], Results]


@dataclass(frozen=True)
class NormPass:
    """One op in one of its forms.

    Attributes:
        name: the op as in ``ops/schemas.py``, and its form.
        endings: of `bench.sites.NormSite`, where a network that keeps bits or one that keeps outputs runs it.
        arguments: of the op.
        eager: what PyTorch runs for it, giving what the op gives, None in the place of a result that eager has not.
        sums: the results that are sums over all values of a channel.
        mean: the result that is the mean of each channel: x is what is rounded in it.
    """

    name: str
    endings: tuple[str, ...]
    arguments: Callable[[Norm], tuple[Any, ...]]
    eager: Eager
    sums: tuple[int, ...] = ()
    mean: int | None = None

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def op(self) -> str:
        return self.name.split()[0]

    def call(self, norm: Norm) -> Callable[[], Results]:
        """The op on these tensors, on the backend that is asked for when it is called."""
        function, arguments = getattr(torch.ops.fused_resnet, self.op), self.arguments(norm)
        return lambda: listed(function(*arguments))


class PassTask(OpTask):
    """One op of `passes.PASSES`, or ``STATS_APPLY``, on the activation of a site."""

    def __init__(
        self, norm_pass: NormPass, site: NormSite, batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        mode = TRAINING_STEP if norm_pass.op.startswith("bn_grad") else TRAINING_FORWARD
        super().__init__(f"{norm_pass.name} {site}", mode, batch_size, dtype, device)
        self.norm_pass, self.site = norm_pass, site

    def make_inputs(self) -> Norm:
        return Norm(self.site.shape(self.batch_size), self.dtype, self.device)

    def ops(self, inputs: Norm) -> list[tuple[str, tuple[Any, ...]]]:
        return [(self.norm_pass.op, self.norm_pass.arguments(inputs))]

    def eager(self, inputs: Norm) -> Results:
        return self.norm_pass.eager(inputs)

    def judge(self, index: int, ours: Tensor, theirs: Tensor | None, right: Tensor) -> str | None:
        if right.dtype != torch.uint8:
            return super().judge(index, ours, theirs, right)
        turned = reference.unpack_mask(ours, self.first.x) != reference.unpack_mask(right, self.first.x)
        part = turned.double().mean().item()
        return None if part <= WRONG_BITS else f"{part:.3g} of the bits differ"

    def terms(self, index: int, exact: Tensor) -> int:
        return self.first.values if index in self.norm_pass.sums else 1

    def magnitude(self, index: int) -> float | None:
        return self.first.x.abs().max().item() if index == self.norm_pass.mean else None


def eager_norm(n: Norm) -> Tensor:
    """As eager's eval mode normalises."""
    return F.batch_norm(n.x, *n.running, n.weight, n.bias, False, 0.0, EPS)


def eager_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and invstd; on the CPU, where PyTorch has no op for them, by var_mean."""
    if x.is_cuda:
        return torch.batch_norm_stats(x, EPS)
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return mean, torch.rsqrt(variance + EPS)


def eager_sums(n: Norm, dz: Tensor) -> Results:
    """Of the backward of batch_norm the part that adds up."""
    settings = (n.weight, *n.running, *n.statistics, True, EPS, [False, True, True])
    _, sum_dz_xhat, sum_dz = torch.ops.aten.native_batch_norm_backward(dz, n.x, *settings)
    return [sum_dz, sum_dz_xhat]


def eager_through_norm(n: Norm, dz: Tensor, sums: str | None) -> Tensor:
    """Of the backward of batch_norm the other part; on the CPU, which has it not by itself, all of it. Without ``sums``
    (a name of `Norm.sums_for_eager`) statistics are constants."""
    if sums is not None and n.x.is_cuda:
        return torch.batch_norm_backward_elemt(dz, n.x, *n.statistics, n.weight, *n.sums_for_eager[sums])
    settings = (n.weight, *n.running, *n.statistics, sums is not None, EPS, [True, False, False])
    return torch.ops.aten.native_batch_norm_backward(dz, n.x, *settings)[0]


def _apply(*missing: None, add: Callable[[Norm], Tensor] | None = None, training: bool = False) -> Eager:
    """Norm, add and ReLU, and None for each ``missing`` result."""

    def run(n: Norm) -> Results:
        z = F.batch_norm(n.x, None, None, n.weight, n.bias, True, 0.0, EPS) if training else eager_norm(n)
        return [(z if add is None else z.add_(add(n))).relu_(), *missing]

    return run


def _dz(n: Norm, mask: str) -> Tensor:
    """The gradient before the ReLU, whose output eager has kept: ``threshold_backward``."""
    kept = {"none": None, "recomputed": n.activation_alone, "out": n.out}[mask]
    return n.grad_out if kept is None else torch.ops.aten.threshold_backward(n.grad_out, kept, 0)


def _grad_stats(mask: str, with_dz: bool = False) -> Eager:
    def run(n: Norm) -> Results:
        dz = _dz(n, mask)
        return [*eager_sums(n, dz), dz if with_dz else None]

    return run


def _grad_apply(mask: str, sums: str | None, *more: bool) -> Eager:
    """``more``: of a form with a second result, whether that is dz."""

    def run(n: Norm) -> Results:
        dz = _dz(n, mask)
        return [eager_through_norm(n, dz, sums), *(dz if with_dz else None for with_dz in more)]

    return run


def _residual(n: Norm) -> Tensor:
    return n.residual


def _given(names: str, *more: Any) -> Callable[[Norm], tuple[Any, ...]]:
    """Arguments by their names in `Norm`, "-" for None and "second." for the shortcut's; then ``more``."""

    def value(n: Norm, name: str) -> Any:
        return None if name == "-" else value(n.second, name[7:]) if name[:7] == "second." else getattr(n, name)

    def arguments(n: Norm) -> tuple[Any, ...]:
        values = (value(n, name) for name in names.split())
        return (*(each for v in values for each in (v if isinstance(v, tuple) else (v,))), *more)

    return arguments


def _shortcut(n: Norm) -> Tensor:
    return eager_norm(n.second)


_RELU, _ADD, _DUAL, _ENDS = (RELU,), (RESIDUAL,), (PROJECTION,), (RESIDUAL, PROJECTION)
_SUMS, _TWO, _BITS = (0, 1), "x norm second.x second.norm", "grad_out x mask statistics"
_OF_BITS = f"{_BITS} weight sums_of_bits"
PASSES = [
    NormPass("bn_stats", ENDINGS, _given("x - -", 0.0, EPS), lambda n: eager_statistics(n.x), mean=0),
    NormPass("bn_apply", _RELU, _given("x norm -", True), _apply()),
    NormPass("bn_apply residual", _ADD, _given("x norm residual", True), _apply(add=_residual)),
    NormPass("bn_apply_mask residual", _ADD, _given("x norm residual"), _apply(None, add=_residual)),
    NormPass("bn_apply_dual", _DUAL, _given(_TWO, True), _apply(add=_shortcut)),
    NormPass("bn_apply_dual_mask", _DUAL, _given(_TWO), _apply(None, add=_shortcut)),
    NormPass("bn_grad_stats no mask", _DUAL, _given("grad_out x - norm", False), _grad_stats("none"), _SUMS),
    NormPass("bn_grad_stats recomputed", _RELU, _given("grad_out x - norm", True), _grad_stats("recomputed"), _SUMS),
    NormPass("bn_grad_stats of out", _ENDS, _given("grad_out x out norm", True), _grad_stats("out", True), _SUMS),
    NormPass("bn_grad_stats_mask", _ENDS, _given(_BITS, False), _grad_stats("out"), _SUMS),
    NormPass("bn_grad_stats_mask with dz", _ENDS, _given(_BITS, True), _grad_stats("out", True), _SUMS),
    NormPass("bn_grad_apply no mask", _ENDS, _given("grad_out x norm sums", False), _grad_apply("none", "sums")),
    NormPass(
        *("bn_grad_apply recomputed", _RELU, _given("grad_out x norm sums_recomputed", True)),
        _grad_apply("recomputed", "sums_recomputed"),
    ),
    NormPass(
        *("bn_grad_apply recomputed, constant statistics", _RELU, _given("grad_out x norm - -", True)),
        _grad_apply("recomputed", None),
    ),
    NormPass("bn_grad_apply_mask", _DUAL, _given(_OF_BITS, False), _grad_apply("out", "sums_of_bits", False)),
    NormPass("bn_grad_apply_mask with dz", _ADD, _given(_OF_BITS, True), _grad_apply("out", "sums_of_bits", True)),
]
"""Every pass that the ``cuda`` backend has over one activation (``STATS_APPLY`` apart), in every form."""
STATS_APPLY = NormPass(
    *("bn_stats_apply residual", _ADD),
    lambda n: (n.x, None, None, 0.0, EPS, n.weight, n.bias, n.residual, True, True),
    _apply(None, None, None, add=_residual, training=True),
    mean=2,
)
"""One launch where the activation fits on the chip, which a backend may refuse."""
