"""Results of the same condition and commit, made one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_resnet.bench.report import condition
from fused_resnet.bench.result import Measurement, Result


def merged(results: Sequence[Result]) -> list[Result]:
    """One result for each condition and commit, in the order in which they first appear.

    What was measured twice is taken from the later run, whole: rounds of two runs are not rounds of one. Ceilings are
    those of the last run that has them, the load is the highest.
    """
    groups: list[list[Result]] = []
    for result in results:
        for group in groups:
            if condition.same(group[0], result):
                group.append(result)
                break
        else:
            groups.append([result])
    return [_one(sorted(group, key=lambda result: str(result.machine.get("date") or ""))) for group in groups]


def _one(group: Sequence[Result]) -> Result:
    if len(group) == 1:
        return group[0]
    measurements: dict[tuple[Any, ...], Measurement] = {}
    ceilings: dict[str, dict[str, float]] = {}
    ledgers: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for result in group:
        measurements |= {measurement.key: measurement for measurement in result.measurements}
        ceilings |= result.ceilings
        ledgers |= result.ledgers
    loads = [load for result in group if (load := result.machine.get("load_average")) is not None]
    machine = group[-1].machine | {"load_average": max(loads, default=None)}
    return Result(machine, _arguments(group), ceilings, list(measurements.values()), ledgers)


def _arguments(group: Sequence[Result]) -> dict[str, Any]:
    """What all runs were asked for alike; of what differs, every value."""
    names = dict.fromkeys(name for result in group for name in result.arguments)
    values = {name: [result.arguments.get(name) for result in group] for name in names}
    return {
        name: found[0] if all(value == found[0] for value in found) else _flat(found) for name, found in values.items()
    }


def _flat(values: Sequence[Any]) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat += value if isinstance(value, list | tuple) else [value]
    return [value for index, value in enumerate(flat) if value is not None and value not in flat[:index]]
