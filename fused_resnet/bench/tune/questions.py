"""Every question that the shapes of some networks ask, each once: which backend, tile, method or level is fastest."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.sites import Convolution, conv_sites
from fused_resnet.bench.suite.op_base import Call, OpTask, on_backend, without_gradients
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceInputs, ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import ConvTrainingTask
from fused_resnet.bench.suite.op_stem import StemTask
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.suite.task_lists import op_tasks
from fused_resnet.bench.tune.level_task import LevelStep, LevelTask
from fused_resnet.ops.backends.native.conv import NativeConv, why_no_kernels, why_not_native
from fused_resnet.ops.plan import measured_plan, plan_key
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.route.choose import choose_automatically, use_backend
from fused_resnet.ops.route.context import use_fusion_level
from fused_resnet.ops.route.fusion_level import highest_level, training_level
from fused_resnet.ops.route.reasons import MODULES, unavailable, why_not_device

MODES = {"inference": INFERENCE, "training": TRAINING_STEP}
TRITON = "triton"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Selection:
    """What is tuned: builders of this package; of each mode ("inference", "training") its batch sizes; and the most
    tiles of a kernel beside the usual one, None for all: fewer for a run that only shows that it runs."""

    models: tuple[str, ...]
    batch_sizes: dict[str, tuple[int, ...]]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    image_size: int
    most_tiles: int | None = None


class Candidate(NamedTuple):
    """``prepare`` makes it ready, or raises where it cannot run after all; ``answer`` is what is kept if it wins, and
    beside it the ``tile`` that it ran in, with the question that it answers."""

    prepare: Callable[[], Prepared]
    answer: str
    tile: tuple[TileQuestion, str] | None = None


@dataclass(frozen=True)
class Question:
    """One decision for one shape.

    Attributes:
        title: for people.
        op, key: under which the answer is kept, as ``measured_plan.record`` takes them.
        task: has the inputs, and knows which numbers are right.
        ask: gives the name of the candidate that is chosen where nothing was measured, and all candidates by name.
    """

    title: str
    op: str
    key: Key
    task: OpTask
    ask: Callable[[], tuple[str, dict[str, Candidate]]]


def questions(selection: Selection, tiles: dict[Key, str]) -> list[Question]:
    """In the order in which they are measured: convolutions and passes, the methods of a frozen network on the CPU, the
    tiles of the training convolutions, and the levels, in which those ``tiles`` are used (as in a plan; looked at when
    a candidate is made ready)."""
    device, tasks = selection.device, list[OpTask]()
    for mode, sizes in selection.batch_sizes.items():
        where = (device, selection.image_size)
        tasks += op_tasks(selection.models, [MODES[mode]], sizes, selection.dtypes, *where)  # type: ignore[arg-type]
    found: dict[tuple[str, Key], Question] = {}
    for asked in (
        map(functools.partial(which_backend, selection.most_tiles), filter(_has_a_choice, tasks)),
        map(which_method, [task for task in tasks if isinstance(task, ConvInferenceTask) and device.type == "cpu"]),
        map(functools.partial(which_tile, selection.most_tiles), filter(_is_fused_by_triton, tasks)),
        map(functools.partial(which_level, tiles), _level_tasks(selection)),
    ):
        for question in filter(None, asked):
            found.setdefault((question.op, question.key), question)
    return [*found.values()]


def _has_a_choice(task: OpTask) -> bool:
    """False of what no network runs on this device, and of what has questions of its own."""
    on_gpu = task.device.type == "cuda"
    if isinstance(task, ConvTrainingTask) or (isinstance(task, StemTask) and not on_gpu):
        return False
    op, _ = _for_one_image(task)
    only_cuda = op.endswith("_mask") or op == "bn_stats_apply"  # as ``ops/route/routes.py`` has it
    return op in plan_key.CHOSEN_OPS and not (only_cuda and (unavailable("cuda") or not on_gpu))


def _is_fused_by_triton(task: OpTask) -> bool:
    fusable = isinstance(task, ConvTrainingTask) and task.site.conv.groups == 1
    return fusable and not why_not_device(TRITON, task.device)


def _level_tasks(selection: Selection) -> Iterator[LevelTask]:
    """Where the kernels take the convolution; of one shape the place that gains most first."""
    device, triton = selection.device, not why_not_device(TRITON, selection.device)
    native = device.type == "cpu" and not why_no_kernels(torch.float32)
    if "training" in selection.batch_sizes and (triton or native):
        places = {site: None for name in selection.models for site in conv_sites(name, selection.image_size)}
        # On the CPU the stem, whose input takes no gradient, stays at level 0.
        sites = [site for site in places if site.conv.groups == 1 and (triton or site.takes_gradient)]
        for site in sorted(sites, key=lambda site: not site.normed):
            for dtype in selection.dtypes if triton else set(selection.dtypes) & {torch.float32}:
                yield from (LevelTask(site, size, dtype, device) for size in selection.batch_sizes["training"])


def which_backend(most_tiles: int | None, task: OpTask) -> Question:
    """Candidates are those that can; of Triton, one for each tile: "triton" with the usual one, and "triton 64x64x32,
    ..." with another."""
    op, arguments = _for_one_image(task)

    def ask() -> tuple[str, dict[str, Candidate]]:
        found: dict[str, Candidate] = {}
        for backend in MODULES:
            if task.why_not(backend):
                continue
            if backend == TRITON:
                usual, *others = _in_tiles(task, most_tiles, answer=TRITON)
                found |= {TRITON: usual} | {f"{TRITON} {other.tile[1]}": other for other in others if other.tile}
            else:
                found[backend] = _candidate(task, backend, functools.partial(_on, backend, task))
        with use_backend("auto"):
            module = choose_automatically(*task.ops(task.first)[0]).__name__
        return next(name for name, path in MODULES.items() if path == module), found

    return Question(_title(task), op, _with_batch(plan_key.key_of(op, arguments), task), task, ask)


