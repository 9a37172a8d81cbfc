"""The ledger of a training step: every pass over memory that it made, and the bytes that each read and wrote.

Counted, not measured: from the ops that ran and the tensors that they got, by the table in ``bench/traffic.py``. On a
GPU most of a ResNet waits for memory, so the total divided by the bandwidth is close to the least time a step can take.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.bench.traffic import passes

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


@dataclass(frozen=True)
class Entry:
    """All passes of one kind by one op in one phase; bytes of them together."""

    op: str
    """Such as "aten.convolution"; of `Ledger.by_pass`, every op of the kind, separated by commas."""
    phase: str
    """"forward", "backward" or "optimizer"."""
    kind: str
    """Such as "convolution", "statistics" or "add"."""
    reads: int
    writes: int
    count: int

    @property
    def total(self) -> int:
        return self.reads + self.writes


@dataclass(frozen=True)
class Ledger:
    """Every pass of one step. The bytes are those of the step; ``images`` is how many it processed."""

    entries: tuple[Entry, ...]
    images: int = 1

    @property
    def reads(self) -> int:
        return sum(entry.reads for entry in self.entries)

    @property
    def writes(self) -> int:
        return sum(entry.writes for entry in self.entries)

    @property
    def total(self) -> int:
        return self.reads + self.writes

    @property
    def bytes_per_image(self) -> float:
        return self.total / self.images

    def by_pass(self) -> list[Entry]:
        """One entry for each phase and kind, in the order in which they first ran."""
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((entry.phase, entry.kind), []).append(entry)
        return [
            Entry(
                ", ".join(entry.op for entry in group),
                *key,
                *(sum(getattr(entry, name) for entry in group) for name in ("reads", "writes", "count")),
            )
            for key, group in groups.items()
        ]

    def bytes_of(self, kind: str, phase: str | None = None) -> int:
        """Bytes read and written by the passes of one kind, in one phase or in all."""
        return sum(e.total for e in self.entries if e.kind == kind and phase in (None, e.phase))

    def table(self) -> str:
        """`by_pass` as text, in megabytes (10^6) an image."""
        lines = [f"{'MB an image':26} {'passes':>6} {'read':>9} {'written':>9} {'both':>9}"]
        for entry in self.by_pass():
            lines.append(self._line(f"{entry.phase} {entry.kind}", entry.count, entry.reads, entry.writes))
        lines.append(self._line("all", sum(entry.count for entry in self.entries), self.reads, self.writes))
        return "\n".join(lines)

    def _line(self, title: str, count: int, reads: int, writes: int) -> str:
        megabytes = (f"{value / self.images / 1e6:9.3f}" for value in (reads, writes, reads + writes))
        return f"{title:26} {count:6} {' '.join(megabytes)}"


def ledger(step: Callable[[], object], images: int = 1) -> Ledger:
    """Runs ``step`` once and counts every op in it, those that autograd runs in backward and the optimizer's included.

    An op of this package is one pass whatever its backend composes it of. Under ``DryRun`` nothing is computed.

    Args:
        step: any code on tensors; a training step, usually.
        images: how many images it processes, for the numbers per image.

    Raises:
        NotImplementedError: it runs an op that ``bench/traffic.py`` has no row for.
    """
    mode = _Observer()
    with mode, mode.watching_optimizers():
        step()
    return Ledger(tuple(mode.entries()), images)


class _Key(NamedTuple):
    op: str
    phase: str
    kind: str


class _Observer(TorchDispatchMode):
    """Sees every op below autograd, with the tensors it got, and adds up what the table says of it."""

    def __init__(self) -> None:
        super().__init__()
        self._updating = False
        self._reads: Counter[_Key] = Counter()
        self._writes: Counter[_Key] = Counter()
        self._count: Counter[_Key] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)  # the mode is off in here: what an op of ours is composed of is not seen
        for kind, reads, writes in passes(func, args, kwargs, results):
            key = _Key(func._schema.name.replace("::", "."), self._phase(), kind)
            self._reads[key] += reads
            self._writes[key] += writes
            self._count[key] += 1
        return results

    def _phase(self) -> str:
        if self._updating:
            return OPTIMIZER
        return FORWARD if torch._C._current_graph_task_id() == -1 else BACKWARD

    @contextlib.contextmanager
    def watching_optimizers(self) -> Iterator[None]:
        """Inside, ops between the beginning and the end of any optimizer's ``step`` are its own."""

        def mark(updating: bool) -> Callable[..., None]:
            return lambda *unused: setattr(self, "_updating", updating)

        with register_optimizer_step_pre_hook(mark(True)), register_optimizer_step_post_hook(mark(False)):
            yield

    def entries(self) -> list[Entry]:
        return [Entry(*key, self._reads[key], self._writes[key], self._count[key]) for key in self._count]
