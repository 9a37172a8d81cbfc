"""Everything that a machine with an NVIDIA GPU can tell, without network: ``benchmarks/run_gpu.sh`` starts it.

A phase has a time budget in each call and the call has one for all. What is done is skipped by the next call; what ran
out of time goes on there (``bench --resume --budget``); what failed is tried again. After each unit of work, state.json
and summary.md are written; a SIGTERM or Ctrl-C lets the command at work save first.

Machines that are fresh each time and give back few files: with --pack the work is done in a folder of the machine's
own, and the output folder gets summary.md, report.html, results.tar.gz and kernels.tar.gz; with --from DIR the next
call begins from these, DIR being where they were brought to.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from fused_resnet.bench.report import figures, tables
from fused_resnet.bench.report.condition import merged, same
from fused_resnet.bench.result import ABSENT, OP, Result
from fused_resnet.bench.suite.measure import NO_TIME

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu_results"
BUDGETS = {"build": 300, "test": 420, "ops": 420, "blocks": 360, "models": 420, "tune": 300, "report": 150}
"""Seconds of each phase in one call; of one call all together `TOTAL`, since commands may be cut after ten minutes."""
TOTAL, LEAST, TIME_TO_SAVE = 540.0, 5.0, 15.0
"""With less than LEAST seconds nothing is begun; between asking a command to stop and ending it TIME_TO_SAVE pass."""
OK, SOMETHING_FAILED, UNUSABLE, CALL_AGAIN = 0, 1, 2, 75
DONE, FAILED, UNFINISHED, SKIPPED = "done", "failed", "unfinished", "skipped"
NETWORKS = ("resnet18", "resnet50")
BLOCK_NETWORKS = (*NETWORKS, "resnext50_32x4d")
MODEL_NETWORKS = ("resnet50", "resnet18", "resnext50_32x4d", "resnet152", "wide_resnet50_2")
DTYPE, BATCH_SIZES, JOBS = "bfloat16", ("256", "32", "1"), str(os.cpu_count() or 1)
OURS = ("cuda", "triton")
BENCH: list[Any] = [sys.executable, "-m", "fused_resnet", "bench"]
CACHES = ("triton_cache", "inductor_cache")
ARCHIVES = {"results.tar.gz": False, "kernels.tar.gz": True}
"""Whether the archive holds `CACHES`, or everything else."""
LARGEST = 15 * 2**20
"""Bytes of an archive: machines that give back few files take 16 MiB at most."""


@dataclass
class Unit:
    """A command with a log and a time limit.

    Attributes:
        words: the command; with ``budget`` its seconds come after ``--budget``, and it ends by itself.
        why_skipped: why it has no place here; None if it has.
        left: of a command that saves as it goes, asked at its end: what it had no time for; None if nothing.
        repeated: also done where an earlier call has done it: its product is this machine's, or made of others'.
        fine: exit statuses that are no failure.
    """

    phase: str
    title: str
    words: list[str]
    why_skipped: str | None = None
    left: Callable[[Path], str | None] | None = None
    budget: bool = False
    repeated: bool = False
    fine: tuple[int, ...] = (0,)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.phase}/{self.title}"


def units(work: Path, dry: bool) -> list[Unit]:
    """All of them, in their order; in a dry run no GPU is there, nothing is compiled, and shapes are tiny."""
    results, python, found = work / "results", [sys.executable, "-m"], list[Unit]()

    def add(phase: str, title: str, words: Sequence[object], why_skipped: str | None = None, **more: Any) -> None:
        found.append(Unit(phase, title, list(map(str, words)), why_skipped, **more))

    where = ["--device", "cpu"] if dry else f"--device cuda --dtype {DTYPE}".split()
    make = ["make", "--no-print-directory", "build", "VENV=", f"PYTHON={sys.executable}"]
    why_none, jobs = "what is built is taken" if dry else None, {"MAX_JOBS": JOBS}
    add("build", "extension", make, why_none, repeated=True, environment=jobs)
    add("build", "info", [*python, "fused_resnet", "info"], repeated=True)
    kernels = f"--jobs {JOBS} --model {' '.join(BLOCK_NETWORKS)} --batch-size {' '.join(BATCH_SIZES)} --dtype {DTYPE}"
    if dry:
        kernels = "--jobs 2 --model resnet18 --batch-size 2 --image-size 32 --dtype float32 --backend reference"
        kernels += " --device cpu"
    add("build", "kernels", [*python, "benchmarks.compile_kernels", *kernels.split()], budget=True)
    # 36 pixels end at 2, on the way through odd sizes
    small = [*BENCH, "--level", "op", "--dry", "--image-size", "36", "--output", work / "dry", *where]
    small_ops = {name: [*small, "--contenders", f"ours {name}"] for name in (["reference"] if dry else OURS)}
    for backend, words in small_ops.items():
        add("test", f"small ops, {backend}", words)
    for file in ["tests/bench/test_timer.py"] if dry else _gpu_tests():
        only = [] if dry or file.startswith("tests/kernels") else ["-m", "gpu"]
        # 5: nothing is marked so in it
        add("test", file, [*python, "pytest", "-q", file, "-p", "no:cacheprovider", *only], fine=(0, 5))
    sanitizer = shutil.which("compute-sanitizer")
    why_none = "no device" if dry else None if sanitizer else "compute-sanitizer is not on the PATH"
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that it sees the ends of tensors
    for backend, words in small_ops.items():
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *words]
            add("test", f"{tool}, {backend}", command, why_none, environment=uncached)
    launch = [*python, "benchmarks.bench_launch", "--rounds", "20", "--output", results / "launch.json"]
    add("ops", "launch", launch, "no launches" if dry else None)

    def bench(phase: str, title: str, models: Sequence[str], options: str) -> None:
        path = results / f"{phase}_{title.replace(' ', '')}.json"
        modes = ["inference", "training-step"][: 1 if dry and phase == "ops" else 2]  # ops of a step are a hundred
        command = [*BENCH, "--level", phase.removesuffix("s"), "--model", *models, "--mode", *modes, *where]
        command += ["--output", str(results), "--name", path.stem, "--resume"]
        command += ["--dry", "--contenders", "eager*", "ours*", "fused*", "frozen*"] if dry else options.split()
        add(phase, title, command, left=lambda log: left_out(path), budget=True)

    for batch in BATCH_SIZES[-1:] if dry else BATCH_SIZES:
        options = f"--batch-size {batch} --rounds 7 --min-seconds 0.02 --without torch.compile ours*reference"
        bench("ops", f"batch {batch}", NETWORKS[:1] if dry else NETWORKS, options)
    for name in NETWORKS[:1] if dry else BLOCK_NETWORKS:
        bench("blocks", name, [name], "--batch-size 32 256 --rounds 9 --min-seconds 0.05")
    for name in NETWORKS[:1] if dry else MODEL_NETWORKS:
        bench("models", name, [name], "--batch-size 1 32 256 --rounds 9 --min-seconds 0.2")
    tune = "--dry --device cpu" if dry else "--mode inference training"
    for name in NETWORKS[:1] if dry else NETWORKS:
        words = [*python, "fused_resnet", "tune", "--model", name, *tune.split()]
        add("tune", name, [*words, "--output", results / f"plan_{name}.json"], left=left_in_log, budget=True)
    files = of_the_newest_condition(result_files(results))
    report = [*BENCH, "report", *files, "--output", results, "--name", "report"]
    add("report", "report", report, None if files else "there are no results yet", repeated=True)
    return found


def _gpu_tests() -> list[str]:
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [p for p in found if p.parent.name in ("kernels", "cuda") or "pytest.mark.gpu" in p.read_text()]
    return [path.relative_to(ROOT).as_posix() for path in marked]


def result_files(results: Path) -> list[Path]:
    """What `bench` has saved, as far as there is any."""
    return [path for phase in ("ops", "blocks", "models") for path in sorted(results.glob(f"{phase}_*.json"))]


def of_the_newest_condition(paths: Sequence[Path]) -> list[Path]:
    """Those that one report can tell of; a later machine may have another CPU or driver."""
    found: dict[Path, Result] = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the summary names those it cannot read
            found[path] = Result.load(path)
    newest = max(found.values(), key=lambda result: str(result.machine.get("date")), default=None)
    return [path for path, result in found.items() if newest is not None and same(newest, result)]


def left_out(path: Path) -> str | None:
    """What a run of ``bench`` had no time for, in words; None if nothing."""
    if not path.exists():
        return "nothing was measured yet"
    result = Result.load(path)
    tasks = sum(line.endswith(NO_TIME) for line in result.arguments.get("left_out", []))
    outcomes = sum(o.reason == NO_TIME for m in result.measurements for o in m.outcomes.values())
    if not tasks and not outcomes and not result.arguments.get("interrupted"):
        return None
    return f"{tasks} measurements and {outcomes} contenders are left for the next call"


def left_in_log(log: Path) -> str | None:
    """What the last run of ``tune`` says it has left; that it was cut off, if it says neither this nor its plan."""
    lines = log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines()
    told = [line for line in lines if line.startswith("left: ")]
    return told[-1] if told else None if any(line.startswith("plan: ") for line in lines) else "it was cut off"


def run(unit: Unit, seconds: float, log: Path, environment: dict[str, str]) -> tuple[str, float, str]:
    """(status, seconds it took, a line on it), its output appended to the log. At the limit it is asked to stop, as by
    Ctrl-C, and ended with its children if it does not."""
    if unit.why_skipped is not None:
        return SKIPPED, 0.0, unit.why_skipped
    log.parent.mkdir(parents=True, exist_ok=True)
    limit = ["--budget", str(int(max(1.0, seconds - TIME_TO_SAVE)))] if unit.budget else []
    start, status = time.monotonic(), None
    with log.open("a") as output:
        output.write(f"$ {' '.join([*unit.words, *limit])}\n")
        output.flush()
        begin = output.tell()
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        # a shell lets what it runs in the background ignore interrupts, and its children with it
        settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        settings["env"] = {**os.environ, **environment, **unit.environment}
        try:
            process = subprocess.Popen([*unit.words, *limit], cwd=ROOT, start_new_session=True, **settings)
        except OSError as error:
            return FAILED, time.monotonic() - start, str(error)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=max(1.0, seconds))
        finally:
            _stop(process)
    took, said = time.monotonic() - start, last_line(log, begin)
    if status is None and unit.left is None:
        return UNFINISHED, took, f"its {seconds:.0f} s were up; {said}"
    if status == CALL_AGAIN:
        return UNFINISHED, took, said
    if status is not None and status not in unit.fine:
        return FAILED, took, f"exit status {status}; {said}"
    if unit.left is not None and (left := unit.left(log)) is not None:
        return UNFINISHED, took, left
    return DONE, took, said if status is not None else "all is measured; there was no time for its page"


def _stop(process: subprocess.Popen[Any]) -> None:
    """Ends the command and whatever it has started, if it is still there."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TIME_TO_SAVE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own: its children only
    process.wait()


