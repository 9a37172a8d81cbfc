"""Triton's candidates compiled by several processes at once, to Triton's cache on disk; nothing is launched."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fused_resnet.bench.tune.sites import Selection, subjects
from fused_resnet.bench.tune.subject import Subject
from fused_resnet.ops.plan.measured_plan import ignoring_measured_plan

PATIENCE = 600.0
"""Seconds without any news, after which the processes are given up: one may have been killed for its memory."""


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Inside, Triton's kernels are compiled, or found in its cache, and not launched: what they would have written is
    arbitrary."""
    jit = importlib.import_module("triton.runtime.jit").JITFunction
    run = jit.run

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool = True, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    jit.run = compile_it
    try:
        yield
    finally:
        jit.run = run


def compile_subject(subject: Subject) -> int:
    """Compiles what the candidates launch; gives how many could be made ready. Whoever measures finds out about the
    others."""
    count = 0
    try:
        candidates = subject.compiled_candidates()  # before: a first kernel of all is launched to see whether it can be
        with compiling_only():
            for prepare in candidates.values():
                with contextlib.suppress(Exception):
                    prepare().close()
                    count += 1
    finally:
        subject.release()
    return count


def compile_one(selection: Selection, index: int) -> int:
    """The candidates of one subject, in a process of its own; -1 if that failed altogether."""
    try:
        with ignoring_measured_plan():
            return compile_subject(_subjects(selection)[index])
    except Exception:
        return -1


def compile_all(
    selection: Selection,
    wanted: Sequence[int],
    jobs: int,
    *,
    seconds: float = math.inf,
    work: Callable[[Selection, int], int] = compile_one,
    after_each: Callable[[], object] = lambda: None,
) -> int:
    """Compiles the candidates of these subjects, and gives of how many.

    Every process builds the same list of subjects, so that only numbers go between them. What is not done when the time
    is over is compiled when it is measured."""
    if not wanted or seconds <= 0:
        return 0
    done, end = 0, time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")  # a process with a CUDA context cannot be forked
    with context.Pool(min(jobs, len(wanted))) as pool:  # at its end the processes are terminated
        results = pool.imap_unordered(functools.partial(work, selection), wanted)
        for _ in wanted:
            try:
                done += results.next(max(0.0, min(PATIENCE, end - time.monotonic()))) >= 0
            except multiprocessing.TimeoutError:
                break
            after_each()
    return done


@functools.cache
def _subjects(selection: Selection) -> list[Subject]:
    return subjects(selection, {})
