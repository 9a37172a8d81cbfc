"""What each phase does: the units of a run on a GPU, and of a dry one."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.state import ROOT
from benchmarks.gpu.unit import LOGS, PYTHON, Unit, log_name

PHASES = ("build", "test", "ops", "blocks", "models", "tune", "report")
BUDGETS = {"build": 300, "test": 420, "ops": 420, "blocks": 360, "models": 420, "tune": 300, "report": 150}
"""Seconds of a phase in one call."""
TOTAL = 540
"""Seconds of one call: where commands are cut after ten minutes, it ends by itself before."""
NETWORKS = ("resnet18", "resnet50")
BLOCK_NETWORKS = (*NETWORKS, "resnext50_32x4d")
MODEL_NETWORKS = ("resnet50", "resnet18", "resnext50_32x4d", "resnet152", "wide_resnet50_2")
DTYPE = "bfloat16"
BATCH_SIZES = (256, 32, 1)
MODES = ("inference", "training-step")
FUSED = "fused_resnet"
JOBS = os.cpu_count() or 1

Command = Callable[[float], list[str]]


def units(work: Path, dry: bool) -> list[Unit]:
    """All of them, in their order.

    Args:
        work: the working folder; results go into ``results`` in it.
        dry: no GPU is there, nothing is compiled, and shapes are tiny.
    """
    results = work / "results"
    phases = [_build(dry), _test(dry), _ops(results, dry), _blocks(results, dry), _models(results, dry)]
    return [unit for phase in [*phases, _tune(work, dry), _report(results)] for unit in phase]


def _build(dry: bool) -> list[Unit]:
    make = ["make", "--no-print-directory", "build", "VENV=", f"PYTHON={PYTHON}"]
    compile_kernels = ["benchmarks.gpu.kernels", "--jobs", str(2 if dry else JOBS)]
    if dry:
        compile_kernels += ["--model", "resnet18", "--batch-size", "2", "--image-size", "32", "--dtype", "float32"]
        compile_kernels += ["--backend", "reference", "--device", "cpu"]
    else:
        compile_kernels += ["--model", *BLOCK_NETWORKS, "--batch-size", *map(str, BATCH_SIZES), "--dtype", DTYPE]
    return [
        Unit(
            "build",
            "extension",
            lambda seconds: make,
            why_skipped="a dry run takes what is built already" if dry else None,
            repeated=True,
            environment={"MAX_JOBS": str(JOBS)},
        ),
        Unit("build", "info", lambda seconds: [PYTHON, "-m", FUSED, "info"], repeated=True),
        Unit("build", "kernels", _within(compile_kernels)),
    ]


def _test(dry: bool) -> list[Unit]:
    if dry:
        files = ["tests/bench/test_timer.py"]
    else:
        found = sorted((ROOT / "tests").rglob("test_*.py"))
        files = [
            path.relative_to(ROOT).as_posix()
            for path in found
            if path.parent.name in ("kernels", "cuda") or "pytest.mark.gpu" in path.read_text()
        ]
    sanitizer = shutil.which("compute-sanitizer")
    why_none = None if sanitizer else "compute-sanitizer is not on the PATH"
    device, backends = ("cpu", ["reference"]) if dry else ("cuda", ["cuda", "triton"])
    found_units = []
    for backend in backends:
        small = [PYTHON, "-m", "benchmarks.gpu.small_ops", "--backend", backend, "--device", device]
        small += ["--dtype", "float32"] if dry else []
        found_units.append(Unit("test", f"small ops, {backend}", _always(small)))
    for file in files:
        command = [PYTHON, "-m", "pytest", "-q", file, "-p", "no:cacheprovider"]
        if not dry and not file.startswith("tests/kernels"):
            command += ["-m", "gpu"]
        found_units.append(Unit("test", file, _always(command), fine=(0, 5)))  # 5: nothing is marked so in it
    for backend in backends:
        for tool in ("memcheck", "racecheck"):
            small = [PYTHON, "-m", "benchmarks.gpu.small_ops", "--backend", backend, "--device", device]
            words = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small]
            why = "a dry run has no device to watch" if dry else why_none
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that it sees the ends of tensors
            title = f"{tool}, {backend}"
            found_units.append(Unit("test", title, _always(words), why_skipped=why, environment=environment))
    return found_units


def _ops(results: Path, dry: bool) -> list[Unit]:
    launch = [PYTHON, "-m", "benchmarks.bench_launch", "--rounds", "20", "--output", str(results / "launch.json")]
    why = "there are no launches in a dry run; tests/bench/test_bench_launch.py runs it" if dry else None
    without = ["--without", "torch.compile", "ours reference"]
    words = ["--level", "op", "--model", *(NETWORKS[:1] if dry else NETWORKS)]
    found = [
        _bench(results, f"ops_batch{batch}", f"batch {batch}", "ops", dry, words)(
            ["--batch-size", str(batch), "--rounds", "7", "--min-seconds", "0.02", *without]
        )
        for batch in ((2,) if dry else BATCH_SIZES)
    ]
    return [Unit("ops", "launch", _always(launch), why_skipped=why), *found]


def _blocks(results: Path, dry: bool) -> list[Unit]:
    return [
        _bench(results, f"blocks_{name}", name, "blocks", dry, ["--level", "block", "--model", name])(
            ["--batch-size", "32", "256", "--rounds", "9", "--min-seconds", "0.05"]
        )
        for name in (NETWORKS[:1] if dry else BLOCK_NETWORKS)
    ]


def _models(results: Path, dry: bool) -> list[Unit]:
    return [
        _bench(results, f"models_{name}", name, "models", dry, ["--level", "model", "--model", name])(
            ["--batch-size", "1", "32", "256", "--rounds", "9", "--min-seconds", "0.2"]
        )
        for name in (NETWORKS[:1] if dry else MODEL_NETWORKS)
    ]


def _tune(work: Path, dry: bool) -> list[Unit]:
    found = []
    for name in NETWORKS[:1] if dry else NETWORKS:
        words = ["tune", "--model", name, "--jobs", str(2 if dry else JOBS)]
        words += ["--output", str(work / "results" / f"plan_{name}.json")]
        words += ["--dry", "--device", "cpu"] if dry else ["--mode", "inference", "training"]
        left = functools.partial(left_in_log, work / LOGS / log_name(f"tune/{name}"))
        found.append(Unit("tune", name, _within([FUSED, *words]), left=left))
    return found


def _report(results: Path) -> list[Unit]:
    def command(seconds: float) -> list[str]:
        files = [str(path) for path in result_files(results)]
        return [PYTHON, "-m", FUSED, "bench", "report", *files, "--output", str(results), "--name", "report"]

    why = None if result_files(results) else "there are no results yet"
    return [Unit("report", "report", command, why_skipped=why, repeated=True)]


def result_files(results: Path) -> list[Path]:
    """What `bench` has saved, as far as there is any."""
    prefixes = ("ops_", "blocks_", "models_")
    return [path for path in sorted(results.glob("*.json")) if path.name.startswith(prefixes)]


def _bench(
    results: Path, file: str, title: str, phase: str, dry: bool, words: list[str]
) -> Callable[[list[str]], Unit]:
    """From the options that a dry run leaves out to a unit that runs ``bench``."""

    def unit(options: list[str]) -> Unit:
        modes = MODES[:1] if dry and phase == "ops" else MODES  # its other tasks are a hundred
        command = ["bench", *words, "--mode", *modes, "--output", str(results), "--name", file, "--resume"]
        if dry:
            command += ["--dry", "--device", "cpu", "--contenders", *DRY_CONTENDERS[phase]]
        else:
            command += ["--device", "cuda", "--dtype", DTYPE, *options]
        return Unit(phase, title, _within([FUSED, *command]), left=lambda: left_out(results / f"{file}.json"))

    return unit


DRY_CONTENDERS = {
    "ops": ["eager", "ours*"],
    "blocks": ["eager*", "ours*", "fused*", "frozen*"],
    "models": ["eager*", "ours*", "fused*", "frozen*"],
}


def left_out(path: Path) -> str | None:
    """What a run of ``bench`` had no time for, in words; None if nothing."""
    from fused_resnet.bench.result import Result
    from fused_resnet.bench.suite.measure import NO_TIME

    if not path.exists():
        return "nothing was measured yet"
    result = Result.load(path)
    tasks = [line for line in result.arguments.get("left_out", []) if line.endswith(NO_TIME)]
    outcomes = sum(o.reason == NO_TIME for m in result.measurements for o in m.outcomes.values())
    if not tasks and not outcomes and not result.arguments.get("interrupted"):
        return None
    return f"{len(tasks)} measurements and {outcomes} contenders are left for the next call"


def left_in_log(log: Path) -> str | None:
    """What the last run of ``tune`` says it has left; that it was cut off, if it says neither this nor its plan."""
    words = log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines()
    told = [line for line in words if line.startswith("left: ")]
    if told:
        return told[-1]
    return None if any(line.startswith("plan: ") for line in words) else "it was cut off"


def _within(words: list[str]) -> Command:
    """A module with ``--budget``, which ends by itself when its seconds are over."""
    return lambda seconds: [PYTHON, "-m", *words, "--budget", str(int(seconds))]


def _always(words: list[str]) -> Command:
    return lambda seconds: words
