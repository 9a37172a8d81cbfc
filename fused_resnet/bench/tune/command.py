"""``python -m fused_resnet tune``: measures backends and tiles for a model's shapes here, and keeps the plan."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench import options
from fused_resnet.bench.report.figures import text_table
from fused_resnet.bench.suite.rounds import ONCE
from fused_resnet.bench.suite.subjects import builder_names
from fused_resnet.bench.tune.fastest import METHOD, Found, Outcome, tune
from fused_resnet.bench.tune.questions import MODES, Question, Selection, questions
from fused_resnet.ops.plan import measured_plan, plan_file
from fused_resnet.ops.plan.measured_plan import ignoring_measured_plan
from fused_resnet.ops.plan.plan_file import NotAPlan

BATCH_SIZES = {"cpu": {"inference": (1, 8), "training": (16,)}, "cuda": {"inference": (1, 32, 256), "training": (256,)}}
DRY_BATCH_SIZE, DRY_IMAGE_SIZE, DRY_TILES = 2, 32, 1
REFUSED, INTERRUPTED = 1, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, models = parser.add_argument, builder_names()
    model_help = f"{', '.join(models)} (default: resnet50)"
    add("--model", nargs="+", action="extend", choices=models, metavar="NAME", help=model_help)
    add("--mode", nargs="+", choices=MODES, help="inference, training (default: inference)")
    batch_help = "images (default: inference 1 8, training 16; on a GPU 1 32 256 and 256)"
    add("--batch-size", nargs="+", type=options.positive, metavar="N", help=batch_help)
    dtype_help = "of activations (default: float32; on a GPU bfloat16)"
    add("--dtype", nargs="+", choices=options.DTYPES, help=dtype_help)
    size_help = "of a side (default: %(default)s)"
    add("--image-size", type=options.image_size, default=224, metavar="PIXELS", help=size_help)
    add("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    threads_help = "of PyTorch on the CPU: a plan for each (default: its choice)"
    add("--threads", type=options.positive, metavar="N", help=threads_help)
    budget_help = "for everything; what is left is measured by the next run"
    add("--budget", type=options.seconds, metavar="SECONDS", help=budget_help)
    add("--output", type=Path, metavar="FILE", help="(default: the user's plan, which is used from then on)")
    add("--again", action="store_true", help="measure what the plan has already, too")
    add("--dry", action="store_true", help="tiny shapes, one round, nothing kept: does it run?")


def main(arguments: argparse.Namespace) -> int:
    """The exit status: 0, 1 when it cannot run as asked, 130 when stopped by Ctrl-C."""
    end = math.inf if arguments.budget is None else time.monotonic() + arguments.budget
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        measured_plan.reload()
    try:
        if missing := options.missing_packages("bench", {"rich": "rich"}):
            raise ValueError(missing)
        selection = select(arguments)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "plan.json") if arguments.dry else arguments.output
            return _run(arguments, selection, path, end)
    except (ValueError, NotAPlan, OSError) as error:
        print(f"python -m fused_resnet tune: {error}", file=sys.stderr)
        return REFUSED


def select(arguments: argparse.Namespace) -> Selection:
    """What the arguments ask for."""
    device = options.find_device(arguments.device)
    batch_sizes, image_size = BATCH_SIZES[device.type], arguments.image_size
    if arguments.dry:
        batch_sizes, image_size = dict.fromkeys(MODES, (DRY_BATCH_SIZE,)), DRY_IMAGE_SIZE
    if arguments.batch_size:
        batch_sizes = dict.fromkeys(MODES, tuple(dict.fromkeys(arguments.batch_size)))
    names = arguments.dtype or ["float32" if device.type == "cpu" else "bfloat16"]
    return Selection(
        models=tuple(dict.fromkeys(arguments.model or ["resnet50"])),
        batch_sizes={mode: batch_sizes[mode] for mode in arguments.mode or ["inference"]},
        dtypes=tuple(dict.fromkeys(getattr(torch, name) for name in names)),
        device=device,
        image_size=image_size,
        most_tiles=DRY_TILES if arguments.dry else None,
    )


def _run(arguments: argparse.Namespace, selection: Selection, path: Path | None, end: float) -> int:
    from rich.progress import MofNCompleteColumn

    from fused_resnet.bench.console import Bar, make_console

    device = selection.device
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as people who care for speed set it
    known = measured_plan.decisions(device, path)
    plan = path or measured_plan.plan_path(device)
    plan_file.check_writable(plan)
    tiles = {key: decision.winner for (op, key), decision in known.items() if op == measured_plan.TILES}
    with ignoring_measured_plan():
        everything = questions(selection, tiles)
    wanted = [each for each in everything if arguments.again or (each.op, each.key) not in known]
    with Bar(make_console(), MofNCompleteColumn()) as bar:
        bar.begin_phase("measuring", len(wanted))
        done = 0

        def finish(question: Question, found: Found | None) -> None:
            nonlocal done
            done += 1
            bar.update(advance=1)
            if not bar.is_terminal:
                answer = "nothing ran" if found is None else f"{found.winner} (as written: {found.heuristic})"
                bar.say(f"{done} of {len(wanted)}: {question.title}: {answer}")

        how: dict[str, Any] = {"method": ONCE if arguments.dry else METHOD, "seconds": end - time.monotonic()}
        outcome = tune(wanted, tiles, path, **how, begin=lambda each: bar.update(what=each.title), finish=finish)
        bar.update(what="")
    if outcome.found:
        bar.say(table(outcome.found))
    for line in summary(outcome, len(everything) - len(wanted), plan):
        bar.say(line)
    if arguments.dry:
        bar.say("dry: tiny shapes in one round, and nothing is kept")
        return REFUSED if outcome.failed else 0
    return INTERRUPTED if outcome.interrupted else 0


def table(results: Sequence[tuple[Question, Found]]) -> str:
    """A row for each shape: what is written, what was fastest and how much faster it is, those that gain most first."""
    gains = [(math.inf if math.isnan(each.ratio) else each.ratio, question.title, each) for question, each in results]
    rows = []
    for ratio, title, each in sorted(gains, key=lambda gain: -gain[0]):
        changed = (each.winner, "-" if math.isinf(ratio) else f"{ratio:.2f}x")
        rows.append([title, each.heuristic, *(changed if each.winner != each.heuristic else ("the same", ""))])
    return text_table(["shape", "as written", "fastest", "ratio"], rows)


def summary(outcome: Outcome, known: int, path: Path) -> list[str]:
    """Lines for below the table."""
    changed = sum(found.winner != found.heuristic for _, found in outcome.found)
    lines = [f"{len(outcome.found)} measured, {changed} of them faster than as written; {known} were known before"]
    for question, found in outcome.found:
        lines += [f"dropped: {name} of {question.title}: {reason}" for name, reason in found.dropped.items()]
    lines += [f"not measured: {title}: {reason}" for title, reason in outcome.failed.items()]
    if outcome.left:
        shown = ", ".join(outcome.left[:3]) + (", ..." if len(outcome.left) > 3 else "")
        why = "interrupted" if outcome.interrupted else "the time was used up"
        lines.append(f"left: {len(outcome.left)} ({why}): {shown}; the same command goes on there")
    return [*lines, f"plan: {path}"]
