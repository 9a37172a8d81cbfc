"""What is right of an op: the project's rule, ``tests/accuracy.py``, on the device and for finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Results = Sequence[Tensor | None]


def first_wrong(actual: Results, baseline: Results, exact: Results, judge: Callable[..., str | None]) -> str | None:
    """What is wrong with the first wrong result; results that this form or contender has not are passed over."""
    for index, (ours, theirs, right) in enumerate(zip(actual, baseline, exact, strict=True)):
        if ours is not None and right is not None and right.numel() and (wrong := judge(index, ours, theirs, right)):
            return f"result {index}: {wrong}"
    return None


def why_wrong(
    actual: Tensor, baseline: Tensor | None, exact: Tensor, terms: int = 1, magnitude: float | None = None
) -> str | None:
    """What is wrong with a result, None if nothing is.

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


def relative_error(results: Results, exact: Results) -> float | None:
    """The largest difference to the exact results, each as a fraction of its own largest value; bits left out."""
    found = [
        ((ours.detach().double() - right).abs().max() / right.abs().max().clamp(min=1e-30)).item()
        for ours, right in zip(results, exact, strict=True)
        if ours is not None and right is not None and right.numel() > 0 and right.is_floating_point()
    ]
    return max(found, key=lambda error: (error != error, error)) if found else None


def terms_of_products(dtype: torch.dtype, count: int) -> int:
    """How many rounded numbers a sum of so many products adds up, for the floor of the rule. Sums are float32: their
    rounding is lost in that of a narrower result."""
    return count if dtype == torch.float32 else 1


def doubled(values: Iterable[Any]) -> list[Any]:
    """Floating point tensors in float64; everything else as it is."""
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def listed(results: Any) -> Results:
    return [results] if isinstance(results, Tensor) else list(results)
