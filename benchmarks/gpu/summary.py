"""summary.md: what ran, what failed, and the headline ratios of what was measured so far."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from benchmarks.gpu.plan import result_files
from benchmarks.gpu.state import DONE, FAILED, SKIPPED, UNFINISHED, State
from fused_resnet.bench.report.roles import best_eager, best_of_ours, best_rival, is_ours, right_timings, times_faster
from fused_resnet.bench.result import FAILED as RAISED
from fused_resnet.bench.result import OP, WRONG, Measurement, Result


def write_summary(work: Path, state: State, dry: bool = False) -> Path:
    """Writes it, from the state and from the results that there are."""
    lines = ["# What this machine said", ""]
    if dry:
        lines += ["A dry run: nothing below is a measurement.", ""]
    results, complaints = _results(work / "results")
    if results:
        machine = results[0].machine
        facts = ("device", "torch", "triton", "cuda", "python", "commit", "date")
        lines += [", ".join(f"{name} {machine.get(name)}" for name in facts), ""]
    lines += _phases(state)
    lines += [f"- {complaint}" for complaint in complaints]
    lines += _headlines([m for result in results for m in result.measurements])
    path = work / "summary.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _results(folder: Path) -> tuple[list[Result], list[str]]:
    found, complaints = [], []
    for path in result_files(folder):
        try:
            found.append(Result.load(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            complaints.append(f"{path.name} cannot be read: {error}")
    return found, complaints


def _phases(state: State) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    for name, entry in state.entries.items():
        phase = name.partition("/")[0]
        counts.setdefault(phase, Counter())[entry.status] += 1
        seconds[phase] += round(entry.seconds)
    lines = ["| phase | done | failed | unfinished | skipped | seconds |", "|---|---|---|---|---|---|"]
    for phase, found in counts.items():
        cells = (str(found[status]) for status in (DONE, FAILED, UNFINISHED, SKIPPED))
        lines.append(f"| {phase} | " + " | ".join(cells) + f" | {seconds[phase]} |")
    lines.append("")
    others = [(name, entry) for name, entry in state.entries.items() if entry.status != DONE]
    for name, entry in sorted(others, key=lambda item: (FAILED, UNFINISHED, SKIPPED).index(item[1].status)):
        lines.append(f"- {name}: {entry.status}; {entry.note}")
    if old := state.of_other_sources():
        lines.append(f"- done with other sources of the package (--again does them anew): {', '.join(old)}")
    return [*lines, ""]


def _headlines(measurements: list[Measurement]) -> list[str]:
    lines = []
    networks = [m for m in measurements if m.level != OP]
    if networks:
        lines += ["| | best of ours | eager / ours | best other | other / ours |", "|---|---|---|---|---|"]
        lines += [line for m in networks if (line := _headline(m)) is not None]
        lines.append("")
    if ops := [m for m in measurements if m.level == OP]:
        lines += ["Ops, geometric means of eager's time over ours:", "", "| | batch | ops | mean | worst |"]
        lines += ["|---|---|---|---|---|", *_of_ops(ops), ""]
    wrong = [
        f"- {outcome.status}: {name} in {m.title}: {outcome.reason}"
        for m in measurements
        for name, outcome in m.outcomes.items()
        if outcome.status in (WRONG, RAISED)
    ]
    return [*lines, f"{len(wrong)} outcomes wrong or failed{':' if wrong else '.'}", *wrong[:40]]


def _headline(m: Measurement) -> str | None:
    ours, eager, rival = best_of_ours(m), best_eager(m), best_rival(m)
    if ours is None:
        return None
    against_eager = f"{times_faster(m, ours, eager):.2f}x" if eager else ""
    against_rival = f"{times_faster(m, ours, rival):.2f}x" if rival else ""
    return f"| {m.title} | {ours} | {against_eager} | {rival or ''} | {against_rival} |"


def _of_ops(measurements: list[Measurement]) -> list[str]:
    ratios: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for m in measurements:
        if (eager := best_eager(m)) is None:
            continue
        for name in filter(is_ours, right_timings(m)):
            ratios.setdefault((name, m.batch_size), []).append((times_faster(m, name, eager), m.subject))
    lines = []
    for (name, batch), found in sorted(ratios.items()):
        mean = math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found))
        worst, subject = min(found)
        lines.append(f"| {name} | {batch} | {len(found)} | {mean:.2f}x | {worst:.2f}x, {subject} |")
    return lines
