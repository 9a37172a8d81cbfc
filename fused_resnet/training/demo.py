"""``python -m fused_resnet demo``: a ResNet-18 trained twice, plain and fused; then inference compared."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.contenders import builder_names
from fused_resnet.bench.machine import machine_facts
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
    add("--epochs", type=_positive, help="epochs of training (default: 2; on a GPU 8)")
    add("--steps", type=_positive, help="stop training after so many steps (default: all epochs)")
    add("--batch-size", type=_positive, help="images of a training step (default: 64; on a GPU 128)")
    add("--size", type=_positive, help="pixels of a training image's side (default: 64; on a GPU 224)")
    add("--inference-model", choices=builder_names(), default="resnet50", help="(default: %(default)s)")
    add("--inference-size", type=_positive, default=224, help="pixels of its images' side (default: %(default)s)")
    add("--inference-batches", type=_positive, nargs="+", help="batch sizes (default: 1 8; on a GPU 1 256)")
    add("--rounds", type=_positive, help="rounds of inference timing (default: 6; on a GPU 50)")


def main(args: argparse.Namespace) -> int:
    """Runs the demo; the exit status: 0, 1 when it cannot run as asked, 130 when stopped by Ctrl-C."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _refuse(
            f"needs {', '.join(missing)}: pip install 'fused_resnet[demo]' (or pip install {' '.join(missing)})"
        )
    from rich.console import Console

    from fused_resnet.training.demo_progress import DemoProgress
    from fused_resnet.training.demo_report import print_report, write_report

    try:
        settings = settings_for(args)
    except ValueError as error:
        return _refuse(str(error))
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
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device must name a device such as cpu or cuda:1; got {args.device!r}") from error
    on_gpu = device.type == "cuda"
    if device.type not in ("cpu", "cuda") or (on_gpu and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device must be cpu or a GPU that PyTorch finds here; got {args.device!r}")
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
    for option, size in (("--size", settings.size), ("--inference-size", settings.inference_size)):
        if size < 32:
            raise ValueError(f"{option} must be at least 32, for the network divides it by 32; got {size}")
    return settings


def run_demo(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Trains, measures, and returns every number of the report, as plain values for JSON."""
    start = time.perf_counter()
    if settings.autocast:
        torch.backends.cudnn.benchmark = True  # for all contenders, as people who care for speed set it
    digits = load_digits(settings.size).to(settings.device)
    training = compare_training(settings, digits, progress)
    inference = compare_inference(settings, digits.test_images, progress)
    return {
        "machine": machine_facts(settings.device),
        "settings": asdict(settings),
        "training": training,
        "inference": inference,
        "seconds": time.perf_counter() - start,
    }


def _refuse(reason: str) -> int:
    print(f"demo: {reason}", file=sys.stderr)
    return 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number
