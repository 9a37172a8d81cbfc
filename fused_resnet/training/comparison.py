"""The demo's measurements: eager against fused in training, and against fused and frozen at inference.

How they are kept fair: one process; the contenders take turns; medians; ratios formed round by round. Eager PyTorch
runs in both memory formats, and ratios are to the faster one. Training amplifies rounding, so that the losses of any
two programs part after some steps; eager against itself in the other memory format is the yardstick for how far.
Inference is a measurement of ``fused_resnet/bench``, in which everyone's numbers are held against float64. On a GPU
training is under bfloat16 autocast, and inference in bfloat16.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet
from fused_resnet.bench.ledger import saved_bytes
from fused_resnet.bench.report.figures import PLAIN_EAGER
from fused_resnet.bench.result import INFERENCE
from fused_resnet.bench.suite.correctness import JudgedTask
from fused_resnet.bench.suite.measure import measure
from fused_resnet.bench.suite.network_contenders import FORMATS
from fused_resnet.bench.suite.registry import select
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.suite.subjects import build
from fused_resnet.bench.timer import Timing, ratio
from fused_resnet.training.digits import CLASSES, TRAIN_IMAGES, Digits, shuffled_batches
from fused_resnet.training.loop import Run, accuracy, autocast, one_cycle, start_run, train_side_by_side

TRAINING_MODEL = "resnet18"
LEARNING_RATE = 0.01
EAGER, FUSED, FROZEN = "eager", "fused", "frozen"
REFERENCE = "eager channels_last"  # the losses of the others are compared with its losses
YARDSTICK = "eager NCHW"  # and how far its losses are from those is no more than rounding
UNTIMED_STEPS = 3


@dataclass(frozen=True)
class Settings:
    """What to run. Sizes are in pixels, batch sizes in images; ``steps`` ends training before its epochs do."""

    device: str
    autocast: str | None
    seed: int
    epochs: int
    steps: int | None
    batch_size: int
    size: int
    inference_model: str
    inference_size: int
    inference_batches: tuple[int, ...]
    rounds: int

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return None if self.autocast is None else getattr(torch, self.autocast)

    @property
    def training_steps(self) -> int:
        return min(self.epochs * (TRAIN_IMAGES // self.batch_size), self.steps or TRAIN_IMAGES * self.epochs)


class Progress(Protocol):
    """Who is told how far a measurement is."""

    def start(self, phase: str, total: int) -> None:
        """A phase of so many steps begins; the one before it has ended."""

    def advance(self, note: str = "") -> None:
        """One step of the phase is done; the note is what there is to say of it."""

    def stage(self, what: str, done: float) -> None:
        """So much of the phase is done, from 0 to 1, and ``what`` comes now."""


def compare_training(settings: Settings, digits: Digits, progress: Progress) -> dict[str, Any]:
    """Trains eager, in both memory formats, and fused side by side, from the same weights on the same batches."""
    torch.manual_seed(settings.seed)
    model = build(TRAINING_MODEL, CLASSES).to(settings.device)
    plain = fused_resnet.unfuse(copy.deepcopy(model))
    dtype = settings.autocast_dtype
    runs = {
        name: start_run(copy.deepcopy(plain), memory_format=memory_format, autocast_dtype=dtype)
        for name, memory_format in FORMATS.items()
    }
    runs[FUSED] = start_run(model, memory_format=torch.channels_last, autocast_dtype=dtype)
    images, labels = digits.train_images[: settings.batch_size], digits.train_labels[: settings.batch_size]
    kept = {name: _saved_bytes(run, images, labels) for name, run in runs.items()}
    epochs = (
        shuffled_batches(digits.train_images, digits.train_labels, settings.batch_size, settings.seed + epoch)
        for epoch in range(settings.epochs)
    )
    steps = settings.training_steps
    progress.start(f"Training {TRAINING_MODEL}", steps)
    train_side_by_side(
        list(runs.values()),
        itertools.islice(itertools.chain.from_iterable(epochs), steps),
        one_cycle(LEARNING_RATE, steps),
        lambda: progress.advance(
            f"loss: {EAGER} {runs[REFERENCE].losses[-1]:.4f}, {FUSED} {runs[FUSED].losses[-1]:.4f}"
        ),
    )
    warmup = min(UNTIMED_STEPS, steps - 1)
    baseline, contenders = _against_eager({name: run.timing(warmup) for name, run in runs.items()})
    for name, run in runs.items():
        differences = [abs(a - b) for a, b in zip(run.losses, runs[REFERENCE].losses, strict=True)]
        contenders[name] |= {
            "accuracy": accuracy(run, digits.test_images, digits.test_labels),
            "losses": run.losses,
            "loss_difference": {
                "first": differences[0], "mean": statistics.fmean(differences), "max": max(differences)
            },
            "saved_bytes": kept[name],
        }  # fmt: skip
    return {
        "model": TRAINING_MODEL,
        "image_size": settings.size,
        "batch_size": settings.batch_size,
        "steps": steps,
        "untimed_steps": warmup,
        "baseline": baseline,
        "contenders": contenders,
        "saved_bytes_ratio": kept[FUSED] / kept[baseline],
    }


def compare_inference(settings: Settings, progress: Progress) -> list[dict[str, Any]]:
    """Eager, fused and frozen on random images of the inference size, one entry a batch size."""
    on_gpu = torch.device(settings.device).type == "cuda"
    frozen = f"{FROZEN} graph" if on_gpu else FROZEN
    method = Method(rounds=settings.rounds, min_seconds=0.0, most_rounds=settings.rounds)
    results = []
    for batch_size in settings.inference_batches:
        task = JudgedTask(
            settings.inference_model,
            *(INFERENCE, batch_size, settings.autocast_dtype or torch.float32, settings.device),
            settings.inference_size,
        )
        progress.start(f"Inference, {settings.inference_model}, batch {batch_size}", 100)
        found = measure(task, select([*FORMATS, FUSED, frozen]), method, stage=progress.stage)
        outcomes = {FROZEN if name == frozen else name: outcome for name, outcome in found.outcomes.items()}
        timings = {name: outcome.timing for name, outcome in outcomes.items() if outcome.timing is not None}
        if missing := outcomes.keys() - timings.keys():
            raise RuntimeError("; ".join(f"{name}: {outcomes[name].reason}" for name in missing))
        baseline, contenders = _against_eager(timings)
        for name, outcome in outcomes.items():
            contenders[name] |= {"status": outcome.status, "error": outcome.error}
        results.append(
            {
                "model": settings.inference_model,
                "image_size": settings.inference_size,
                "batch_size": batch_size,
                "baseline": baseline,
                "contenders": contenders,
            }
        )
    return results


def _against_eager(timings: Mapping[str, Timing]) -> tuple[str, dict[str, dict[str, Any]]]:
    """(the faster eager, of each contender its times and how many times as fast it is)."""
    baseline = min((name for name in PLAIN_EAGER if name in timings), key=lambda name: timings[name].median)
    against = {
        name: timing.as_dict() | {"speedup": ratio(timings[baseline], timing)} for name, timing in timings.items()
    }
    return baseline, against


def _saved_bytes(run: Run, images: Tensor, labels: Tensor) -> int:
    model = copy.deepcopy(run.model)  # for a forward moves the running statistics
    images = images.contiguous(memory_format=run.memory_format)

    def forward() -> Tensor:
        with autocast(images, run.autocast_dtype):
            return F.cross_entropy(model(images), labels)

    return saved_bytes(model, forward)
