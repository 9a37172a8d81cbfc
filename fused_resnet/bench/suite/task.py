"""What is measured (a network, a block or an op, in one mode, at one batch size, in one dtype, on one device), and who
takes part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fused_resnet.bench.accuracy import Results


class Task(ABC):
    """One thing to measure. Everything costly (the weights, the exact results) is made when first asked for, once, and
    shared by all contenders; nobody changes what he is handed. ``made`` names these attributes."""

    level: str
    subject: str
    mode: str
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    image_size: int | None
    made: tuple[str, ...] = ()
    _latest: Task | None = None

    @abstractmethod
    def why_wrong(self, prepared: Prepared) -> tuple[float | None, str | None]:
        """(the error against float64, None if the numbers are right and else what is wrong): by the project's rule at
        most twice the error of PyTorch's eager mode in the same dtype."""

    @abstractmethod
    def flop(self) -> int | None:
        """Additions and multiplications of convolutions and matrix products, in one run."""

    def release(self) -> None:
        """Gives back what was made; asked for again, it is made again and is the same."""
        for name in self.made:
            self.__dict__.pop(name, None)

    def let_go_of_others(self) -> None:
        """A list of tasks must not hold the tensors of all of them: before this one makes any, the last one's go."""
        before, Task._latest = Task._latest, self
        if before is not None and before is not self:
            before.release()


@dataclass
class Prepared:
    """A contender that is ready: compiled, packed, tuned, captured, warmed up once.

    ``run`` does the task once, on the next of the rotating inputs; on a GPU it may return before the device has
    finished. ``results`` are those to hold against the exact ones, of the first of the inputs and of the weights as
    they were at first; called once, before anything is measured. ``saved_bytes`` and ``moved_bytes``, as in
    ``result.Outcome``, are asked once, and not while anything is measured; ``close`` gives back what it holds.
    """

    run: Callable[[], object]
    results: Callable[[], Results]
    saved_bytes: Callable[[], int | None] = lambda: None
    moved_bytes: Callable[[], int | None] = lambda: None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contender:
    """One way to do a task, named as in tables, such as "eager channels_last".

    ``why_absent`` gives the reasons why it cannot do this task here (not installed, no GPU, inference only, another
    dtype); an empty list means that it can try. ``prepare`` makes it ready, which is its setup time; if it raises, the
    contender has failed. ``ours``: this package runs it.
    """

    name: str
    why_absent: Callable[[Any], list[str]]
    prepare: Callable[[Any], Prepared]
    ours: bool = False
