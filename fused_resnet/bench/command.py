"""``python -m fused_resnet bench``: is it faster on this machine, by how much, and is it still right?"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.result import LEVELS, MODES, Result
from fused_resnet.bench.roofline import ROUNDS
from fused_resnet.bench.suite import selections
from fused_resnet.bench.suite.condition import file_name
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.runner import INTERRUPTED, LEFT_OUT, Settings, reasons_to_start_anew, run
from fused_resnet.bench.suite.task import Task

COMMANDS = {
    "compare": ("fused_resnet.bench.report.compare", "what changed between two results, beyond noise"),
    "report": ("fused_resnet.bench.report.command", "CSV, Markdown and an HTML page again, from saved results"),
    "bytes": ("fused_resnet.bench.byte_tables", "what a training step moves through memory, and keeps; nothing is run"),
}
"""The module of each sub-command, with ``add_arguments`` and ``main``, imported when it is asked for."""
DTYPES = ("float32", "bfloat16", "float16")
REFUSED, STOPPED = 1, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run, and the sub-commands."""
    what = parser.add_argument_group("what is measured")
    model_help = "torchvision's or timm's names, or module:callable (default: resnet50)"
    what.add_argument("--model", nargs="+", metavar="NAME", help=model_help)
    what.add_argument("--level", nargs="+", choices=LEVELS, metavar="LEVEL", help="op, block, model (default: model)")
    modes = [mode.replace(" ", "-") for mode in MODES]
    mode_help = f"{', '.join(modes)} (default: {modes[0]} and {modes[-1]})"
    what.add_argument("--mode", nargs="+", choices=modes, metavar="MODE", help=mode_help)
    batch_help = "images (default: inference 1 8 and training 16; on a GPU 1 32 256)"
    what.add_argument("--batch-size", nargs="+", type=_positive, metavar="N", help=batch_help)
    what.add_argument("--sweep", action="store_true", help="double the batch size until memory or patience ends")
    what.add_argument("--latency", action="store_true", help="inference at batch 1 only")
    dtype_help = f"of activations: {', '.join(DTYPES)} (default: float32)"
    what.add_argument("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE", help=dtype_help)
    what.add_argument("--image-size", type=_image_size, metavar="PIXELS", help="of an image's side (default: 224)")
    who = parser.add_argument_group("who takes part")
    who.add_argument("--contenders", nargs="+", metavar="PATTERN", help="such as 'eager*' onnxruntime (default: all)")
    who.add_argument("--without", nargs="+", metavar="PATTERN", help="such as '*max-autotune*'")
    who.add_argument("--list", action="store_true", help="who there is, and why some are absent here; then end")
    how = parser.add_argument_group("where and how")
    how.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    how.add_argument("--threads", type=_positive, metavar="N", help="of PyTorch on the CPU (default: its choice)")
    how.add_argument("--rounds", type=_positive, metavar="N", help="measured rounds, at least (default: 15)")
    seconds_help = "each contender is timed for at least so long, in up to 60 rounds (default: 2)"
    how.add_argument("--min-seconds", type=_seconds, metavar="SECONDS", help=seconds_help)
    how.add_argument("--budget", type=_seconds, metavar="SECONDS", help="for the whole run; says what it left out")
    how.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    how.add_argument("--quick", action="store_true", help="a small selection, in about a minute")
    how.add_argument("--dry", action="store_true", help="tiny shapes, one round: does it run? Measures nothing")
    where = parser.add_argument_group("what is written")
    output_help = "folder (default: %(default)s)"
    where.add_argument("--output", type=Path, default=Path("bench_results"), metavar="FOLDER", help=output_help)
    where.add_argument("--name", help="of the files, without an ending (default: the condition)")
    resume_help = "go on with the file of an earlier run of the same condition and commit"
    where.add_argument("--resume", action="store_true", help=resume_help)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_LateParser, title="commands instead of a run")
    for name, (module, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, description=summary, module=module)


