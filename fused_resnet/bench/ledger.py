"""The ledger of a training step: every pass over memory that it made, and the bytes that each read and wrote; and the
bytes that a forward keeps for its backward.

Counted, not measured: from the ops that ran and the tensors that they got, by the table in ``bench/traffic.py``. On a
GPU most of a ResNet waits for memory, so the total divided by the bandwidth is close to the least time a step can take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.bench.traffic import passes

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


@dataclass(frozen=True)
class Entry:
    """All passes of one kind in one phase; bytes of them together."""

    phase: str
    """"forward", "backward" or "optimizer"."""
    kind: str
    """Such as "convolution", "statistics" or "add"."""
    reads: int
    writes: int

    @property
    def total(self) -> int:
        return self.reads + self.writes


@dataclass(frozen=True)
class Ledger:
    """Every pass of one step, in the order in which they first ran. The bytes are those of the step; ``images`` is how
    many it processed."""

    entries: tuple[Entry, ...]
    images: int = 1

    @property
    def total(self) -> int:
        return sum(entry.total for entry in self.entries)

    @property
    def bytes_per_image(self) -> float:
        return self.total / self.images


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
    return Ledger(tuple(Entry(*key, *sums) for key, sums in mode.found.items()), images)


class _Observer(TorchDispatchMode):
    """Sees every op below autograd, with the tensors it got, and adds up what the table says of it."""

    def __init__(self) -> None:
        super().__init__()
        self._updating = False
        self.found: dict[tuple[str, str], list[int]] = {}
        """By phase and kind: bytes read and written."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)  # the mode is off in here: what an op of ours is composed of is not seen
        for kind, reads, writes in passes(func, args, kwargs, results):
            sums = self.found.setdefault((self._phase(), kind), [0, 0])
            sums[:] = sums[0] + reads, sums[1] + writes
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


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the tensors that ``forward`` saves for backward, each storage counted once and whole.

    The model's own parameters and buffers are not counted: they live anyway. Inputs are counted where they are saved
    (a first convolution needs its image for the gradient of its weight), and so are a loss's labels.

    ``forward`` runs once, with gradients, and whatever it changes stays changed (running statistics in training mode).

    Example:
        ``saved_bytes(model, lambda: torch.nn.functional.cross_entropy(model(images), labels))``
    """
    owned = {_storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[tuple[torch.device, int], Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (key := _storage_key(tensor)) not in owned:
            kept[key] = tensor.detach()  # alive until the count, so that no address comes back as another storage
        return tensor.detach()  # not itself: an output that its own node holds is never freed, nor the graph behind it

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
