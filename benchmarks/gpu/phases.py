"""Runs the phases of a visit to a machine with a GPU: ``benchmarks/run_gpu.sh`` starts it and says what for.

A phase has a time budget in each call and the call has one for all. What is done is skipped by the next call; what ran
out of time goes on there; what failed is tried again. After each unit of work, state and summary.md are written.

Machines that are fresh each time and give back few files: with --pack the work is done in a folder of the machine's
own, and after each phase the output folder gets summary.md, report.html, results.tar.gz and kernels.tar.gz; with
--from DIR the next call begins from these, DIR being where they were brought to.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import archive
from benchmarks.gpu.plan import BUDGETS, PHASES, TOTAL, units
from benchmarks.gpu.state import DONE, FAILED, ROOT, UNFINISHED, State
from benchmarks.gpu.summary import write_summary
from benchmarks.gpu.unit import LOGS, End, Unit, log_name, run

OK, SOMETHING_FAILED, CALL_AGAIN = 0, 1, 75
LEAST = 5.0
"""Seconds, with less than which nothing is begun."""
WORK = ROOT / "build" / "gpu_results"


def main(words: list[str] | None = None, make_units: Callable[[Path, bool], list[Unit]] = units) -> int:
    """The exit status: 0 if all is done, 1 if something failed, 75 if time was up."""
    arguments = parse(words)
    output = arguments.output
    work = WORK if arguments.pack else output
    work.mkdir(parents=True, exist_ok=True)
    if not (work / ".gitignore").exists():
        (work / ".gitignore").write_text("*\n")  # results of a visit are copied to benchmarks/results by hand
    try:
        if arguments.source is not None:
            print(
                f"taken over: {', '.join(archive.unpack(arguments.source, work)) or 'nothing, there is a state here'}"
            )
        state = State(work / "state.json")
    except (OSError, ValueError) as error:
        print(f"run_gpu: {error}", file=sys.stderr)
        return 2
    for phase in arguments.again or []:
        state.forget(phase)
    return _Call(arguments, work, state, make_units).run()


class _Call:
    """One call."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        work: Path,
        state: State,
        make_units: Callable[[Path, bool], list[Unit]],
    ) -> None:
        self.arguments, self.work, self.state, self.make_units = arguments, work, state, make_units
        self.end = time.monotonic() + arguments.total
        self.ended: dict[str, End] = {}

    def run(self) -> int:
        wanted = [phase for phase in PHASES if phase in (self.arguments.phases or PHASES)]
        late = False
        for phase in wanted:
            phase_end = min(self.end, time.monotonic() + self.arguments.budgets[phase])
            found = [unit for unit in self.make_units(self.work, self.arguments.dry) if unit.phase == phase]
            for unit in found:
                if self._is_over(unit):
                    print(f"{unit.name}: done before", flush=True)
                    continue
                left = phase_end - time.monotonic()
                if unit.why_skipped is None and left < LEAST:
                    late = True
                    print(f"{unit.name}: no time left", flush=True)
                    continue
                self._one(unit, left)
            self._write()
        late |= any(end.status == UNFINISHED for end in self.ended.values())
        failed = [name for name, end in self.ended.items() if end.status == FAILED]
        print(f"wrote {self.work / 'summary.md'}")
        if failed:
            print(f"failed: {', '.join(failed)}")
            return SOMETHING_FAILED
        return CALL_AGAIN if late else OK

    def _is_over(self, unit: Unit) -> bool:
        return not unit.repeated and self.state.status(unit.name) == DONE

    def _one(self, unit: Unit, left: float) -> None:
        print(f"{unit.name}: at most {left:.0f} s", flush=True)
        log = self.work / LOGS / log_name(unit.name)
        end = run(unit, left, log, self._environment())
        self.ended[unit.name] = end
        self.state.note(unit.name, end.status, end.seconds, end.note)
        print(f"{unit.name}: {end.status} in {end.seconds:.0f} s; {end.note}", flush=True)
        self._write(pack=end.seconds > 30)

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": "1"} if self.arguments.dry else {}  # of tiny tensors
        return threads | {
            "TRITON_CACHE_DIR": str(self.work / "triton_cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor_cache"),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "160",
        }

    def _write(self, pack: bool = True) -> None:
        complaints: list[str] = []
        write_summary(self.work, self.state, dry=self.arguments.dry)
        if self.arguments.pack and pack:
            complaints = archive.pack(self.work, self.arguments.output)
        for complaint in complaints:
            print(complaint, flush=True)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("phases", nargs="*", metavar="PHASE", help=f"{', '.join(PHASES)} (default: all, in this order)")
    add("--dry", action="store_true", help="without a GPU: tiny shapes on the reference; nothing is built")
    output = Path(os.environ.get("OUT") or "gpu_results")
    add("--output", type=Path, default=output, metavar="FOLDER", help="(default: $OUT, else gpu_results)")
    budget_help = "of a phase in this call, such as ops=420 (default: BUDGET_ops, else " + ", ".join(
        f"{phase} {seconds}" for phase, seconds in BUDGETS.items()
    )
    add("--budget", nargs="+", default=[], metavar="PHASE=SECONDS", help=budget_help + ")")
    add("--total", type=_seconds, default=_seconds(os.environ.get("BUDGET") or str(TOTAL)), metavar="SECONDS")
    add("--again", nargs="+", choices=PHASES, metavar="PHASE", help="do what was done in earlier calls again")
    add("--pack", action="store_true", help="leave four files in the output folder, and work elsewhere")
    add("--from", dest="source", type=Path, metavar="FOLDER", help="begin from what --pack has left")
    arguments = parser.parse_args(words)
    for phase in arguments.phases:
        if phase not in PHASES:
            parser.error(f"a phase is one of {', '.join(PHASES)}; got {phase!r}")
    try:
        arguments.budgets = budgets(arguments.budget)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def budgets(given: Sequence[str]) -> dict[str, float]:
    """Seconds by phase: those given as "ops=420", else of the environment's BUDGET_ops, else the usual ones.

    Raises:
        ValueError: one that is not a phase and its seconds.
    """
    found = {phase: float(os.environ.get(f"BUDGET_{phase}") or seconds) for phase, seconds in BUDGETS.items()}
    for text in given:
        phase, _, seconds = text.partition("=")
        if phase not in PHASES or not seconds.replace(".", "", 1).isdecimal():
            raise ValueError(f"a budget is a phase and its seconds, such as ops=420; got {text!r}")
        found[phase] = float(seconds)
    return found


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be seconds; got {text!r}") from None


if __name__ == "__main__":
    raise SystemExit(main())
