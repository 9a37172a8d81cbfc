"""``python -m fused_resnet bench``: is it faster on this machine, by how much, and is it still right?"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench import options, training_ledger
from fused_resnet.bench.report import compare, files
from fused_resnet.bench.report.condition import file_name, reasons_to_start_anew
from fused_resnet.bench.result import BLOCK, FAILED, INFERENCE, LEVELS, MODEL, OP, TRAINING_STEP, WRONG, Result
from fused_resnet.bench.roofline import ROUNDS
from fused_resnet.bench.suite import registry
from fused_resnet.bench.suite.rounds import ONCE, Method
from fused_resnet.bench.suite.runner import INTERRUPTED, LEFT_OUT, Settings, run
from fused_resnet.bench.suite.task import Contender, Task
from fused_resnet.bench.suite.task_lists import block_tasks, model_tasks, op_tasks

COMMANDS: dict[str, tuple[Any, str]] = {
    "compare": (compare, "what changed between two results, beyond noise"),
    "report": (files, "CSV, Markdown and an HTML page again, from saved results"),
    "bytes": (training_ledger, "what a training step moves and keeps in memory; nothing is run"),
}
"""The module of each sub-command, with ``add_arguments`` and ``main``."""
REFUSED, STOPPED = 1, 130
CPU_BATCHES, GPU_BATCHES = ((1, 8), (16,)), ((1, 32, 256), (1, 32, 256))
"""Of inference, of training."""
MODES = {mode.replace(" ", "-"): mode for mode in (INFERENCE, TRAINING_STEP)}
MAKERS: dict[str, Callable[..., Any]] = {MODEL: model_tasks, BLOCK: block_tasks, OP: op_tasks}
DRY_IMAGE, DRY_BATCH = 32, 2


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """What is measured: what was not asked for is chosen for the device. Plain values, as a result's arguments are;
    batch sizes by mode."""
    device, modes = options.find_device(arguments.device), [MODES[mode] for mode in arguments.mode or MODES]
    usual = {mode: (GPU_BATCHES if device.type == "cuda" else CPU_BATCHES)[mode != INFERENCE] for mode in modes}
    chosen = {
        "device": str(device),
        "model": list(dict.fromkeys(arguments.model or ["resnet18" if arguments.dry else "resnet50"])),
        "level": list(dict.fromkeys(arguments.level or [MODEL])),
        "dtype": list(dict.fromkeys(arguments.dtype or ["float32"])),
        "image_size": arguments.image_size or (DRY_IMAGE if arguments.dry else 224),
        "batch_size": {
            mode: sorted(set(arguments.batch_size or ([DRY_BATCH] if arguments.dry else usual[mode]))) for mode in modes
        },
    }
    return argparse.Namespace(**vars(arguments) | chosen)


def method_for(arguments: argparse.Namespace) -> Method:
    """How long to measure. On a GPU nobody's threads are in the way of the next one, so nobody waits for them."""
    method = Method(pause=0.0) if arguments.device.startswith("cuda") else Method()
    if arguments.dry:
        method = ONCE
    given = {name: getattr(arguments, name) for name in ("rounds", "min_seconds")}
    method = replace(method, **{name: value for name, value in given.items() if value is not None})
    return replace(method, most_rounds=max(method.rounds, method.most_rounds))