def which_tile(most_tiles: int | None, task: ConvTrainingTask) -> Question:
    """Of one of the three convolutions of a training step, which only Triton has."""

    def ask() -> tuple[str, dict[str, Candidate]]:
        found = {candidate.answer: candidate for candidate in _in_tiles(task, most_tiles)}
        return next(iter(found)), found

    key = (*_with_batch(_level_key(task.site.conv, task), task), task.site.normed)
    return Question(_title(task), task.product, key, task, ask)


def which_method(task: ConvInferenceTask) -> Question | None:
    """How our own C++ convolves on the CPU, in a frozen network: by one of the methods of ``csrc/cpu/conv.h`` that can
    do this convolution. None where there is no choice."""
    conv, x_shape = task.site.conv, task.site.conv.input_shape(task.batch_size)
    weight = torch.zeros(conv.weight_shape, dtype=task.dtype)
    if why_not_native(weight[:1], weight, conv.settings):
        return None
    like = NativeConv(weight, torch.zeros(len(weight)), conv.settings, False)
    usual, methods = like.estimated(x_shape, task.dtype), like.candidates

    def by(method: str, inputs: ConvInferenceInputs) -> Call:
        arguments: Any = (*inputs.folded, inputs.settings, inputs.relu, method)
        native = NativeConv(*arguments)
        return without_gradients(lambda: [native(inputs.x, inputs.residual)])

    def ask() -> tuple[str, dict[str, Candidate]]:
        return usual, {method: _candidate(task, method, functools.partial(by, method)) for method in methods}

    key = plan_key.method_key(x_shape, task.dtype, conv.weight_shape, conv.settings)
    question = Question(f"frozen {_title(task)}", measured_plan.METHOD, key, task, ask)
    return question if len(methods) > 1 else None


def which_level(tiles: dict[Key, str], task: LevelTask) -> Question:
    """From "0" to the highest level of the device, where the kernels take the convolution."""

    def at(level: int, step: LevelStep) -> Call:
        call: Any = functools.partial(step.run, level)
        return call if unavailable(TRITON) else with_tiles(choosing(tiles) if tiles else None, call)

    def ask() -> tuple[str, dict[str, Candidate]]:
        x, weight = task.first.inputs.x, task.first.inputs.weight
        with use_backend("auto"), use_fusion_level(None):
            usual = training_level(x, weight, *task.site.conv.settings)
            levels = range(highest_level(x) + 1) if usual else (0,)
        found = {str(level): _candidate(task, str(level), functools.partial(at, level)) for level in levels}
        return str(usual), found

    return Question(_title(task), measured_plan.LEVEL, _with_batch(_level_key(task.site.conv, task), task), task, ask)


def _in_tiles(task: OpTask, most: int | None, answer: str | None = None) -> list[Candidate]:
    """Triton with every tile that it could take, its usual one first; the answer is the tile if not given."""
    asked = tile_questions(on_backend(TRITON, task.ours(task.first)))
    make = functools.partial(_on, TRITON, task)
    if len(asked) != 1:  # a pass has one tile for all shapes
        return [Candidate(lambda: task.prepare(TRITON, lambda inputs: with_tiles(None, make(inputs))), answer or "")]
    (question,) = asked
    others = [name for name in question.names if name != question.usual]

    def in_tile(name: str) -> Candidate:
        chooser = choosing({question.plan_key: name})
        tiled: Callable[[Any], Call] = lambda inputs: with_tiles(chooser, make(inputs))  # noqa: E731
        return Candidate(lambda: task.prepare(TRITON, tiled), answer or name, (question, name))

    return list(map(in_tile, [question.usual, *others[:most]]))


def _candidate(task: OpTask, name: str, make: Callable[[Any], Call]) -> Candidate:
    """What is named and kept alike; ``make`` as of ``OpTask.prepare``."""
    return Candidate(lambda: task.prepare(name, make), name)


def _on(backend: str, task: OpTask, inputs: Any) -> Call:
    return on_backend(backend, task.ours(inputs))


def _title(task: OpTask) -> str:
    return f"{task.subject} x {task.batch_size} {dtype_name(task.dtype)}"


def _with_batch(key: Key, task: OpTask) -> Key:
    """A key of one image with the task's batch size in its place: the first number of its shape."""
    return ((task.batch_size, *key[0][1:]), *key[1:])


def _level_key(conv: Convolution, task: OpTask) -> Key:
    """Of one image."""

    def empty(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=task.dtype, device=task.device, memory_format=torch.channels_last)

    return plan_key.level_key(empty(conv.input_shape(1)), empty(conv.weight_shape), conv.settings)


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


def tile_questions(call: Callable[[], object]) -> list[TileQuestion]:
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
