"""``python -m fused_resnet demo``: a ResNet-18 trained in eager and fused; then inference compared."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench import options
from fused_resnet.bench.machine import machine_facts
from fused_resnet.bench.suite.subjects import builder_names
from fused_resnet.training.comparison import Progress, Settings, compare_inference, compare_training
from fused_resnet.training.digits import TRAIN_IMAGES, load_digits

PACKAGES = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options; where none is given, sizes fit the device."""
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo_output"), help="folder to write into (default: %(default)s)")
    add("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    add("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    add("--epochs", type=options.positive, help="epochs of training (default: 2; on a GPU 8)")
    add("--steps", type=options.positive, help="stop training after so many steps (default: all epochs)")
    add("--batch-size", type=options.positive, help="images of a training step (default: 64; on a GPU 128)")
    add("--size", type=options.image_size, help="pixels of a training image's side (default: 64; on a GPU 224)")
    add("--inference-model", choices=builder_names(), default="resnet50", help="(default: %(default)s)")
    add(
        "--inference-size",
        type=options.image_size,
        default=224,
        help="pixels of its images' side (default: %(default)s)",
    )
    add("--inference-batches", type=options.positive, nargs="+", help="batch sizes (default: 1 8; on a GPU 1 256)")
    add("--rounds", type=options.positive, help="rounds of inference timing (default: 6; on a GPU 50)")


def main(args: argparse.Namespace) -> int:
    """Runs the demo; the exit status: 0, 1 when it cannot run as asked, 130 when stopped by Ctrl-C."""
    try:
        if missing := options.missing_packages("demo", PACKAGES):
            raise ValueError(missing)
        settings = settings_for(args)
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    from rich.console import Console

    from fused_resnet.training.demo_progress import DemoProgress
    from fused_resnet.training.demo_report import print_report, write_report

    console = Console()
    try:
        with DemoProgress(console) as progress:
            results = run_demo(settings, progress)
        print_report(results, console)
        for path in write_report(results, args.output):
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return INTERRUPTED
    return 0


def settings_for(args: argparse.Namespace) -> Settings:
    """The options, with what was left out chosen for the device.

    Raises:
        ValueError: the device is not usable, or an option is out of range.
    """
    device = options.find_device(args.device)
    on_gpu = device.type == "cuda"
    settings = Settings(
        device=str(device),
        autocast="bfloat16" if on_gpu else None,
        seed=args.seed,
        epochs=args.epochs or (8 if on_gpu else 2),
        steps=args.steps,
        batch_size=args.batch_size or (128 if on_gpu else 64),
        size=args.size or (224 if on_gpu else 64),
        inference_model=args.inference_model,
        inference_size=args.inference_size,
        inference_batches=tuple(args.inference_batches or ((1, 256) if on_gpu else (1, 8))),
        rounds=args.rounds or (50 if on_gpu else 6),
    )
    if not 2 <= settings.batch_size <= TRAIN_IMAGES:
        raise ValueError(f"--batch-size must be 2 to {TRAIN_IMAGES}, the training images; got {settings.batch_size}")
    return settings


def run_demo(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Trains, measures, and returns every number of the report, as plain values for JSON."""
    start = time.perf_counter()
    if settings.autocast:
        torch.backends.cudnn.benchmark = True  # for all contenders, as people who care for speed set it
    digits = load_digits(settings.size).to(settings.device)
    training = compare_training(settings, digits, progress)
    inference = compare_inference(settings, progress)
    return {
        "machine": machine_facts(settings.device),
        "settings": asdict(settings),
        "training": training,
        "inference": inference,
        "seconds": time.perf_counter() - start,
    }
