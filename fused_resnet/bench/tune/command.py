"""``python -m fused_resnet tune``: measures backends and tiles for a model's shapes here, and keeps the plan."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from fused_resnet.bench.contenders import builder_names
from fused_resnet.bench.tune.compile import compile_all
from fused_resnet.bench.tune.measure import DRY_METHOD, METHOD
from fused_resnet.bench.tune.run import tune, unknown
from fused_resnet.bench.tune.sites import MODES, Selection, subjects
from fused_resnet.ops.plan import measured_plan, plan_file
from fused_resnet.ops.plan.measured_plan import ignoring_measured_plan
from fused_resnet.ops.plan.plan_file import NotAPlan

DTYPES = ("float32", "bfloat16", "float16")
BATCH_SIZES = {
    "cpu": {"inference": (1, 8), "training": (16,)},
    "cuda": {"inference": (1, 32, 256), "training": (256,)},
}
DRY_BATCH_SIZE, DRY_IMAGE_SIZE, DRY_TILES = 2, 32, 1
SMALLEST_IMAGE = 32
MOST_JOBS = 16
COMPILE_SHARE = 0.5
"""Of the budget, at most."""
REFUSED, INTERRUPTED = 1, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    models = builder_names()
    add(
        "--model",
        nargs="+",
        action="extend",
        choices=models,
        metavar="NAME",
        help=f"{', '.join(models)} (default: resnet50)",
    )
    add("--mode", nargs="+", choices=MODES, help="inference, training (default: inference)")
    add(
        "--batch-size",
        nargs="+",
        type=_positive,
        metavar="N",
        help="images (default: inference 1 8, training 16; on a GPU 1 32 256 and 256)",
    )
    add("--dtype", nargs="+", choices=DTYPES, help="of activations (default: float32; on a GPU bfloat16)")
    add("--image-size", type=_image_size, default=224, metavar="PIXELS", help="of a side (default: %(default)s)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    add("--threads", type=_positive, metavar="N", help="of PyTorch on the CPU: a plan for each (default: its choice)")
    jobs_help = f"processes that compile Triton's kernels (default: one for each core, {MOST_JOBS} at most)"
    add("--jobs", type=_positive, metavar="N", help=jobs_help)
    add("--budget", type=_seconds, metavar="SECONDS", help="for everything; what is left is measured by the next run")
    add("--output", type=Path, metavar="FILE", help="(default: the user's plan, which is used from then on)")
    add("--again", action="store_true", help="measure what the plan has already, too")
    add("--dry", action="store_true", help="tiny shapes, one round, nothing kept: does it run?")


def main(arguments: argparse.Namespace) -> int:
    """The exit status: 0, 1 when it cannot run as asked, 130 when stopped by Ctrl-C."""
    end = time.monotonic() + (arguments.budget or math.inf)
    if importlib.util.find_spec("rich") is None:
        return _refuse("needs rich: pip install 'fused_resnet[bench]' (or pip install rich)")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        measured_plan.reload()
    try:
        selection = select(arguments)
    except ValueError as error:
        return _refuse(str(error))
    if not arguments.dry:
        return _run(arguments, selection, arguments.output, end)
    with tempfile.TemporaryDirectory() as folder:
        return _run(arguments, selection, Path(folder, "plan.json"), end)


def select(arguments: argparse.Namespace) -> Selection:
    """What the arguments ask for.

    Raises:
        ValueError: the device is not here, or is none that is tuned for.
    """
    device = _device(arguments.device)
    batch_sizes = BATCH_SIZES[device.type]
    modes = tuple(dict.fromkeys(arguments.mode or ["inference"]))
    image_size = arguments.image_size
    if arguments.dry:
        batch_sizes, image_size = dict.fromkeys(MODES, (DRY_BATCH_SIZE,)), DRY_IMAGE_SIZE
    if arguments.batch_size:
        batch_sizes = dict.fromkeys(MODES, tuple(dict.fromkeys(arguments.batch_size)))
    return Selection(
        models=tuple(dict.fromkeys(arguments.model or ["resnet50"])),
        modes=modes,
        batch_sizes=tuple((mode, batch_sizes[mode]) for mode in modes),
        dtypes=tuple(dict.fromkeys(arguments.dtype or ["float32" if device.type == "cpu" else "bfloat16"])),
        device=str(device),
        image_size=image_size,
        most_tiles=DRY_TILES if arguments.dry else None,
    )


def _run(arguments: argparse.Namespace, selection: Selection, path: Path | None, end: float) -> int:
    from fused_resnet.bench.suite.progress import make_console
    from fused_resnet.bench.tune.show import TuneProgress, summary, table

    console, device = make_console(), torch.device(selection.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as people who care for speed set it
    try:
        known = measured_plan.decisions(device, path)
        plan = path or measured_plan.plan_path(device)
        plan_file.check_writable(plan)
    except (NotAPlan, OSError) as error:
        return _refuse(str(error))
    tiles = {key: decision.winner for (op, key), decision in known.items() if op == measured_plan.TILES}
    with ignoring_measured_plan():
        everything = subjects(selection, tiles)
        wanted = [*range(len(everything))] if arguments.again else unknown(everything, known)
    jobs = arguments.jobs or min(os.cpu_count() or 1, MOST_JOBS)
    compiled = [index for index in wanted if everything[index].compiles] if device.type == "cuda" and jobs > 1 else []
    if compiled:
        with TuneProgress(console, f"compiling, {jobs} at a time", len(compiled)) as progress:
            left = COMPILE_SHARE * (end - time.monotonic())
            compile_all(selection, compiled, jobs, seconds=left, after_each=progress.advance)
    with TuneProgress(console, "measuring", len(wanted)) as progress:
        try:
            outcome = tune(
                [everything[index] for index in wanted],
                tiles,
                path,
                method=DRY_METHOD if arguments.dry else METHOD,
                seconds=end - time.monotonic(),
                begin=progress.begin,
                finish=progress.finish,
            )
        except OSError as error:
            return _refuse(f"the plan cannot be written: {error}")
    if outcome.found:
        console.print(table(outcome.found))
    for line in summary(outcome, len(everything) - len(wanted), plan):
        console.print(line, markup=False, soft_wrap=True)
    if arguments.dry:
        console.print("dry: tiny shapes in one round, and nothing is kept")
        return REFUSED if outcome.failed else 0
    return INTERRUPTED if outcome.interrupted else 0


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in BATCH_SIZES:
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise ValueError(f"--device {name} is not here: PyTorch finds {torch.cuda.device_count()} GPUs")
    return device


def _refuse(message: str) -> int:
    print(f"python -m fused_resnet tune: {message}", file=sys.stderr)
    return REFUSED


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def _image_size(text: str) -> int:
    number = _positive(text)
    if number < SMALLEST_IMAGE:
        raise argparse.ArgumentTypeError(f"must be at least {SMALLEST_IMAGE}; got {number}")
    return number


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0; got {text!r}")
    return seconds
