"""What a run takes over from the earlier result it goes on with: nothing is lost, and nothing measured twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fused_resnet.bench.result import Measurement, Result
from fused_resnet.bench.suite.condition import differences
from fused_resnet.bench.suite.measure import NO_TIME

Key = tuple[object, ...]


class Earlier:
    """The measurements of an earlier result, by key; none where it was made in another condition or at another commit.

    Args:
        before: the earlier result; None where there is none.
        now: the result of this run, which has measured nothing yet.
        names: the contenders of this run.
    """

    def __init__(self, before: Result | None, now: Result, names: Sequence[str]) -> None:
        self._names = set(names)
        self._known: dict[Key, Measurement] = {}
        if before is not None and not differences(before, now):
            self._known = {measurement.key: measurement for measurement in before.measurements}
            loads = [load for one in (before, now) if (load := one.machine.get("load_average")) is not None]
            now.machine.update({"load_average": max(loads)} if loads else {})
            now.ceilings.update(before.ceilings)
            now.ledgers.update(before.ledgers)

    def get(self, key: Key) -> Measurement | None:
        """Complete or not."""
        return self._known.get(key)

    def complete(self, key: Key) -> Measurement | None:
        """One that need not be made again: everybody took part, and nobody was left out for want of time."""
        known = self._known.get(key)
        return known if known is not None and self._names <= _had_their_turn(known) else None

    def why_kept(self, key: Key) -> str | None:
        """Why a measurement must not be made again, though somebody is missing in it; None where it may be."""
        known = self._known.get(key)
        others = set() if known is None else _had_their_turn(known) - self._names
        return f"it was measured with {', '.join(sorted(others))}, not asked for now" if others else None

    def fuller(self, measured: Measurement) -> Measurement:
        """The new measurement, or the earlier one where that has somebody more."""
        known = self._known.get(measured.key)
        return measured if known is None or _had_their_turn(known) <= _had_their_turn(measured) else known

    def without(self, measured: Iterable[Measurement]) -> list[Measurement]:
        """All but those of which there is another."""
        keys = {measurement.key for measurement in measured}
        return [measurement for key, measurement in self._known.items() if key not in keys]


def _had_their_turn(measurement: Measurement) -> set[str]:
    return {name for name, outcome in measurement.outcomes.items() if outcome.reason != NO_TIME}