def last_line(log: Path, begin: int = 0) -> str:
    """What the command said last, as far as it says something."""
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1][:200] if lines else "it said nothing"


def fingerprint(root: Path = ROOT) -> str:
    """Twelve digits that change with the package's sources; there may be no git on a closed machine."""
    digest = hashlib.sha256()
    files = [path for folder in ("fused_resnet", "kernels", "csrc") for path in sorted((root / folder).rglob("*"))]
    for path in files:
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def write_summary(work: Path, state: dict[str, dict[str, Any]], dry: bool) -> None:
    """summary.md: what ran, what failed, how the best of ours compares, and whose numbers were wrong."""
    parts = ["# What this machine said", *(["A dry run: nothing below is a measurement."] if dry else [])]
    rows = []
    for phase in dict.fromkeys(name.partition("/")[0] for name in state):
        entries = [entry for name, entry in state.items() if name.startswith(f"{phase}/")]
        counts = [sum(e["status"] == status for e in entries) for status in (DONE, FAILED, UNFINISHED, SKIPPED)]
        rows.append([phase, *map(str, counts), f"{sum(entry['seconds'] for entry in entries):.0f}"])
    parts.append(figures.text_table(["phase", DONE, FAILED, UNFINISHED, SKIPPED, "seconds"], rows))
    lines = [f"- {name}: {e['status']}; {e['note']}" for name, e in state.items() if e["status"] != DONE]
    now = fingerprint()
    if old := [name for name, e in state.items() if e["status"] == DONE and e["sources"] != now]:
        lines.append(f"- done with other sources of the package (--again does them anew): {', '.join(old)}")
    results: list[Result] = []
    for path in result_files(work / "results"):
        try:
            results.append(Result.load(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            lines.append(f"- {path.name} cannot be read: {error}")
    found = tables.in_order([measurement for result in merged(results) for measurement in result.measurements])
    headline = tables.headline([measurement for measurement in found if measurement.level != OP])
    parts += ["\n".join(lines)] if lines else []
    parts.append(figures.text_table(headline.header, [[cell.text for cell in row] for row in headline.rows]))
    ratios: dict[tuple[str, int], list[float]] = {}
    for entry in [measurement for measurement in found if measurement.level == OP]:
        if (eager := figures.best_eager(entry)) is not None:
            for name in filter(figures.is_ours, figures.right_timings(entry)):
                ratio = figures.times_faster(entry, name, eager)
                ratios.setdefault((name, entry.batch_size), []).append(ratio)
    if ratios:
        each = [[*map(str, key), str(len(some)), f"{geometric_mean(some):.2f}x"] for key, some in ratios.items()]
        parts.append(figures.text_table(["ops by", "batch", "ops", "mean to eager"], each))
    wrong = [line for line in tables.reasons(found) if f" {ABSENT}, " not in line]
    parts.append("\n".join([f"{len(wrong)} contenders wrong or failed.", *(f"- {line}" for line in wrong[:40])]))
    (work / "summary.md").write_text("\n\n".join(parts) + "\n")


def pack(work: Path, output: Path) -> None:
    """Writes the archives of a working folder and copies what is looked at first; says what was too large."""
    output.mkdir(parents=True, exist_ok=True)
    for name, of_caches in ARCHIVES.items():
        unfinished = output / f"{name}.unfinished"
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in sorted(work.iterdir()):
                if (path.name in CACHES) == of_caches:
                    archive.add(path, arcname=path.name)
        if unfinished.stat().st_size > LARGEST:
            print(f"{name} is {unfinished.stat().st_size / 2**20:.0f} MiB and was left out", flush=True)
            unfinished.unlink()
        else:
            unfinished.replace(output / name)
    for path in (work / "summary.md", work / "results" / "report.html"):
        if path.exists():
            shutil.copyfile(path, output / path.name)


def unpack(source: Path, work: Path) -> None:
    """Puts what an earlier call has packed into a working folder that has no state yet.

    Raises:
        ValueError: the source has none of the archives.
    """
    found = [source / name for name in ARCHIVES if (source / name).exists()]
    if not found:
        raise ValueError(f"--from must be a folder with one of {', '.join(ARCHIVES)} in it; got {source}")
    for path in [] if (work / "state.json").exists() else found:
        with tarfile.open(path) as archive:
            archive.extractall(work, filter="data")


def parse(words: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks/run_gpu.sh", description=__doc__, formatter_class=raw)
    add, environ = parser.add_argument, os.environ
    add("phases", nargs="*", metavar="PHASE", help=f"{', '.join(BUDGETS)} (default: all, in this order)")
    add("--dry", action="store_true", help="without a GPU: tiny shapes on the reference; nothing is built")
    output = Path(environ.get("OUT") or "gpu_results")
    add("--output", type=Path, default=output, metavar="FOLDER", help="(default: $OUT, else gpu_results)")
    usual = ", ".join(f"{phase} {seconds}" for phase, seconds in BUDGETS.items())
    budget_help = f"of a phase in this call, such as ops=420 (default: BUDGET_ops, else {usual})"
    add("--budget", nargs="+", default=[], metavar="PHASE=SECONDS", help=budget_help)
    add("--total", type=float, default=float(environ.get("BUDGET") or TOTAL), metavar="SECONDS")
    add("--again", nargs="+", choices=BUDGETS, default=[], metavar="PHASE", help="do anew what was done before")
    add("--pack", action="store_true", help="leave four files in the output folder, and work elsewhere")
    add("--from", dest="source", type=Path, metavar="FOLDER", help="begin from what --pack has left")
    arguments = parser.parse_args(words)
    for phase in arguments.phases:
        if phase not in BUDGETS:
            parser.error(f"a phase is one of {', '.join(BUDGETS)}; got {phase!r}")
    arguments.budgets = {phase: float(environ.get(f"BUDGET_{phase}") or seconds) for phase, seconds in BUDGETS.items()}
    for text in arguments.budget:
        phase, _, seconds = text.partition("=")
        if phase not in BUDGETS or not seconds.replace(".", "", 1).isdecimal():
            parser.error(f"a budget is a phase and its seconds, such as ops=420; got {text!r}")
        arguments.budgets[phase] = float(seconds)
    return arguments


def main(words: list[str] | None = None, make_units: Callable[[Path, bool], list[Unit]] = units) -> int:
    """The exit status: 0 if all is done, 1 if something failed, 75 if time was up, 130 if it was stopped."""
    arguments = parse(words)
    work = WORK if arguments.pack else arguments.output
    work.mkdir(parents=True, exist_ok=True)
    path = work / "state.json"
    try:
        if arguments.source is not None:
            unpack(arguments.source, work)
        state: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        state = {name: e for name, e in state.items() if name.partition("/")[0] not in arguments.again}
        assert all(set(entry) == {"status", "seconds", "tries", "note", "sources"} for entry in state.values())
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        print(f"run_gpu: {path} or its archive cannot be used; remove it to begin anew ({error})", file=sys.stderr)
        return UNUSABLE
    (work / ".gitignore").write_text("*\n")  # results of a visit are copied to benchmarks/results by hand
    environment = {"TRITON_CACHE_DIR": str(work / CACHES[0]), "TORCHINDUCTOR_CACHE_DIR": str(work / CACHES[1])}
    environment |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"} | ({"OMP_NUM_THREADS": "1"} if arguments.dry else {})
    call_end, late, failed = time.monotonic() + arguments.total, False, list[str]()

    def keep(unit: Unit, status: str, seconds: float, note: str) -> None:
        before = state.get(unit.name, {"seconds": 0.0, "tries": 0})
        tries, seconds = before["tries"] + (status != SKIPPED), before["seconds"] + seconds
        entry = {"status": status, "seconds": seconds, "tries": tries, "note": note, "sources": fingerprint()}
        state[unit.name] = entry
        path.with_suffix(".unfinished").write_text(json.dumps(state, indent=1) + "\n")
        path.with_suffix(".unfinished").replace(path)
        write_summary(work, state, arguments.dry)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for phase in [phase for phase in BUDGETS if phase in (arguments.phases or BUDGETS)]:
            end = min(call_end, time.monotonic() + arguments.budgets[phase])
            for unit in [unit for unit in make_units(work, arguments.dry) if unit.phase == phase]:
                left = end - time.monotonic()
                if not unit.repeated and state.get(unit.name, {}).get("status") == DONE:
                    print(f"{unit.name}: done before", flush=True)
                elif unit.why_skipped is None and left < LEAST:
                    late = True
                    print(f"{unit.name}: no time left", flush=True)
                else:
                    print(f"{unit.name}: at most {left:.0f} s", flush=True)
                    log = work / "logs" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', unit.name)}.log"
                    status, seconds, note = run(unit, left, log, environment)
                    keep(unit, status, seconds, note)
                    print(f"{unit.name}: {status} in {seconds:.0f} s; {note}", flush=True)
                    late, failed = late or status == UNFINISHED, failed + ([unit.name] if status == FAILED else [])
            write_summary(work, state, arguments.dry)
            if arguments.pack:
                pack(work, arguments.output)
    except KeyboardInterrupt:
        print("stopped; the next call goes on from here")
        return 130
    print(f"wrote {work / 'summary.md'}{'; failed: ' + ', '.join(failed) if failed else ''}")
    return SOMETHING_FAILED if failed else CALL_AGAIN if late else OK


if __name__ == "__main__":
    raise SystemExit(main())
