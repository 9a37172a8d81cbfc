"""What may have changed between two results, as data."""

from __future__ import annotations

from dataclasses import dataclass

from fused_resnet.bench.report.noise import Verdict
from fused_resnet.bench.report.roles import is_ours
from fused_resnet.bench.result import FAILED, RIGHT, WRONG, Result

SLOWER, FASTER, APPEARED, GONE = "slower", "faster", "appeared", "gone"


@dataclass(frozen=True)
class Speed:
    """How long a contender took before and after, relative to the references."""

    measurement: str
    contender: str
    before: float | None
    after: float | None
    """Median seconds, as measured and not relative; None of a mean of several measurements."""
    verdict: Verdict
    references: tuple[str, ...]

    @property
    def kind(self) -> str | None:
        """`SLOWER`, `FASTER`, or None if nothing is seen beyond noise."""
        if not self.verdict.changed:
            return None
        return SLOWER if self.verdict.value > 0 else FASTER

    @property
    def is_loss(self) -> bool:
        """Only of contenders that this package runs: the others are what is measured by."""
        return self.kind == SLOWER and is_ours(self.contender)


@dataclass(frozen=True)
class Status:
    """A contender whose status is another: before and after are those of ``result.Outcome``, `GONE` or `APPEARED`."""

    measurement: str
    contender: str
    before: str
    after: str
    reason: str | None

    @property
    def is_loss(self) -> bool:
        return self.before == RIGHT and self.after in (WRONG, FAILED)


@dataclass(frozen=True)
class Bytes:
    """A number of bytes that changed."""

    measurement: str
    contender: str
    what: str
    before: int
    after: int


@dataclass(frozen=True)
class Comparison:
    """All of it. Everything compared is in ``speeds``, changed or not."""

    before: Result
    after: Result
    threshold: float
    speeds: list[Speed]
    overall: list[Speed]
    """The means of ours over several measurements."""
    statuses: list[Status]
    bytes: list[Bytes]
    too_few_rounds: list[str]
    """Titles of what has not enough rounds to be judged."""
    turned_rivals: list[str]
    """Who changed against the other rivals throughout, and was not measured by."""
    spreads: dict[str, float]
    """By level of measurement: the standard deviation between runs that was reckoned with."""
    peak_noise: float
    """The fraction below which a change of peak memory is not told."""
    only_before: list[str]
    only_after: list[str]
    """Titles of the measurements that one result has alone."""

    @property
    def losses(self) -> list[Speed | Status]:
        changes: list[Speed | Status] = [*self.statuses, *self.overall, *self.speeds]
        return [change for change in changes if change.is_loss]
