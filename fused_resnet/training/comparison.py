"""The demo's measurements: plain PyTorch against fused in training, and against fused and frozen at inference.

How they are kept fair: one process; the contenders take turns; medians; ratios formed round by round. In training,
plain and fused each use the memory format that is faster for them here: a short measurement decides, and its numbers
are in the results. At inference plain PyTorch is measured in both formats, and ratios are to the faster one. On a GPU
plain and fused run under bfloat16 autocast, and the frozen model in bfloat16.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.bench.contenders import (
    FUSED,
    MEMORY_FORMATS,
    PLAIN,
    build,
    faster_format,
    inference_contenders,
    plain_twin,
    relative_difference,
    settle_statistics,
    training_contenders,
)
from fused_resnet.bench.saved_bytes import saved_bytes
from fused_resnet.bench.timer import interleave, ratio
from fused_resnet.training.digits import CLASSES, TRAIN_IMAGES, Digits, shuffled_batches
from fused_resnet.training.loop import Run, accuracy, autocast, one_cycle, start_run, train_side_by_side

TRAINING_MODEL = "resnet18"
LEARNING_RATE = 0.05
UNTIMED_STEPS = 3
FORMAT_ROUNDS = 3
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
    """Trains plain and fused side by side from the same weights on the same batches."""
    torch.manual_seed(settings.seed)
    model = build(TRAINING_MODEL, CLASSES).to(settings.device)
    plain, plain_code = plain_twin(model, TRAINING_MODEL, CLASSES)
    models = {PLAIN: plain.to(settings.device), FUSED: model}

    images, labels = digits.train_images[: settings.batch_size], digits.train_labels[: settings.batch_size]
    progress.start("Which memory format is faster here", WARMUP_ROUNDS + FORMAT_ROUNDS)
    formats = interleave(
        training_contenders(model, plain, images, labels, tuple(MEMORY_FORMATS), settings.autocast_dtype),
        FORMAT_ROUNDS,
        WARMUP_ROUNDS,
        settings.device,
        after_round=progress.advance,
    )
    chosen = {name: faster_format(name, formats) for name in models}
    kept = {name: _saved_bytes(models[name], images, labels, chosen[name], settings) for name in models}

    runs = {
        name: start_run(
            models[name], memory_format=MEMORY_FORMATS[chosen[name]], autocast_dtype=settings.autocast_dtype
        )
        for name in models
    }
    _train(runs, settings, digits, progress)

    warmup = min(UNTIMED_STEPS, settings.training_steps - 1)
    timings = {name: run.timing(warmup) for name, run in runs.items()}
    differences = [abs(a - b) for a, b in zip(runs[PLAIN].losses, runs[FUSED].losses, strict=True)]
    results: dict[str, Any] = {
        name: {
            "memory_format": chosen[name],
            "accuracy": accuracy(run, digits.test_images, digits.test_labels),
            "losses": run.losses,
            "step_seconds": timings[name].as_dict(),
            "saved_bytes": kept[name],
        }
        for name, run in runs.items()
    }
    return {
        "model": TRAINING_MODEL,
        "plain_code": plain_code,
        "steps": settings.training_steps,
        "untimed_steps": warmup,
        **results,
        "speedup": ratio(timings[PLAIN], timings[FUSED]),
        "saved_bytes_ratio": kept[FUSED] / kept[PLAIN],
        "loss_difference": {
            "first": differences[0],
            "mean": statistics.fmean(differences),
            "max": max(differences),
        },
        "memory_formats": {name: timing.as_dict() for name, timing in formats.items()},
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
        baseline = f"{PLAIN} {faster_format(PLAIN, timings)}"
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


def _train(runs: dict[str, Run], settings: Settings, digits: Digits, progress: Progress) -> None:
    epochs = (
        shuffled_batches(digits.train_images, digits.train_labels, settings.batch_size, settings.seed + epoch)
        for epoch in range(settings.epochs)
    )
    batches = itertools.islice(itertools.chain.from_iterable(epochs), settings.training_steps)
    rates = one_cycle(LEARNING_RATE, settings.training_steps)
    progress.start(f"Training {TRAINING_MODEL}, {' and '.join(runs)}", settings.training_steps)
    train_side_by_side(
        list(runs.values()),
        batches,
        rates,
        lambda: progress.advance("loss " + ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items())),
    )


def _saved_bytes(model: nn.Module, images: Tensor, labels: Tensor, memory_format: str, settings: Settings) -> int:
    run = start_run(copy.deepcopy(model), memory_format=MEMORY_FORMATS[memory_format])
    images = images.contiguous(memory_format=run.memory_format)

    def forward() -> Tensor:
        with autocast(images, settings.autocast_dtype):
            return F.cross_entropy(run.model(images), labels)

    return saved_bytes(run.model, forward)


def _enlarged(test_images: Tensor, count: int, size: int) -> Tensor:
    chosen = test_images[torch.arange(count, device=test_images.device) % len(test_images)]
    return F.interpolate(chosen, size=(size, size), mode="bilinear", align_corners=False)
