"""Compiles the Triton kernels that some networks need, on all cores at once, into Triton's cache.

    python -m benchmarks.compile_kernels --model resnet18 resnet50 --batch-size 32 256 --jobs 16 [--budget 200]

Triton compiles a kernel in the process that first launches it, one after the other. Here every call of an op of this
package that the networks make, in training and in inference, is listed first, by running them for their shapes only
(``fused_resnet/bench/dry_run.py``); then a pool of processes makes these calls on empty tensors of the same shapes,
dtypes and strides, each batch size of one shape in the same process, since they mostly share a kernel. What is compiled
is found in TRITON_CACHE_DIR by every later process.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.bench.sites import ADDED, SHORTCUT, conv_sites
from fused_resnet.bench.suite.subjects import builder_names
from fused_resnet.bench.training_ledger import DryStep
from fused_resnet.ops import use_backend
from fused_resnet.ops.route.choose import why_not

LEVELS = (0, 3)
"""Of training: the passes beside the convolutions, and what is fused into them."""

MIDDLE = 4  # of 3x3

Shape = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]
Call = tuple[str, tuple[Any, ...]]
"""The name of an op, and its arguments; in the place of tensors what `empty` makes them from."""


def main(words: list[str] | None = None) -> int:
    """0; 1 if a kernel could not be compiled and launched; 75 if there was no time for all."""
    arguments = parse(words)
    torch.set_num_threads(1)
    found = dict.fromkeys(
        call
        for name in arguments.model
        for batch in arguments.batch_size
        for dtype in arguments.dtype
        for call in calls_of(name, batch, getattr(torch, dtype), arguments.image_size)
    )
    groups = grouped(found)
    print(f"{len(found)} calls in {len(groups)} groups, {arguments.jobs} processes", flush=True)
    return compile_all(groups, arguments.backend, arguments.device, arguments.jobs, arguments.budget)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", choices=builder_names(), default=["resnet18", "resnet50"], metavar="NAME")
    add("--batch-size", nargs="+", type=int, default=[256], metavar="N")
    add("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    add("--image-size", type=int, default=224, metavar="PIXELS")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--budget", type=float, default=math.inf, metavar="SECONDS")
    add("--backend", default="triton", help="(default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    return parser.parse_args(words)


def calls_of(name: str, batch: int, dtype: torch.dtype, image_size: int) -> list[Call]:
    """Every call of an op of this package in a training step at each of `LEVELS`, and in a frozen network."""
    found: dict[Call, None] = {}
    for level in LEVELS:
        with _Recorder() as recorder:
            DryStep(name, level, batch, dtype, image_size).ledger()
        found |= dict.fromkeys(recorder.calls)
    for site in conv_sites(name, image_size):
        x, weight, out = site.conv.input_shape(batch), site.conv.weight_shape, site.conv.output_shape(batch)
        residual = _image(out, dtype) if site.behind == ADDED else None
        vector = ("tensor", (weight[0],), (1,), torch.float32)
        settings = tuple(tuple(part) if isinstance(part, list) else part for part in site.conv.settings)
        arguments = (_image(x, dtype), _image(weight, dtype), vector, vector, residual, *settings)
        found["conv_bn_act", (*arguments, site.behind != SHORTCUT)] = None
    return list(found)


def grouped(calls: Iterable[Call]) -> list[list[Call]]:
    """Calls that differ in the batch size only, together; those of the longest kernels to compile first."""
    groups: dict[Any, list[Call]] = {}
    for call in calls:
        groups.setdefault((call[0], tuple(map(_without_batch, call[1]))), []).append(call)
    return sorted(groups.values(), key=lambda group: not group[0][0].startswith("conv"))


def compile_all(groups: Sequence[list[Call]], backend: str, device: str, jobs: int, budget: float = math.inf) -> int:
    """Makes the calls in a pool of processes, and prints what could not be made; the status as of `main`."""
    end = time.monotonic() + budget
    failures, done, refused = list[str](), 0, 0
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    waiting = [pool.submit(make, group, backend, device) for group in groups]
    try:
        for future in concurrent.futures.as_completed(waiting, timeout=None if budget == math.inf else budget):
            made, not_taken, wrong = future.result()
            done, refused, failures = done + made, refused + not_taken, failures + wrong
            if time.monotonic() > end:
                break
    except concurrent.futures.TimeoutError:
        pass
    late = sum(not future.done() for future in waiting)
    pool.shutdown(wait=True, cancel_futures=True)  # those at work finish their group
    for failure in failures:
        print(f"failed: {failure}")
    print(
        f"{done} calls made, {refused} not for {backend}, {len(failures)} failed, {late} groups left for want of time"
    )
    return 1 if failures else 75 if late else 0


def make(calls: list[Call], backend: str, device: str) -> tuple[int, int, list[str]]:
    """In a process of the pool: (calls made, calls that the backend does not take, what failed)."""
    torch.set_num_threads(1)
    made, refused, failures = 0, 0, list[str]()
    for op, described in calls:
        try:
            arguments = tuple(empty(value, device) for value in described)
            if why_not(backend, op, *arguments):
                refused += 1
                continue
            with use_backend(backend), torch.no_grad():
                getattr(torch.ops.fused_resnet, op)(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
            made += 1
        except Exception as error:  # whatever it is: it is told, and the others go on
            text = str(error).strip().splitlines() or [""]
            failures.append(f"{op} {_shapes(described)}: {type(error).__name__}: {text[-1]}")
        finally:
            arguments = ()
            if device == "cuda":
                torch.cuda.empty_cache()
    return made, refused, failures


def empty(value: Any, device: str) -> Any:
    """The argument that was described. The values of an activation are what the memory holds; those of bytes, which are
    places in a window of the pooling, are of its middle, so that they are never outside the image."""
    if isinstance(value, tuple) and value[:1] == ("tensor",):
        _, shape, stride, dtype = value
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return tensor if dtype.is_floating_point else tensor.fill_(MIDDLE)
    return list(value) if isinstance(value, tuple) else value


class _Recorder(TorchDispatchMode):
    """Sees every op of this package, above the mode that leaves its work undone."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_resnet":
            arguments = list(args)
            arguments += [argument.default_value for argument in func._schema.arguments[len(args) :]]
            self.calls.append((func._schema.name.partition("::")[2], tuple(map(_described, arguments))))
        return func(*args, **(kwargs or {}))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), tuple(value.stride()), value.dtype
    return tuple(value) if isinstance(value, list) else value


def _image(shape: tuple[int, ...], dtype: torch.dtype) -> Shape:
    like = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    return _described(like)


def _without_batch(value: Any) -> Any:
    if isinstance(value, tuple) and value[:1] == ("tensor",) and len(value[1]) == 4:
        return value[1][1:], value[3]
    if isinstance(value, float):  # the count of values behind a sum
        return "float"
    return value


def _shapes(described: tuple[Any, ...]) -> str:
    shapes = [value[1] for value in described if isinstance(value, tuple) and value[:1] == ("tensor",)]
    return " ".join("x".join(map(str, shape)) for shape in shapes if len(shape) == 4)


if __name__ == "__main__":
    raise SystemExit(main())
