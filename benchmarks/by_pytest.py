"""One task of ``fused_resnet/bench/suite`` measured by pytest-benchmark: what all bench_*.py share."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch

from benchmarks.device_clock import Moment, before_each_round
from fused_resnet.bench.result import OP
from fused_resnet.bench.roofline import Ceilings, measure_ceilings
from fused_resnet.bench.suite.measure import describe
from fused_resnet.bench.suite.task import Contender, Task

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if ON_GPU else (torch.float32,)
FEWEST_ROUNDS, MOST_ROUNDS, WARMUP_ROUNDS = 5, 50, 2
SECONDS = 0.5
"""Of the measured rounds of one case, unless the fewest take longer."""
FLUSHED_FROM = 32
"""Images, from which on a GPU's L2 cache is overwritten before each round of an op: below, its inputs would be found
in the cache in a network too, and the GB/s may pass those of memory."""

device_time = pytest.mark.benchmark(timer=Moment if ON_GPU else time.perf_counter)
"""The device's time, by CUDA events, on a GPU."""


def cases(
    tasks: Iterable[Task], contenders: Sequence[Contender], is_quick: Callable[[Task], bool] = lambda task: False
) -> Any:
    """Parametrises a test with every ``task`` and every ``contender``.

    Args:
        is_quick: of a task, whether ``--quick`` keeps it; torch.compile, which takes long to set up, never is.
    """
    return pytest.mark.parametrize(
        ("task", "contender", "is_quick"),
        [
            pytest.param(
                task,
                contender,
                is_quick(task) and "compile" not in contender.name,
                id=f"{describe(task).title}-{contender.name}",
            )
            for task in tasks
            for contender in contenders
        ],
    )


def named(contenders: Iterable[Contender], *names: str) -> list[Contender]:
    """The contenders of these names, in their order.

    Raises:
        ValueError: there is none of a name.
    """
    found = {contender.name: contender for contender in contenders}
    for name in names:
        if name not in found:
            raise ValueError(f"a contender must be one of {', '.join(found)}; got {name!r}")
    return [found[name] for name in names]


def measure(benchmark: Any, task: Task, contender: Contender) -> None:
    """Times the contender, and notes beside it whether its numbers are right and what they are worth.

    Skipped, with the reasons, if it cannot do the task here. ``extra_info`` gets "accuracy" ("right", or "wrong: " and
    why, against float64 by the project's rule), "error", "bytes" (counted, of this contender), "flop", and of its
    median time "gigabytes_per_second", "gigaflop_per_second" and "roofline_fraction": the least time that the two
    ceilings, measured in the same session, allow for ``least_bytes`` and the operations, over the median.
    """
    task = live(task)
    if reasons := contender.why_absent(task):
        pytest.skip("; ".join(reasons))
    start = time.perf_counter()
    prepared = contender.prepare(task)
    _synchronize()
    setup_seconds = time.perf_counter() - start
    try:
        error, wrong = task.why_wrong(prepared)
        flush = task.level == OP and task.batch_size >= FLUSHED_FROM
        benchmark.group = describe(task).title
        benchmark.pedantic(
            prepared.run,
            setup=before_each_round(task.device, flush),
            rounds=rounds_for(_seconds_of(prepared.run)),
            warmup_rounds=WARMUP_ROUNDS,
        )
        benchmark.extra_info.update(
            contender=contender.name,
            batch_size=task.batch_size,
            dtype=str(task.dtype).removeprefix("torch."),
            accuracy="right" if wrong is None else f"wrong: {wrong}",
            error=error,
            setup_seconds=setup_seconds,
            l2_cache="flushed" if flush and task.device.type == "cuda" else "as it is",
            saved_bytes=prepared.saved_bytes(),
        )
        note_speed(benchmark, task, prepared.moved_bytes())
    finally:
        prepared.close()


@functools.lru_cache(maxsize=1)
def live(task: Task) -> Task:
    """A task that may make its weights and exact results, for all contenders in a row: the last one only, since the
    parameters of every test live as long as the session."""
    return copy.copy(task)


def rounds_for(seconds: float) -> int:
    """So many that they take `SECONDS` together, within limits."""
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, math.ceil(SECONDS / max(seconds, 1e-9))))


def note_speed(benchmark: Any, task: Task, moved: int | None) -> None:
    """What the median time makes of the bytes and operations."""
    least: int | None = task.least_bytes() if hasattr(task, "least_bytes") else moved
    flop = task.flop()
    benchmark.extra_info.update(bytes=moved, least_bytes=least, flop=flop)
    if benchmark.stats is None:  # under --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    if moved is not None:
        benchmark.extra_info["gigabytes_per_second"] = moved / seconds / 1e9
    if flop:
        benchmark.extra_info["gigaflop_per_second"] = flop / seconds / 1e9
    if task.level != OP:
        benchmark.extra_info["images_per_second"] = task.batch_size / seconds
    if least is not None:
        best = ceilings(task.device, task.dtype)
        benchmark.extra_info["ceilings"] = {name: float(value) for name, value in vars(best).items()}
        benchmark.extra_info["roofline_fraction"] = best.fraction(seconds, least, flop or 0)


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Of this session."""
    return measure_ceilings(device, dtype)


def _seconds_of(run: Any) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
