"""Training several models side by side, on the same batches, in turns.

The models take every step one after the other, and the first changes from step to step, so that whatever else the
machine is doing slows all of them alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_resnet.bench.timer import Stopwatch, Timing, rotate

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass
class Run:
    """One model in training, and what has been recorded of it, one entry a step. Made by `start_run`."""

    model: nn.Module
    memory_format: torch.memory_format
    optimizer: torch.optim.Optimizer
    autocast_dtype: torch.dtype | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and update; the loss before the update."""
        self.optimizer.zero_grad()
        with autocast(images, self.autocast_dtype):
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def timing(self, warmup: int) -> Timing:
        """The steps' durations without the first ``warmup``, which compile kernels and take memory."""
        return Timing(tuple(self.seconds[warmup:]))


def start_run(
    model: nn.Module,
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
    learning_rate: float = 1e-3,
    autocast_dtype: torch.dtype | None = None,
) -> Run:
    """A run that trains ``model`` itself, brought to ``memory_format``: SGD with Nesterov momentum and weight decay."""
    model = model.to(memory_format=memory_format).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    return Run(model, memory_format, optimizer, autocast_dtype)


def train_side_by_side(
    runs: list[Run],
    batches: Iterable[tuple[Tensor, Tensor]],
    learning_rates: Iterable[float],
    after_step: Callable[[], object],
) -> None:
    """Every run takes one step on every batch; losses and durations are appended to the runs.

    A duration covers forward, backward and the optimizer, and not the choice of the batch or its change of format.
    ``learning_rates`` has one rate a batch.
    """
    for index, ((images, labels), learning_rate) in enumerate(zip(batches, learning_rates, strict=True)):
        stopwatch = Stopwatch(images.device)
        for run in rotate(runs, index):
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate
            step = functools.partial(run.step, images.contiguous(memory_format=run.memory_format), labels)
            loss, seconds = stopwatch.time(step)
            run.losses.append(loss.item())
            run.seconds.append(seconds)
        after_step()


def one_cycle(peak: float, steps: int, rise: float = 0.3) -> list[float]:
    """Learning rates that rise linearly to the peak in the first part ``rise`` of the steps, then fall as a cosine."""
    top = max(1, round(rise * steps))
    up = [peak * (step + 1) / top for step in range(min(top, steps))]
    down = [peak * 0.5 * (1 + math.cos(math.pi * (step + 1) / (steps - top + 1))) for step in range(steps - top)]
    return up + down


def accuracy(run: Run, images: Tensor, labels: Tensor, batch_size: int = 120) -> float:
    """The fraction of the images that the run's model, in eval mode, labels rightly. The mode is put back."""
    was_training = run.model.training
    run.model.eval()
    right = 0
    with torch.inference_mode(), autocast(images, run.autocast_dtype):
        for chunk, expected in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = run.model(chunk.contiguous(memory_format=run.memory_format))
            right += int((logits.argmax(1) == expected).sum())
    run.model.train(was_training)
    return right / len(labels)


def autocast(images: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype`` on the device of the images; none with dtype None."""
    return torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None)