def make_tasks(chosen: argparse.Namespace) -> list[Task]:
    """The tasks, those of a model beside each other, with growing batch sizes; dry, of the blocks of a model and of the
    shapes of an op the first only."""
    where, once = (torch.device(chosen.device), chosen.image_size), dict[tuple[object, ...], Task]()
    for name, level in itertools.product(chosen.model, chosen.level):
        for (mode, sizes), dtype in itertools.product(chosen.batch_size.items(), chosen.dtype):
            for task in MAKERS[level]([name], [mode], sizes, [getattr(torch, dtype)], *where):
                # "bn_apply" of "bn_apply 64x56x56", "resnet18" of "resnet18 layer1.0"; models share the shapes of ops
                subject = task.subject.split()[0] if chosen.dry else task.subject
                key = (task.level, subject, task.mode, task.batch_size, task.dtype, task.image_size)
                once.setdefault(key, task)
    return list(once.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run, and the sub-commands."""

    def several(group: Any, name: str, metavar: str, text: str, **settings: Any) -> None:
        group.add_argument(name, nargs="+", metavar=metavar, help=text, **settings)

    positive, seconds = options.positive, options.seconds
    what = parser.add_argument_group("what is measured")
    several(what, "--model", "NAME", "torchvision's or timm's names, or module:callable (default: resnet50)")
    several(what, "--level", "LEVEL", "op, block, model (default: model)", choices=LEVELS)
    several(what, "--mode", "MODE", f"{' and '.join(MODES)} (default: both)", choices=MODES)
    batch_help = "images (default: inference 1 8 and training 16; on a GPU 1 32 256)"
    several(what, "--batch-size", "N", batch_help, type=positive)
    dtype_help = f"of activations: {', '.join(options.DTYPES)} (default: float32)"
    several(what, "--dtype", "DTYPE", dtype_help, choices=options.DTYPES)
    size_help = "of an image's side (default: 224)"
    what.add_argument("--image-size", type=options.image_size, metavar="PIXELS", help=size_help)
    who = parser.add_argument_group("who takes part")
    several(who, "--contenders", "PATTERN", "such as 'eager*' onnxruntime (default: all)")
    several(who, "--without", "PATTERN", "such as 'torch.compile*'")
    how = parser.add_argument_group("where and how")
    how.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    how.add_argument("--threads", type=positive, metavar="N", help="of PyTorch on the CPU (default: its choice)")
    how.add_argument("--rounds", type=positive, metavar="N", help="measured rounds, at least (default: 15)")
    seconds_help = "each contender is timed for at least so long, in up to 60 rounds (default: 2)"
    how.add_argument("--min-seconds", type=seconds, metavar="SECONDS", help=seconds_help)
    how.add_argument("--budget", type=seconds, metavar="SECONDS", help="for the whole run; says what it left out")
    how.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    how.add_argument("--dry", action="store_true", help="tiny shapes, one round: does it run? Measures nothing")
    where = parser.add_argument_group("what is written")
    output_help = "folder (default: %(default)s)"
    where.add_argument("--output", type=Path, default=Path("bench_results"), metavar="FOLDER", help=output_help)
    where.add_argument("--name", help="of the files, without an ending (default: the condition)")
    resume_help = "go on with the file of an earlier run of the same condition and commit"
    where.add_argument("--resume", action="store_true", help=resume_help)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands instead of a run")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(bench_command=module.main)


def main(arguments: argparse.Namespace) -> int:
    """Runs; the exit status: 0, 1 when it cannot run as asked (or, dry, where somebody is wrong or fails), 130 when
    stopped by Ctrl-C; a sub-command's is its own.

    What was measured until then is on disk in any case.
    """
    if (command := getattr(arguments, "bench_command", None)) is not None:
        return command(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if missing := options.missing_packages("bench", {"rich": "rich"}):
            raise ValueError(missing)
        chosen = with_defaults(arguments)
        contenders, tasks = registry.select(arguments.contenders, arguments.without), make_tasks(chosen)
        settings = _settings(chosen, contenders)
        name = arguments.name or ("dry_" if arguments.dry else "") + file_name(vars(chosen), torch.get_num_threads())
        path = arguments.output / f"{name}.json"
        before = _earlier(path, arguments.resume, settings)
    except (OSError, ValueError, ImportError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return REFUSED
    return _run(tasks, contenders, settings, path, before)


def _settings(chosen: argparse.Namespace, contenders: list[Contender]) -> Settings:
    """With what was asked for and what was chosen, for JSON."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
    names = {"contenders": [contender.name for contender in contenders]}
    return Settings(
        device=torch.device(chosen.device),
        method=method_for(chosen),
        budget=math.inf if chosen.budget is None else chosen.budget,
        seed=chosen.seed,
        ceiling_rounds=0 if chosen.dry else ROUNDS,
        arguments={name: value for name, value in plain.items() if name not in ("run", "command")} | names,
    )


def _earlier(path: Path, resume: bool, settings: Settings) -> Result | None:
    """The result to go on with; one that is not gone on with is kept beside the new one."""
    if not path.exists():
        return None
    reasons: list[str] = []
    if resume:
        before = Result.load(path)
        if not (reasons := reasons_to_start_anew(before, settings.new_result())):
            return before
    previous = path.with_name(f"{path.stem}.previous.json")
    path.replace(previous)
    if reasons:
        print(f"--resume: measured anew, for the earlier result, now {previous}, is of {', '.join(reasons)}")
    return None


def _run(tasks: list[Task], contenders: list[Contender], settings: Settings, path: Path, before: Result | None) -> int:
    from fused_resnet.bench.console import make_console
    from fused_resnet.bench.suite.progress import BenchProgress

    console = make_console()
    if settings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for all contenders, as people who care for speed set it
    torch.manual_seed(settings.seed)
    with BenchProgress(console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers, by the dozen; what they could not do is a reason
        result = run(tasks, contenders, settings, progress, save=lambda so_far: so_far.save(path), before=before)
    stopped = bool(result.arguments.get(INTERRUPTED))
    lines = [f"not measured: {line}" for line in result.arguments[LEFT_OUT]]
    lines += ["Stopped. With --resume it goes on from here."] if stopped else []
    written = files.write_all(result, path.parent, path.stem)
    for line in [*lines, *(f"wrote {each}" for each in written)]:
        console.print(line, markup=False, soft_wrap=True)
    if result.arguments.get("dry"):
        statuses = {outcome.status for entry in result.measurements for outcome in entry.outcomes.values()}
        return REFUSED if statuses & {WRONG, FAILED} else 0
    return STOPPED if stopped else 0
