"""Under which condition a result was measured, in words, and in what two conditions differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_resnet.bench.report.wording import three_digits
from fused_resnet.bench.result import Result

FACTS = ("device", "cpu", "cores", "threads", "os", "python", "torch", "cuda", "cudnn", "triton", "torchvision")
"""What must be the same for two runs to have had the same condition; the versions of the peers beside it."""
COMMIT_DIGITS = 10
FILES = ("output", "name")
"""Arguments that say nothing of what was measured."""


def facts(result: Result) -> dict[str, Any]:
    """What must be the same for two runs to have had the same condition, but for the commit."""
    machine = result.machine
    found = {name: machine.get(name) for name in FACTS}
    return found | {str(name): version for name, version in (machine.get("packages") or {}).items()}


def differences(first: Result, second: Result) -> dict[str, tuple[Any, Any]]:
    """The facts in which two results differ, by name; None on the side that does not have one."""
    one, other = facts(first), facts(second)
    names = [*one, *(name for name in other if name not in one)]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def same(first: Result, second: Result) -> bool:
    """Whether two results are of one condition and one commit."""
    return first.machine.get("commit") == second.machine.get("commit") and not differences(first, second)


def commit(result: Result) -> str:
    """The first digits of the commit, "-dirty" kept; "unknown" of an installation that is not a checkout."""
    digits, *dirty = str(result.machine.get("commit") or "unknown").split("-", 1)
    return "-".join([digits[:COMMIT_DIGITS], *dirty])


def one_line(result: Result) -> str:
    """Such as "AMD EPYC (AVX512), 2 threads, torch 2.13.0, commit 91b5da0178"."""
    machine = result.machine
    parts = [str(machine.get("device") or "unknown device")]
    if machine.get("threads"):
        parts.append(_counted(machine["threads"], "thread"))
    return ", ".join([*parts, f"torch {machine.get('torch')}", f"commit {commit(result)}"])


def lines(result: Result) -> list[tuple[str, str]]:
    """(title, text) of everything that a reader needs to believe the numbers; what is not known is left out."""
    machine = result.machine
    threads = _counted(machine["threads"], "thread") if machine.get("threads") else None
    cores = _counted(machine["cores"], "core") if machine.get("cores") else None
    cpu = machine.get("cpu") if machine.get("cpu") != machine.get("device") else None
    load = machine.get("load_average")
    entries = [
        ("machine", _joined(machine.get("device"), cpu, cores, threads, machine.get("os"))),
        ("versions", _joined(*_versions(machine))),
        ("commit", commit(result)),
        ("date", machine.get("date")),
        ("load before", None if load is None else f"{load:.1f} processes (near 0 on a quiet machine)"),
        *((f"ceilings, {dtype}", ceiling_text(found)) for dtype, found in result.ceilings.items()),
        (
            "asked for",
            _joined(
                *(
                    f"{name.replace('_', ' ')} {_listed(value)}"
                    for name, value in result.arguments.items()
                    if _is(name, value)
                )
            ),
        ),
    ]
    return [(title, str(text)) for title, text in entries if text]


def ceiling_text(ceiling: Mapping[str, float]) -> str:
    """Such as "21.3 GB/s copied, 0.11 TFLOP/s in matrix products"."""
    gigabytes, teraflop = ceiling["bytes_per_second"] / 1e9, ceiling["flop_per_second"] / 1e12
    return f"{three_digits(gigabytes)} GB/s copied, {three_digits(teraflop)} TFLOP/s in matrix products"


def _versions(machine: Mapping[str, Any]) -> list[str]:
    found = {name: machine.get(name) for name in ("python", "torch", "cuda", "cudnn", "triton", "torchvision")}
    found |= machine.get("packages") or {}
    return [f"{name} {version}" for name, version in found.items() if version]


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' if number != 1 else ''}"


def _is(name: str, value: Any) -> bool:
    return name not in FILES and value is not None and value is not False and value != []


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {_listed(one)}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)