def main(arguments: argparse.Namespace) -> int:
    """Runs; the exit status: 0, 1 when it cannot run as asked, 130 when stopped by Ctrl-C; a sub-command's is its own.

    What was measured until then is on disk in any case.
    """
    if (command := getattr(arguments, "bench_command", None)) is not None:
        return importlib.import_module(command).main(arguments)
    if importlib.util.find_spec("rich") is None:
        return _refuse("needs rich: pip install 'fused_resnet[bench]' (or pip install rich)")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        selection = selections.select(arguments)
        contenders = selections.make_contenders(arguments)
        tasks = selections.make_tasks(selection)
        method = selections.method_for(arguments, selection.device)
    except (ValueError, ImportError) as error:
        return _refuse(str(error))
    if arguments.list:
        return _list(tasks, contenders)
    name = arguments.name or _name(arguments, selection)
    path = arguments.output / f"{name}.json"
    try:
        before = Result.load(path) if arguments.resume and path.exists() else None
    except ValueError as error:
        return _refuse(f"--resume: {error}")
    settings = Settings(
        device=selection.device,
        method=method,
        budget=selections.budget_of(arguments),
        longest_run=selections.SWEEP_SECONDS if selection.sweep else math.inf,
        seed=arguments.seed,
        ceiling_rounds=1 if arguments.dry else ROUNDS,
        arguments=_plain(arguments, selection, contenders),
    )
    reasons = [] if before is None else reasons_to_start_anew(before, settings)
    if path.exists() and (before is None or reasons):
        previous = path.with_name(f"{name}.previous.json")
        path.replace(previous)
        if reasons:
            print(f"--resume: measured anew, for the earlier result, now {previous}, is of {', '.join(reasons)}")
    return _run(tasks, contenders, settings, path, before)


def _run(tasks: list[Task], contenders: list[Contender], settings: Settings, path: Path, before: Result | None) -> int:
    from fused_resnet.bench.suite.progress import BenchProgress, make_console

    console = make_console()
    if settings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # for all contenders, as people who care for speed set it
    torch.manual_seed(settings.seed)
    with BenchProgress(console) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers, by the dozen; what they could not do is a reason
        result = run(tasks, contenders, settings, progress, save=lambda so_far: so_far.save(path), before=before)
    stopped = bool(result.arguments.get(INTERRUPTED))
    for line in result.arguments[LEFT_OUT]:
        console.print(f"not measured: {line}", markup=False, soft_wrap=True)
    if stopped:
        console.print("Stopped. With --resume it goes on from here.")
    for written in importlib.import_module("fused_resnet.bench.report").write_all(result, path.parent, path.stem):
        console.print(f"wrote {written}", markup=False, soft_wrap=True)
    return STOPPED if stopped else 0


def _list(tasks: list[Task], contenders: list[Contender]) -> int:
    """Who there is, and of each kind of task the reasons why somebody is absent."""
    kinds: dict[str, Task] = {}
    for task in tasks:
        kinds.setdefault(f"{task.level}, {task.mode}, {str(task.dtype).removeprefix('torch.')}", task)
    for contender in contenders:
        print(contender.name)
        reasons: dict[str, list[str]] = {}
        for kind, task in kinds.items():
            reasons.setdefault("; ".join(contender.why_absent(task)) or "takes part", []).append(kind)
        for reason, where in reasons.items():
            print(f"    {reason}" if len(reasons) == 1 else f"    {' / '.join(where)}: {reason}")
    return 0


def _name(arguments: argparse.Namespace, selection: selections.Selection) -> str:
    name = file_name(
        selection.device,
        torch.get_num_threads(),
        selection.models,
        selection.levels,
        selection.batch_sizes,
        selection.dtype_names,
        selection.image_size,
    )
    return f"dry_{name}" if arguments.dry else name


def _plain(
    arguments: argparse.Namespace, selection: selections.Selection, contenders: list[Contender]
) -> dict[str, Any]:
    """What was asked for, with what was chosen, for JSON."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    given = {name: value for name, value in given.items() if name not in ("run", "command", "bench_command")}
    return given | {
        "model": list(selection.models),
        "level": list(selection.levels),
        "batch_size": {mode: list(sizes) for mode, sizes in selection.batch_sizes.items()},
        "dtype": selection.dtype_names,
        "device": str(selection.device),
        "image_size": selection.image_size,
        "contenders": [contender.name for contender in contenders],
    }


class _LateParser(argparse.ArgumentParser):
    """A sub-command whose module is imported when its arguments are parsed."""

    def __init__(self, *args: Any, module: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._module: str | None = module
        self.set_defaults(bench_command=module)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        if self._module is not None:
            importlib.import_module(self._module).add_arguments(self)
            self._module = None
        return super().parse_known_args(*args, **kwargs)


def _refuse(reason: str) -> int:
    print(f"bench: {reason}", file=sys.stderr)
    return REFUSED


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be seconds, 0 or more; got {text}")
    return number


def _image_size(text: str) -> int:
    number = int(text)
    if number < selections.SMALLEST_IMAGE:
        raise argparse.ArgumentTypeError(
            f"must be at least {selections.SMALLEST_IMAGE}, for networks divide it by 32; got {number}"
        )
    return number
