"""The passes of a norm one by one: what each is given and what it moves, what eager runs for it, what is right.

Counted as the docstrings in ``ops/reference/norm.py`` and ``ops/reference/mask.py`` say: T is the bytes of one
activation, and a mask has a bit an element. Vectors of C are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.norm_inputs import EPS, Norm
from fused_resnet.ops import reference

WRONG_BITS = 1e-5
"""The part of a mask's bits that rounding may turn over."""
Results = Sequence[Tensor | None]


@dataclass(frozen=True)
class NormPass:
    """One op in one of its forms.

    Attributes:
        op: its name in ``ops/schemas.py``.
        reads, writes: in T; ``masks``: masks read or written.
        endings: of `bench.suite.op_sites.NormSite`, where a network that keeps bits or one that keeps outputs runs it.
        arguments: of the op.
        eager: what PyTorch runs for it, giving what the op gives, None in the place of a result that eager has not.
        sums: the results that are sums over all values of a channel.
        mean: the result that is the mean of each channel: x is what is rounded in it.
    """

    name: str
    op: str
    reads: int
    writes: int
    masks: int
    endings: tuple[str, ...]
    arguments: Callable[[Norm], tuple[Any, ...]]
    eager: Callable[[Norm], Results]
    sums: tuple[int, ...] = ()
    mean: int | None = None

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def moved(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
        """Bytes read and written."""
        rows, stride = reference.mask_shape(shape)
        return (self.reads + self.writes) * math.prod(shape) * dtype.itemsize + self.masks * rows * stride

    def call(self, norm: Norm) -> Callable[[], Results]:
        """The op on these tensors, on the backend that is asked for when it is called."""
        function, arguments = getattr(torch.ops.fused_resnet, self.op), self.arguments(norm)
        return lambda: _listed(function(*arguments))

    def compiled(self, norm: Norm, backend: str = "inductor") -> Callable[[], Results]:
        """``torch.compile`` of what the op means, but for bits that it writes: nobody would who compiles eager.

        What was compiled before is forgotten: after eight shapes of one function, PyTorch would run it in eager.
        """
        torch.compiler.reset()
        op, arguments = self.op, self.arguments(norm)
        if op in _WITHOUT_MASK:
            op, arguments = _WITHOUT_MASK[op], (*arguments, True)
        if op == "bn_stats_apply":
            arguments = (*arguments[:-1], False)
        function = torch.compile(getattr(reference, op), dynamic=False, backend=backend)

        def run() -> Results:
            results = _listed(function(*arguments))
            if op == "bn_stats_apply":
                return [results[0], None, *results[2:]]
            return results if op == self.op else [*results, None]

        return run

    def why_wrong(self, actual: Results, norm: Norm) -> str | None:
        """None if these results are right, by the project's rule: against float64, at most twice eager's error."""
        exact = _listed(getattr(reference, self.op)(*map(_double, self.arguments(norm))))
        for index, (ours, theirs, right) in enumerate(zip(actual, self.eager(norm), exact, strict=True)):
            if ours is None or right is None or right.numel() == 0:  # a result that this form or contender has not
                continue
            if right.dtype == torch.uint8:
                wrong = _why_wrong_bits(ours, right, norm.x)
            else:
                terms = norm.values if index in self.sums else 1
                magnitude = norm.x.abs().max().item() if index == self.mean else None
                wrong = why_wrong(ours, theirs, right, terms, magnitude)
            if wrong is not None:
                return f"result {index}: {wrong}"
        return None


_WITHOUT_MASK = {"bn_apply_mask": "bn_apply", "bn_apply_dual_mask": "bn_apply_dual"}


def _why_wrong_bits(ours: Tensor, exact: Tensor, x: Tensor) -> str | None:
    turned = (reference.unpack_mask(ours, x) != reference.unpack_mask(exact, x)).double().mean().item()
    return None if turned <= WRONG_BITS else f"{turned:.3g} of the bits differ"


def why_wrong(
    actual: Tensor, baseline: Tensor | None, exact: Tensor, terms: int = 1, magnitude: float | None = None
) -> str | None:
    """What is wrong with a result, None if nothing is: ``tests/accuracy.py``, on the device and for finite numbers.

    Its error against ``exact`` may be twice that of ``baseline``, and a rounding of a sum of ``terms`` numbers of this
    magnitude, which is that of ``exact`` unless given.
    """
    if actual.shape != exact.shape:
        return f"its shape is {tuple(actual.shape)}, not {tuple(exact.shape)}"
    error = (actual.double() - exact).abs().max().item()
    theirs = 0.0 if baseline is None else (baseline.double() - exact).abs().max().item()
    size = exact.abs().max().item() if magnitude is None else magnitude
    floor = torch.finfo(actual.dtype).eps * size * math.sqrt(terms)
    if error <= 2 * theirs + floor:  # not if it is NaN
        return None
    return f"its error is {error:.3g} against float64, PyTorch's own {theirs:.3g}, the floor {floor:.3g}"


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _listed(results: Any) -> Results:
    return [results] if isinstance(results, Tensor) else list(results)


def _batch_norm(n: Norm) -> Tensor:
    return F.batch_norm(n.x, *n.running, n.weight, n.bias, False, 0.0, EPS)


def _eager_stats(n: Norm) -> Results:
    if n.x.is_cuda:
        return torch.batch_norm_stats(n.x, EPS)
    variance, mean = torch.var_mean(n.x.float(), (0, 2, 3), correction=0)
    return mean, torch.rsqrt(variance + EPS)


def _eager_apply(n: Norm) -> Results:
    return [_batch_norm(n).relu_()]


def _eager_residual(n: Norm) -> Results:
    return [_batch_norm(n).add_(n.residual).relu_()]


def _eager_dual(n: Norm) -> Results:
    second = F.batch_norm(n.x2, *n.running2, n.weight2, n.bias2, False, 0.0, EPS)
    return [_batch_norm(n).add_(second).relu_()]


def _eager_stats_apply(n: Norm) -> Results:
    z = F.batch_norm(n.x, None, None, n.weight, n.bias, True, 0.0, EPS)
    return [z.add_(n.residual).relu_(), None, None, None]


def _eager_dz(n: Norm, mask: str) -> Tensor:
    """The gradient in front of the ReLU, whose output eager has kept: ``threshold_backward``."""
    kept = {"none": None, "recomputed": n.activation_alone, "out": n.out}[mask]
    return n.grad_out if kept is None else torch.ops.aten.threshold_backward(n.grad_out, kept, 0)


def _eager_grad_stats(mask: str, with_dz: bool = False) -> Callable[[Norm], Results]:
    """Of the backward of batch_norm the part that adds up; dz comes with it."""

    def run(n: Norm) -> Results:
        dz = _eager_dz(n, mask)
        backward = torch.ops.aten.native_batch_norm_backward
        settings = (n.weight, *n.running, *n.statistics, True, EPS, [False, True, True])
        _, sum_dz_xhat, sum_dz = backward(dz, n.x, *settings)
        return [sum_dz, sum_dz_xhat, dz if with_dz else None]

    return run


def _eager_grad_apply(mask: str, sums: str | None, with_dz: bool = False) -> Callable[[Norm], Results]:
    """Of the backward of batch_norm the other part; on the CPU, which has it not by itself, all of it."""

    def run(n: Norm) -> Results:
        dz, mean, invstd = _eager_dz(n, mask), *n.statistics
        if sums is not None and n.x.is_cuda:
            grad = torch.batch_norm_backward_elemt(dz, n.x, mean, invstd, n.weight, *n.sums_for_eager[sums])
        else:
            settings = (n.weight, *n.running, mean, invstd, sums is not None, EPS, [True, False, False])
            grad = torch.ops.aten.native_batch_norm_backward(dz, n.x, *settings)[0]
        return [grad, dz if with_dz else None]

    return run


_RELU, _RESIDUAL, _PROJECTION = "relu", "residual", "projection"
_ALL = (_RELU, _RESIDUAL, _PROJECTION)

STATS_APPLY = NormPass(
    "bn_stats_apply residual",
    *("bn_stats_apply", 2, 1, 1, (_RESIDUAL,)),
    lambda n: (n.x, None, None, 0.0, EPS, n.weight, n.bias, n.residual, True, True),
    _eager_stats_apply,
    mean=2,
)
"""One launch where the activation fits on the chip, which a backend may refuse."""

PASSES = [
    NormPass("bn_stats", "bn_stats", 1, 0, 0, _ALL, lambda n: (n.x, None, None, 0.0, EPS), _eager_stats, mean=0),
    NormPass("bn_apply", "bn_apply", 1, 1, 0, (_RELU,), lambda n: (n.x, *n.norm, None, True), _eager_apply),
    NormPass(
        "bn_apply residual",
        *("bn_apply", 2, 1, 0, (_RESIDUAL,)),
        lambda n: (n.x, *n.norm, n.residual, True),
        _eager_residual,
    ),
    NormPass(
        "bn_apply_mask residual",
        *("bn_apply_mask", 2, 1, 1, (_RESIDUAL,)),
        lambda n: (n.x, *n.norm, n.residual),
        lambda n: [*_eager_residual(n), None],
    ),
    NormPass(
        "bn_apply_dual",
        *("bn_apply_dual", 2, 1, 0, (_PROJECTION,)),
        lambda n: (n.x, *n.norm, n.x2, *n.norm2, True),
        _eager_dual,
    ),
    NormPass(
        "bn_apply_dual_mask",
        *("bn_apply_dual_mask", 2, 1, 1, (_PROJECTION,)),
        lambda n: (n.x, *n.norm, n.x2, *n.norm2),
        lambda n: [*_eager_dual(n), None],
    ),
    NormPass(
        "bn_grad_stats no mask",
        *("bn_grad_stats", 2, 0, 0, (_PROJECTION,)),
        lambda n: (n.grad_out, n.x, None, *n.norm, False),
        _eager_grad_stats("none"),
        (0, 1),
    ),
    NormPass(
        "bn_grad_stats recomputed",
        *("bn_grad_stats", 2, 0, 0, (_RELU,)),
        lambda n: (n.grad_out, n.x, None, *n.norm, True),
        _eager_grad_stats("recomputed"),
        (0, 1),
    ),
    NormPass(
        "bn_grad_stats of out",
        *("bn_grad_stats", 3, 1, 0, (_RESIDUAL, _PROJECTION)),
        lambda n: (n.grad_out, n.x, n.out, *n.norm, True),
        _eager_grad_stats("out", with_dz=True),
        (0, 1),
    ),
    NormPass(
        "bn_grad_stats of bits",
        *("bn_grad_stats_mask", 2, 0, 1, (_RESIDUAL, _PROJECTION)),
        lambda n: (n.grad_out, n.x, n.mask, *n.statistics, False),
        _eager_grad_stats("out"),
        (0, 1),
    ),
    NormPass(
        "bn_grad_stats of bits, with dz",
        *("bn_grad_stats_mask", 2, 1, 1, (_RESIDUAL, _PROJECTION)),
        lambda n: (n.grad_out, n.x, n.mask, *n.statistics, True),
        _eager_grad_stats("out", with_dz=True),
        (0, 1),
    ),
    NormPass(
        "bn_grad_apply no mask",
        *("bn_grad_apply", 2, 1, 0, (_RESIDUAL, _PROJECTION)),
        lambda n: (n.grad_out, n.x, *n.norm, *n.sums, False),
        lambda n: _eager_grad_apply("none", "sums")(n)[:1],
    ),
    NormPass(
        "bn_grad_apply recomputed",
        *("bn_grad_apply", 2, 1, 0, (_RELU,)),
        lambda n: (n.grad_out, n.x, *n.norm, *n.sums_recomputed, True),
        lambda n: _eager_grad_apply("recomputed", "sums_recomputed")(n)[:1],
    ),
    NormPass(
        "bn_grad_apply recomputed, constant statistics",
        *("bn_grad_apply", 2, 1, 0, (_RELU,)),
        lambda n: (n.grad_out, n.x, *n.norm, None, None, True),
        lambda n: _eager_grad_apply("recomputed", None)(n)[:1],
    ),
    NormPass(
        "bn_grad_apply of bits",
        *("bn_grad_apply_mask", 2, 1, 1, (_PROJECTION,)),
        lambda n: (n.grad_out, n.x, n.mask, *n.norm[:3], *n.sums_of_bits, False),
        _eager_grad_apply("out", "sums_of_bits"),
    ),
    NormPass(
        "bn_grad_apply of bits, with dz",
        *("bn_grad_apply_mask", 2, 2, 1, (_RESIDUAL,)),
        lambda n: (n.grad_out, n.x, n.mask, *n.norm[:3], *n.sums_of_bits, True),
        _eager_grad_apply("out", "sums_of_bits", with_dz=True),
    ),
]
"""Every pass that the ``cuda`` backend has over one activation (``STATS_APPLY`` apart), in every form."""
