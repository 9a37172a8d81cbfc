"""Something to decide for one shape (a backend, tile or method): its name in a plan, who takes part, what is kept."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.suite.op_base import OpTask, on_backend, without_gradients
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceInputs, ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import ConvTrainingTask
from fused_resnet.bench.suite.task import Prepared, Results
from fused_resnet.bench.tune.fastest import Found
from fused_resnet.ops.backends.native.conv import NativeConv, why_not_native
from fused_resnet.ops.plan import measured_plan, plan_key
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.route.choose import choose_automatically, use_backend
from fused_resnet.ops.route.reasons import MODULES, unavailable

TRITON = "triton"
Result = TypeVar("Result")
Candidates = dict[str, Callable[[], Prepared]]
"""By name, functions that make one ready; they raise where it cannot run after all."""


@dataclass(frozen=True)
class Entry:
    """One decision as it is recorded: the arguments of ``measured_plan.record``."""

    op: str
    key: Key
    winner: str
    heuristic: str | None
    seconds: dict[str, float]


class Subject(ABC):
    """One question of one shape. Cheap until something is made ready.

    Attributes:
        title: for people.
        op: under which the answer is kept.
        device: where it is measured.
        compiles: whether candidates are compiled by Triton, which several processes can do at once.
    """

    title: str
    op: str
    device: torch.device
    compiles = False

    @functools.cached_property
    def key(self) -> Key:
        """With `op`, where the answer is kept."""
        return self.make_key()

    @abstractmethod
    def make_key(self) -> Key: ...

    @abstractmethod
    def heuristic(self) -> str:
        """The candidate that is chosen where nothing was measured."""

    @abstractmethod
    def candidates(self) -> Candidates: ...

    def compiled_candidates(self) -> Candidates:
        """Those that launch kernels of Triton."""
        return self.candidates() if self.compiles else {}

    @abstractmethod
    def why_wrong(self, prepared: Prepared) -> str | None:
        """What is wrong with a candidate's numbers, or None."""

    def entries(self, found: Found) -> list[Entry]:
        """What is kept. The first is that of `op` and `key`."""
        return [Entry(self.op, self.key, found.winner, found.heuristic, found.seconds)]

    @abstractmethod
    def release(self) -> None:
        """Gives back memory that was taken for this."""


class TaskSubject(Subject):
    """A task of the benchmark suite as a question: it has the inputs, and knows which numbers are right.

    Args:
        most_tiles: of a Triton kernel, beside the usual one; None for all.
    """

    def __init__(self, task: Any, most_tiles: int | None = None) -> None:
        self.task, self.device, self._most_tiles = task, task.device, most_tiles
        self.title = f"{task.subject} x {task.batch_size} {dtype_name(task.dtype)}"
        self.op = op_of(task)
        self.compiles = not unavailable(TRITON)
        self._question: TileQuestion | None = None

    def why_wrong(self, prepared: Prepared) -> str | None:
        return self.task.why_wrong(prepared)[1]

    def release(self) -> None:
        self.task.release()

    def _tiles(self) -> Candidates:
        """Triton with every tile that it could take, by ``str`` of the tile, its usual one first."""
        asked = questions(on_backend(TRITON, self.task.ours(self.task.first)))
        if len(asked) != 1:  # a pass has one tile for all shapes
            return {"": self._in_tiles(None)}
        self._question = asked[0]
        others = [name for name in self._question.names if name != self._question.usual]
        names = [self._question.usual, *others[: self._most_tiles]]
        return {name: self._in_tiles(choosing({self._question.plan_key: name})) for name in names}

    def _in_tiles(self, chooser: Callable[..., Any] | None) -> Callable[[], Prepared]:
        def make(inputs: Any) -> Callable[[], Results]:
            return with_tiles(chooser, on_backend(TRITON, self.task.ours(inputs)))

        return lambda: self.task.prepare(TRITON, make)

    def _tile_entry(self, tile: str, seconds: dict[str, float]) -> list[Entry]:
        if self._question is None or not tile:
            return []
        return [Entry(measured_plan.TILES, self._question.plan_key, tile, self._question.usual, seconds)]


class BackendSubject(TaskSubject):
    """Which backend runs an op. Candidates are those that can; of Triton, one for each tile: "triton" with the usual
    one, and "triton 64x64x32, ..." with another."""

    def make_key(self) -> Key:
        return with_batch(plan_key.key_of(*_for_one_image(self.task)), self.task.batch_size)

    def heuristic(self) -> str:
        op, args = self.task.ops(self.task.first)[0]
        with use_backend("auto"):
            module = choose_automatically(op, args).__name__
        return next(name for name, path in MODULES.items() if path == module)

    def candidates(self) -> Candidates:
        found: Candidates = {}
        for backend in MODULES:
            if self.task.why_not(backend):
                continue
            if backend == TRITON:
                tiles = self._tiles()
                usual = next(iter(tiles))
                found |= {TRITON if name == usual else f"{TRITON} {name}": make for name, make in tiles.items()}
            else:
                found[backend] = functools.partial(self.task.prepare, backend, functools.partial(self._on, backend))
        return found

    def compiled_candidates(self) -> Candidates:
        return {name: prepare for name, prepare in self.candidates().items() if name.startswith(TRITON)}

    def entries(self, found: Found) -> list[Entry]:
        backend, _, tile = found.winner.partition(" ")
        entry = Entry(self.op, self.key, backend, found.heuristic, found.seconds)
        usual = self._question.usual if self._question else ""
        return [entry, *(self._tile_entry(tile or usual, found.seconds) if backend == TRITON else [])]

    def _on(self, backend: str, inputs: Any) -> Callable[[], Results]:
        return on_backend(backend, self.task.ours(inputs))


