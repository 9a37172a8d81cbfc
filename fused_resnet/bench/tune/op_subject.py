"""Which backend runs an op, and with which tile where that is Triton."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.bench.suite.op_base import OpTask, on_backend
from fused_resnet.bench.suite.op_conv_training import ConvTrainingTask
from fused_resnet.bench.suite.task import Prepared, Results
from fused_resnet.bench.tune.measure import Found
from fused_resnet.bench.tune.subject import Entry, Subject
from fused_resnet.bench.tune.tile_candidates import TileQuestion, choosing, questions, with_tiles
from fused_resnet.ops.conv_settings import ConvSettings
from fused_resnet.ops.plan import measured_plan, plan_key
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.route.choose import choose_automatically, use_backend
from fused_resnet.ops.route.reasons import MODULES, unavailable

TRITON = "triton"


class TaskSubject(Subject):
    """A task of the benchmark suite as a question: it has the inputs, and knows which numbers are right.

    Args:
        most_tiles: of a Triton kernel, beside the usual one; None for all.
    """

    def __init__(self, task: OpTask, most_tiles: int | None = None) -> None:
        self.task, self.device, self._most_tiles = task, task.device, most_tiles
        dtype = str(task.dtype).removeprefix("torch.")
        self.title = f"{task.subject} x {task.batch_size} {dtype}"
        self.op = op_of(task)
        self.compiles = not unavailable(TRITON)
        self._question: TileQuestion | None = None

    def make_key(self) -> Key:
        op, args = _for_one_image(self.task)
        return with_batch(plan_key.key_of(op, args), self.task.batch_size)

    def why_wrong(self, prepared: Prepared) -> str | None:
        return self.task.why_wrong(prepared)[1]

    def release(self) -> None:
        self.task.release()

    def _tiles(self) -> dict[str, Callable[[], Prepared]]:
        """Triton with every tile that it could take, by ``str`` of the tile, its usual one first."""
        ours = on_backend(TRITON, self.task.ours(self.task.first))
        asked = questions(ours)
        if len(asked) != 1:  # a pass has one tile for all shapes
            return {"": self._prepared(None)}
        self._question = asked[0]
        others = [name for name in self._question.names if name != self._question.usual]
        names = [self._question.usual, *others[: self._most_tiles]]
        return {name: self._prepared(choosing({self._question.plan_key: name})) for name in names}

    def _prepared(self, chooser: Callable[..., Any] | None) -> Callable[[], Prepared]:
        def make(inputs: Any) -> Callable[[], Results]:
            return with_tiles(chooser, on_backend(TRITON, self.task.ours(inputs)))

        return lambda: self.task.prepare(TRITON, make)

    def _tile_entry(self, found: Found, tile: str, seconds: dict[str, float]) -> list[Entry]:
        if self._question is None or not tile:
            return []
        return [Entry(measured_plan.TILES, self._question.plan_key, tile, self._question.usual, seconds)]


class BackendSubject(TaskSubject):
    """Candidates are the backends that can run the op; of Triton, one for each tile: "triton" with the usual one, and
    "triton 64x64x32, ..." with another."""

    def heuristic(self) -> str:
        op, args = self.task.ops(self.task.first)[0]
        with use_backend("auto"):
            module = choose_automatically(op, args).__name__
        return next(name for name, path in MODULES.items() if path == module)

    def candidates(self) -> dict[str, Callable[[], Prepared]]:
        found: dict[str, Callable[[], Prepared]] = {}
        for backend in MODULES:
            if self.task.why_not(backend):
                continue
            if backend == TRITON:
                tiles = self._tiles()
                usual = next(iter(tiles))
                found |= {TRITON if name == usual else f"{TRITON} {name}": make for name, make in tiles.items()}
            else:
                found[backend] = self._on(backend)
        return found

    def compiled_candidates(self) -> dict[str, Callable[[], Prepared]]:
        return {name: prepare for name, prepare in self.candidates().items() if name.startswith(TRITON)}

    def entries(self, found: Found) -> list[Entry]:
        backend, _, tile = found.winner.partition(" ")
        entry = Entry(self.op, self.key, backend, found.heuristic, found.seconds)
        if backend != TRITON:
            return [entry]
        usual = self._question.usual if self._question else ""
        return [entry, *self._tile_entry(found, tile or usual, found.seconds)]

    def _on(self, backend: str) -> Callable[[], Prepared]:
        return lambda: self.task.prepare(backend, lambda inputs: on_backend(backend, self.task.ours(inputs)))


class TrainingTileSubject(TaskSubject):
    """The tile of one of the three convolutions of a training step, which only Triton has."""

    task: ConvTrainingTask

    def make_key(self) -> Key:
        conv = self.task.site.conv
        x = empty_image(conv.input_shape(1), self.task)
        weight = empty_image(conv.weight_shape, self.task)
        key = plan_key.level_key(x, weight, ConvSettings.of(*conv.settings))
        return (*with_batch(key, self.task.batch_size), self.task.site.normed)

    def heuristic(self) -> str:
        return next(iter(self.candidates()))

    def candidates(self) -> dict[str, Callable[[], Prepared]]:
        return self._tiles()

    def entries(self, found: Found) -> list[Entry]:
        return [*super().entries(found), *self._tile_entry(found, found.winner, found.seconds)]


def op_of(task: OpTask) -> str:
    """The op that a task is about."""
    return task.product if isinstance(task, ConvTrainingTask) else _for_one_image(task)[0]


def with_batch(key: Key, batch_size: int) -> Key:
    """The key of the same with another batch size: the first number of its shape."""
    return ((batch_size, *key[0][1:]), *key[1:])


def empty_image(shape: tuple[int, ...], task: OpTask) -> Tensor:
    """Channels_last, of the task's dtype and device."""
    return torch.empty(shape, dtype=task.dtype, device=task.device, memory_format=torch.channels_last)


def _for_one_image(task: OpTask) -> tuple[str, tuple[Any, ...]]:
    """Op and arguments as the task has them, but of one image: a key is made in no time."""
    twin = copy.copy(task)
    for name in ("input_sets", "_exact"):
        twin.__dict__.pop(name, None)
    twin.batch_size = 1
    with torch.random.fork_rng([task.device] if task.device.type == "cuda" else []):
        return twin.ops(twin.make_inputs())[0]
