"""The condition that a result was measured in: in words, as the name of its file, and what differs in two.

Results of one condition and commit become one (`merged`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fused_resnet.bench.machine import device_name
from fused_resnet.bench.report.figures import three_digits
from fused_resnet.bench.result import MODEL, Measurement, Result

VERSIONS = ("python", "torch", "cuda", "cudnn", "triton", "torchvision")
FACTS = ("device", "cpu", "cores", "threads", "os", *VERSIONS)
"""What must be the same for two runs to have had the same condition; the versions of the peers beside it."""
RESUMED_MACHINE = ("device", "device_type", "threads", *VERSIONS[:-1], "packages", "commit")
RESUMED_ARGUMENTS = ("dry", "seed")
"""What must be the same for a run to go on with an earlier result."""
COMMIT_DIGITS = 10
MOST_NAMES = 3
"""So many models are named in a file's name; of more, only the number."""


def differences(first: Result, second: Result) -> dict[str, tuple[Any, Any]]:
    """The facts in which two results differ, by name; None on the side that does not have one."""

    def facts(machine: dict[str, Any]) -> dict[str, Any]:
        return {name: machine.get(name) for name in FACTS} | (machine.get("packages") or {})

    one, other = facts(first.machine), facts(second.machine)
    pairs = {name: (one.get(name), other.get(name)) for name in (one | other)}
    return {name: (was, now) for name, (was, now) in pairs.items() if was != now}


def same(first: Result, second: Result) -> bool:
    """Whether two results are of one condition and one commit."""
    return first.machine.get("commit") == second.machine.get("commit") and not differences(first, second)


def reasons_to_start_anew(before: Result, now: Result) -> list[str]:
    """Why no measurement of the one may stand in the other; empty for the same machine, versions, arguments and commit.

    A modified checkout is no commit: two of them may differ.
    """
    if str(now.machine.get("commit")).endswith("-dirty"):
        return ["a modified checkout"]
    facts = [("machine", name) for name in RESUMED_MACHINE] + [("arguments", name) for name in RESUMED_ARGUMENTS]
    return [f"another {name}" for of, name in facts if getattr(before, of).get(name) != getattr(now, of).get(name)]


def merged(results: Sequence[Result]) -> list[Result]:
    """One result for each condition and commit, in the order in which they first appear.

    What was measured twice is taken from the later run, whole: rounds of two runs are not rounds of one. Ceilings are
    those of the last run that has them, the load is the highest, and what each run was asked for is left out.
    """
    groups: list[list[Result]] = []
    for result in results:
        group = next((group for group in groups if same(group[0], result)), None)
        if group is None:
            groups.append(group := [])
        group.append(result)
    return [_one(sorted(group, key=lambda result: str(result.machine.get("date") or ""))) for group in groups]


def _one(group: Sequence[Result]) -> Result:
    if len(group) == 1:
        return group[0]
    measurements: dict[tuple[Any, ...], Measurement] = {}
    found = Result(dict(group[-1].machine), {}, {}, [])
    for result in group:
        measurements |= {measurement.key: measurement for measurement in result.measurements}
        found.ceilings.update(result.ceilings)
    found.measurements.extend(measurements.values())
    loads = [load for result in group if (load := result.machine.get("load_average")) is not None]
    found.machine["load_average"] = max(loads, default=None)
    return found


def file_name(asked: Mapping[str, Any], threads: int) -> str:
    """Such as "cpu_float32_resnet50_inference_b1_b8_training-step_b16_224px_2threads", without an ending; ``asked`` as
    in ``Result.arguments``."""
    on_gpu, models = asked["device"] != "cpu", asked["model"]
    where = re.sub(r"^nvidia[ -]", "", device_name(asked["device"]), flags=re.IGNORECASE) if on_gpu else "cpu"
    named = [_slug(name) for name in models] if len(models) <= MOST_NAMES else [f"{len(models)}models"]
    parts = [_slug(where), *asked["dtype"], *named, *(asked["level"] if asked["level"] != [MODEL] else [])]
    for mode, sizes in asked["batch_size"].items():
        parts += [mode.replace(" ", "-"), *(f"b{size}" for size in sizes)]
    return "_".join([*parts, f"{asked['image_size']}px", *([] if on_gpu else [f"{threads}threads"])])


def _slug(name: str) -> str:
    """Letters, digits, dots, dashes and underscores only, for the name of a file."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "model"


def commit(result: Result) -> str:
    """The first digits of the commit, "-dirty" kept; "unknown" of an installation that is not a checkout."""
    digits, *dirty = str(result.machine.get("commit") or "unknown").split("-", 1)
    return "-".join([digits[:COMMIT_DIGITS], *dirty])


def one_line(result: Result) -> str:
    """Such as "AMD EPYC (AVX512), 2 threads, torch 2.13.0, commit 91b5da0178"."""
    machine = result.machine
    device, threads = machine.get("device") or "unknown device", _counted(machine, "thread")
    return _joined(device, threads, f"torch {machine.get('torch')}", f"commit {commit(result)}")


def lines(result: Result) -> list[tuple[str, str]]:
    """(title, text) of everything that a reader needs to believe the numbers; what is not known is left out."""
    machine, load = result.machine, result.machine.get("load_average")
    cpu = machine.get("cpu") if machine.get("cpu") != machine.get("device") else None
    counts = (_counted(machine, "core"), _counted(machine, "thread"))
    versions = {name: machine.get(name) for name in VERSIONS} | (machine.get("packages") or {})
    entries = [
        ("machine", _joined(machine.get("device"), cpu, *counts, machine.get("os"))),
        ("versions", _joined(*(f"{name} {version}" for name, version in versions.items() if version))),
        ("commit", commit(result)),
        ("date", machine.get("date")),
        ("load before", None if load is None else f"{load:.1f} processes (near 0 on a quiet machine)"),
        *((f"ceilings, {dtype}", ceiling_text(found)) for dtype, found in result.ceilings.items()),
    ]
    return [(title, str(text)) for title, text in entries if text]


def ceiling_text(ceiling: Mapping[str, float]) -> str:
    """Such as "21.3 GB/s copied, 0.11 TFLOP/s in matrix products"."""
    gigabytes, teraflop = ceiling["bytes_per_second"] / 1e9, ceiling["flop_per_second"] / 1e12
    return f"{three_digits(gigabytes)} GB/s copied, {three_digits(teraflop)} TFLOP/s in matrix products"


def _counted(machine: Mapping[str, Any], thing: str) -> str | None:
    number = machine.get(f"{thing}s")
    return f"{number} {thing}{'s' if number != 1 else ''}" if number else None


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)