class TrainingTileSubject(TaskSubject):
    """The tile of one of the three convolutions of a training step, which only Triton has."""

    def make_key(self) -> Key:
        conv, task = self.task.site.conv, self.task
        x, weight = (empty_image(shape, task.dtype, task.device) for shape in (conv.input_shape(1), conv.weight_shape))
        return (
            *with_batch(plan_key.level_key(x, weight, conv.settings), task.batch_size),
            task.site.normed,
        )

    def heuristic(self) -> str:
        return next(iter(self.candidates()))

    def candidates(self) -> Candidates:
        return self._tiles()

    def entries(self, found: Found) -> list[Entry]:
        return [*super().entries(found), *self._tile_entry(found.winner, found.seconds)]


class MethodSubject(TaskSubject):
    """How our own C++ convolves on the CPU, in a frozen network. Candidates are the methods of ``csrc/cpu/conv.h`` that
    can do a convolution; there are none where it runs otherwise."""

    def __init__(self, task: ConvInferenceTask) -> None:
        super().__init__(task)
        self.title, self.op, self.compiles = f"frozen {self.title}", measured_plan.METHOD, False
        self._x_shape = task.site.conv.input_shape(task.batch_size)

    def make_key(self) -> Key:
        conv = self.task.site.conv
        return plan_key.method_key(self._x_shape, self.task.dtype, conv.weight_shape, conv.settings)

    def heuristic(self) -> str:
        assert self._like is not None
        return self._like.estimated(self._x_shape, self.task.dtype)

    def candidates(self) -> Candidates:
        return {} if self._like is None else {method: self._by(method) for method in self._like.candidates}

    def release(self) -> None:
        super().release()
        self.__dict__.pop("_like", None)

    @functools.cached_property
    def _like(self) -> NativeConv | None:
        """A convolution of the same shape, of no particular weights; None if it does not run in our own C++."""
        conv = self.task.site.conv
        weight = torch.zeros(conv.weight_shape, dtype=self.task.dtype, device=self.device)
        if why_not_native(weight[:1], weight, conv.settings):
            return None
        return NativeConv(weight, torch.zeros(conv.weight_shape[0]), conv.settings, False)

    def _by(self, method: str) -> Callable[[], Prepared]:
        def make(inputs: ConvInferenceInputs) -> Callable[[], Results]:
            native = NativeConv(*inputs.folded, inputs.settings, inputs.relu, method)
            return without_gradients(lambda: [native(inputs.x, inputs.residual)])

        return lambda: self.task.prepare(method, make)


def op_of(task: OpTask) -> str:
    """The op that a task is about."""
    return task.product if isinstance(task, ConvTrainingTask) else _for_one_image(task)[0]


def with_batch(key: Key, batch_size: int) -> Key:
    """The key of the same with another batch size: the first number of its shape."""
    return ((batch_size, *key[0][1:]), *key[1:])


def empty_image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def _for_one_image(task: OpTask) -> tuple[str, tuple[Any, ...]]:
    """Op and arguments as the task has them, but of one image: a key is made in no time."""
    twin = copy.copy(task)
    twin.__dict__.pop("input_sets", None)
    twin.batch_size = 1
    with torch.random.fork_rng([task.device] if task.device.type == "cuda" else []):
        return twin.ops(twin.make_inputs())[0]


@dataclass(frozen=True)
class TileQuestion:
    """What a kernel asks before a launch: the names of all tiles that are legal for this call, and of the usual one,
    which the cost model takes. ``plan_key`` is of ``measured_plan.TILES``: the kernel's name, then its key."""

    plan_key: Key
    names: tuple[str, ...]
    usual: str


def questions(call: Callable[[], object]) -> list[TileQuestion]:
    """Everything that Triton kernels ask during a call, each question once. The call must not fail."""
    found: dict[Key, TileQuestion] = {}

    def note(kernel: str, key: Key, candidates: Any, usual: Any) -> None:
        question = TileQuestion((kernel, *key), tuple(map(str, candidates)), str(usual))
        found[question.plan_key] = question

    with_tiles(note, call)()
    return [*found.values()]


def choosing(tiles: Mapping[Key, str]) -> Callable[..., str | None]:
    """A chooser that gives the tiles of a plan: by kernel and key."""
    return lambda kernel, key, candidates, usual: tiles.get((kernel, *key))


def with_tiles(chooser: Callable[..., Any] | None, call: Callable[[], Result]) -> Callable[[], Result]:
    """The same call, in which Triton kernels ask ``chooser``. It stays the one who is asked, so that the next such call
    with the same chooser finds the answers remembered: what is timed is not the search for a tile. In the end
    ``choose_tiles_by(None)`` makes the kernels' tiles the cost models' again."""

    def run() -> Result:
        measured_plan.choose_tiles_by(chooser)
        return call()

    return run
