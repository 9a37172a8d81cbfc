"""The demo's measurements: plain PyTorch against fused in training, and against fused and frozen at inference.

How they are kept fair: one process; the contenders take turns; medians; ratios formed round by round. Plain PyTorch
runs in both memory formats, and ratios are to the faster one. Training amplifies rounding, so that the losses of any
two programs part after some steps; plain PyTorch against itself in the other memory format is the yardstick for how
far. On a GPU plain and fused run under bfloat16 autocast, and the frozen model in bfloat16.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.bench.contenders import (
    FUSED,
    PLAIN,
    PLAIN_FORMATS,
    build,
    faster_plain,
    inference_contenders,
    plain_twin,
    relative_difference,
    settle_statistics,
)
from fused_resnet.bench.saved_bytes import saved_bytes
from fused_resnet.bench.timer import interleave, ratio
from fused_resnet.training.digits import CLASSES, TRAIN_IMAGES, Digits, shuffled_batches
from fused_resnet.training.loop import Run, accuracy, autocast, one_cycle, start_run, train_side_by_side

TRAINING_MODEL = "resnet18"
LEARNING_RATE = 0.01
REFERENCE = "plain channels_last"  # the losses of the others are compared with its losses
YARDSTICK = "plain NCHW"  # and how far its losses are from those is no more than rounding
UNTIMED_STEPS = 3
WARMUP_ROUNDS = 2


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
    def steps_per_epoch(self) -> int:
        return TRAIN_IMAGES // self.batch_size

    @property
    def training_steps(self) -> int:
        return min(self.epochs * self.steps_per_epoch, self.steps or TRAIN_IMAGES * self.epochs)


class Progress(Protocol):
    """Who is told how far a measurement is."""

    def start(self, phase: str, total: int) -> None:
        """A phase of so many steps begins; the one before it has ended."""

    def advance(self, note: str = "") -> None:
        """One step of the phase is done; the note is what there is to say of it."""


def compare_training(settings: Settings, digits: Digits, progress: Progress) -> dict[str, Any]:
    """Trains plain, in both memory formats, and fused side by side, from the same weights on the same batches."""
    torch.manual_seed(settings.seed)
    model = build(TRAINING_MODEL, CLASSES).to(settings.device)
    plain, plain_code = plain_twin(model, TRAINING_MODEL, CLASSES)
    runs = {
        name: start_run(
            copy.deepcopy(model if name == FUSED else plain),
            memory_format=memory_format,
            autocast_dtype=settings.autocast_dtype,
        )
        for name, memory_format in {**PLAIN_FORMATS, FUSED: torch.channels_last}.items()
    }
    images, labels = digits.train_images[: settings.batch_size], digits.train_labels[: settings.batch_size]
    kept = {name: _saved_bytes(run, images, labels) for name, run in runs.items()}

    epochs = (
        shuffled_batches(digits.train_images, digits.train_labels, settings.batch_size, settings.seed + epoch)
        for epoch in range(settings.epochs)
    )
    progress.start(f"Training {TRAINING_MODEL}", settings.training_steps)
    train_side_by_side(
        list(runs.values()),
        itertools.islice(itertools.chain.from_iterable(epochs), settings.training_steps),
        one_cycle(LEARNING_RATE, settings.training_steps),
        lambda: progress.advance(
            f"loss: {PLAIN} {runs[REFERENCE].losses[-1]:.4f}, {FUSED} {runs[FUSED].losses[-1]:.4f}"
        ),
    )

    warmup = min(UNTIMED_STEPS, settings.training_steps - 1)
    timings = {name: run.timing(warmup) for name, run in runs.items()}
    baseline = faster_plain(timings)
    return {
        "model": TRAINING_MODEL,
        "plain_code": plain_code,
        "image_size": settings.size,
        "batch_size": settings.batch_size,
        "steps": settings.training_steps,
        "untimed_steps": warmup,
        "baseline": baseline,
        "contenders": {
            name: {
                **timings[name].as_dict(),
                "speedup": ratio(timings[baseline], timings[name]),
                "accuracy": accuracy(run, digits.test_images, digits.test_labels),
                "losses": run.losses,
                "loss_difference": _loss_difference(run.losses, runs[REFERENCE].losses),
                "saved_bytes": kept[name],
            }
            for name, run in runs.items()
        },
        "saved_bytes_ratio": kept[FUSED] / kept[baseline],
    }


def compare_inference(settings: Settings, test_images: Tensor, progress: Progress) -> list[dict[str, Any]]:
    """Plain, fused and frozen on digit images enlarged to the inference size, one entry a batch size."""
    torch.manual_seed(settings.seed)
    model = build(settings.inference_model).to(settings.device)
    settle_statistics(model, _enlarged(test_images, 8, settings.inference_size))
    plain, plain_code = plain_twin(model, settings.inference_model)
    results = []
    for batch_size in settings.inference_batches:
        images = _enlarged(test_images, batch_size, settings.inference_size)
        progress.start(f"Inference, {settings.inference_model}, batch {batch_size}", WARMUP_ROUNDS + settings.rounds)
        functions = inference_contenders(model, plain, images, settings.autocast_dtype)
        logits = {name: function().clone() for name, function in functions.items()}
        timings = interleave(functions, settings.rounds, WARMUP_ROUNDS, settings.device, after_round=progress.advance)
        baseline = faster_plain(timings)
        results.append(
            {
                "model": settings.inference_model,
                "plain_code": plain_code,
                "image_size": settings.inference_size,
                "batch_size": batch_size,
                "baseline": baseline,
                "contenders": {
                    name: {
                        **timing.as_dict(),
                        "speedup": ratio(timings[baseline], timing),
                        "relative_difference": relative_difference(logits[name], logits[baseline]),
                    }
                    for name, timing in timings.items()
                },
            }
        )
    return results


def _loss_difference(losses: list[float], reference: list[float]) -> dict[str, float]:
    differences = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
    return {"first": differences[0], "mean": statistics.fmean(differences), "max": max(differences)}


def _saved_bytes(run: Run, images: Tensor, labels: Tensor) -> int:
    model = copy.deepcopy(run.model)  # for a forward moves the running statistics
    images = images.contiguous(memory_format=run.memory_format)

    def forward() -> Tensor:
        with autocast(images, run.autocast_dtype):
            return F.cross_entropy(model(images), labels)

    return saved_bytes(model, forward)


def _enlarged(test_images: Tensor, count: int, size: int) -> Tensor:
    chosen = test_images[torch.arange(count, device=test_images.device) % len(test_images)]
    return F.interpolate(chosen, size=(size, size), mode="bilinear", align_corners=False)
