"""The accuracy rule of the project, in one place: against float64, our error is at most twice PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def assert_at_most_twice(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    *,
    what: str = "result",
    terms: int = 1,
    magnitude: float | None = None,
) -> None:
    """Asserts max|actual - exact| <= 2 * max|baseline - exact| + floor.

    The floor is one unit in the last place of actual's dtype, at ``magnitude`` and times sqrt(terms). Without it a
    baseline that happens to be exact (or that sums in float64, as PyTorch's batch norm on the CPU does) would forbid
    the rounding of the result itself. NaN and infinities must be where they are in ``exact``.

    Args:
        actual: what is tested.
        baseline: what PyTorch computes in the same dtype from the same values.
        exact: the same in float64.
        what: the name in the message.
        terms: how many numbers are added up in each element: N*H*W for a per-channel gradient, else 1.
        magnitude: the size of the numbers that are rounded; the largest |exact| unless given. Give it where the result
            is a small difference of large numbers, or a sum that cancels.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    assert actual.dtype == baseline.dtype, f"{what}: {actual.dtype}, not {baseline.dtype}"
    actual, baseline, exact = (tensor.detach().cpu() for tensor in (actual, baseline, exact))
    unit = torch.finfo(actual.dtype).eps
    finite = exact.isfinite()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        # A finite number may be too large for the dtype: then the baseline says what it becomes.
        expected = kind(exact) | (finite & kind(baseline))
        assert torch.equal(kind(actual), expected), f"{what}: {kind.__name__} is in other places"
    finite &= baseline.isfinite()
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs()
    baseline_error = (baseline.double() - exact)[finite].abs().max().item()
    if magnitude is None:
        magnitude = exact[finite].abs().max().item()
    floor = unit * magnitude * math.sqrt(terms)
    limit = 2 * baseline_error + floor
    assert error.max().item() <= limit, (
        f"{what}: error {error.max().item():.3g} against float64; PyTorch's own is {baseline_error:.3g}, "
        f"so with a floor of {floor:.3g} the limit is {limit:.3g}"
    )


EXTREMES = {
    "infinite": (math.inf, -math.inf, math.inf, math.nan),
    "largest": (3e38, -3e38, -2e38, 3e38),
}


def with_extremes(x: Tensor, values: Sequence[float]) -> Tensor:
    """A copy of x (N, C, H, W) with each of the values at two pixels of a row, negative at the second.

    A sum of inputs is infinite or NaN there, a sum of products with small weights is not.
    """
    x = x.clone()
    _, channels, height, width = x.shape
    for i, value in enumerate(values):
        x[0, i * 7 % channels, i * 5 % height, i * 4 % width] = value
        x[-1, i * 7 % channels, i * 5 % height, (i * 4 + 2) % width] = -value
    return x
