"""What one op of the cuda backend costs the host, from Python, in microseconds.

    python -m benchmarks.bench_launch                    on a GPU: writes results/launch/<condition>.json
    python -m benchmarks.bench_launch --on-host          without one: the launches are skipped
    python -m benchmarks.bench_launch --on-host --profile bn_apply        where the time goes, by cProfile

Each op on a small tensor through ``torch.ops``, and most of what that consists of: an op of the same schema whose
Python body returns at once ("nothing"), the choice of the backend, and the backend's module; of the last, the function
of ``_C`` alone, its arguments made before. On a GPU also what eager runs, and Triton's launcher with and without
dispatcher. A sample is the time of many calls up to the last one's return, before the device has finished them: the
synchronisation behind them is timed apart, and if it takes long per call, the device was the slower of the two and the
sample says little about the host. Contenders take turns; medians, 20th and 80th percentiles. The target is less than
10 microseconds an op.

On the host the same Python and C++ runs on CPU tensors, with tests/cuda/host_execution in the place of CUDA's runtime:
`STATEMENT` says what that leaves out.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import gc
import json
import pstats
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_resnet.bench.machine import device_name, machine_facts
from fused_resnet.bench.norm_inputs import EPS, Norm
from fused_resnet.bench.passes import PASSES, STATS_APPLY, NormPass
from fused_resnet.bench.timer import Timing, rotate
from fused_resnet.ops import use_backend
from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.route import choose, reasons, routes
from fused_resnet.ops.route.packing import packed
from fused_resnet.ops.schemas import SCHEMAS

SHAPE, DTYPE = (2, 64, 4, 4), torch.bfloat16
TARGET = 10.0  # microseconds
WARMUP_ROUNDS = 3
RESULTS = Path(__file__).parent / "results" / "launch"  # results/*.json are those of README's tables
STATEMENT = (
    "On the host: CPU tensors, and the tests' own CUDA runtime (tests/cuda/host_execution, compiled with -O1), which "
    "checks and records each launch and runs none. CPU time of the process, in which other programs' turns are not. "
    "Not in these times: the CUDA driver's launch, two of them for some "
    "ops; the lookup of the current stream; torch's CUDA allocator, in whose place its CPU allocator runs."
)
DISPATCHER, NOTHING, CHOICE, MODULE, EXTENSION = "dispatcher", "nothing", "choice", "module", "extension"
TRITON, TRITON_MODULE, EAGER = "triton dispatcher", "triton module", "eager"

Calls = dict[str, Callable[[], object]]


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    if not arguments.on_host and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is usable; --on-host measures the host's part without one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), on_host() if arguments.on_host else contextlib.nullcontext() as machine:
            device = "cpu" if arguments.on_host else "cuda"
            if arguments.profile:
                profile(ops(device)[arguments.profile], arguments.calls)
            else:
                write(arguments, measured(arguments, device, machine), device)
    finally:
        torch.set_num_threads(threads)
    return 0


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--on-host", action="store_true", help="skip the launches: needs a C++ compiler and no GPU")
    add("--ops", nargs="+", metavar="OP", help="only these (default: all)")
    add("--calls", type=int, help="of each op in a sample (default: 1000; 100 on the host)")
    add("--rounds", type=int, default=60, help="samples of each (default: %(default)s)")
    add("--profile", metavar="OP", help="print cProfile's table of this op through the dispatcher, and write nothing")
    add("--output", type=Path, help="default: benchmarks/results/launch/<condition>.json")
    arguments = parser.parse_args(words)
    names = list(OP_NAMES)
    for name in [*(arguments.ops or []), *([arguments.profile] if arguments.profile else [])]:
        if name not in names:
            parser.error(f"an op is one of {', '.join(names)}; got {name!r}")
    arguments.ops = arguments.ops or names
    arguments.calls = arguments.calls or (100 if arguments.on_host else 1000)
    return arguments


@contextlib.contextmanager
def on_host() -> Iterator[Any]:
    """The cuda backend on CPU tensors, as the tests have it (tests/cuda/conftest.py), with launches skipped."""
    from tests.cuda.on_host import host

    machine, before = host(), cuda_launch.extension
    machine.reset()
    machine.skip_launches(True)
    cuda_launch.extension, cuda_launch.DEVICE_TYPE = machine.module, "cpu"
    routes.kept.clear()
    reasons.unavailable.cache_clear()
    try:
        yield machine
    finally:
        machine.reset()
        cuda_launch.extension, cuda_launch.DEVICE_TYPE = before, "cuda"
        routes.kept.clear()
        reasons.unavailable.cache_clear()


_NORM_PASSES = {
    norm_pass.name: norm_pass
    for norm_pass in [*PASSES, STATS_APPLY]
    if norm_pass.name != "bn_grad_apply recomputed, constant statistics"
}
OP_NAMES = (*_NORM_PASSES, "conv_bn_act", "stem", "avgpool")


class Op:
    """An op of the cuda backend and its arguments."""

    def __init__(self, name: str, arguments: tuple[Any, ...], eager: Callable[[], object]) -> None:
        self.name, self.arguments, self.eager = name, arguments, eager
        self.packed = packed(name, arguments)

    def calls(self, device: str) -> Calls:
        """The ways to call it, by name; through Triton only where it can."""
        through_dispatcher = functools.partial(getattr(torch.ops.fused_resnet, self.name), *self.arguments)
        found: Calls = {
            DISPATCHER: through_dispatcher,
            NOTHING: functools.partial(op_that_does_nothing(self.name, through_dispatcher()), *self.arguments),
            CHOICE: functools.partial(choose.choose, self.name, self.arguments),
            MODULE: functools.partial(getattr(reasons.module("cuda"), self.name), *self.packed),
            EXTENSION: recorded(self),
        }
        if device == "cuda":
            found[EAGER] = self.eager
            if not choose.why_not("triton", self.name, *self.arguments):
                found[TRITON] = through_dispatcher
                found[TRITON_MODULE] = functools.partial(getattr(reasons.module("triton"), self.name), *self.packed)
        return found


def ops(device: str) -> dict[str, Op]:
    """All of them, on small tensors of random numbers."""
    torch.manual_seed(0)
    norm = Norm(SHAPE, DTYPE, device)
    found = {name: _of_norm(norm_pass, norm) for name, norm_pass in _NORM_PASSES.items()}
    channels = SHAPE[1]
    scale, shift = norm.weight, norm.bias

    def image(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(DTYPE).contiguous(memory_format=torch.channels_last)

    weight, bias = image(channels, channels, 1, 1), shift.to(DTYPE)
    arguments = (norm.x, weight, scale, shift, None, [1, 1], [0, 0], [1, 1], 1, True)
    found["conv_bn_act"] = Op("conv_bn_act", arguments, lambda: F.conv2d(norm.x, weight, bias).relu_())
    x, stem_weight = image(1, 3, 16, 16), image(channels, 3, 7, 7)
    found["stem"] = Op(
        "stem",
        (x, stem_weight, scale, shift, None, None),
        lambda: F.max_pool2d(F.conv2d(x, stem_weight, bias, 2, 3).relu_(), 3, 2, 1),
    )
    found["avgpool"] = Op("avgpool", (norm.x,), lambda: F.adaptive_avg_pool2d(norm.x, 1))
    return found


def _of_norm(norm_pass: NormPass, norm: Norm) -> Op:
    return Op(norm_pass.op, norm_pass.arguments(norm), functools.partial(norm_pass.eager, norm))


class _Keep(TorchDispatchMode):
    """Keeps every tensor that is made, so that addresses stay those of live memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.kept.append(func(*args, **(kwargs or {})))
        return self.kept[-1]


def recorded(op: Op) -> Callable[[], object]:
    """The function of ``_C.cuda`` that the backend launches this op with (they return None, what it asks for a size
    does not), and the arguments that it was given."""
    real, launches = cuda_launch.extension, []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            value = getattr(real.cuda, name)
            return functools.partial(noted, value) if callable(value) else value

    def noted(function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        if result is None:
            launches.append(functools.partial(function, *arguments))
        return result

    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    cuda_launch.extension = SimpleNamespace(**{**names, "cuda": Recorder()})
    try:
        with _Keep() as mode:
            getattr(reasons.module("cuda"), op.name)(*op.packed)
    finally:
        cuda_launch.extension = real
    (launch,) = launches
    launch.__dict__["kept"] = mode.kept
    return launch


def measured(arguments: argparse.Namespace, device: str, machine: Any) -> dict[str, Any]:
    """The numbers of all ops, of what every op pays, and of some steps on the way."""
    facts = machine_facts(device)  # before the work, so that the load average is of others
    found = ops(device)
    settings = {"count": arguments.calls, "rounds": arguments.rounds, "machine": machine}
    columns = [DISPATCHER, NOTHING, CHOICE, MODULE, EXTENSION]
    columns += [EAGER, TRITON, TRITON_MODULE] if device == "cuda" else []
    print(f"{'microseconds: median (20th to 80th percentile)':56}" + "".join(f"{column:>25}" for column in columns))
    table = {}
    for name in arguments.ops:
        with use_backend("cuda"):
            calls = found[name].calls(device)
        table[name] = measure(calls, {TRITON: "triton"}, device, **settings)
        print(line(name, table[name]), flush=True)
    norm = Norm(SHAPE, DTYPE, device)
    common = measure(floors(norm), {}, device, **settings)
    steps = measure(parts(norm), {}, device, **settings)
    for name, entry in (common | steps).items():
        print(line(name, {DISPATCHER: entry}))
    return {
        "machine": facts,
        "statement": STATEMENT if machine is not None else "Enqueueing only; see seconds of synchronisation.",
        "target_microseconds": TARGET,
        "dtype": str(DTYPE).removeprefix("torch."),
        "shape": list(SHAPE),
        "calls": arguments.calls,
        "rounds": arguments.rounds,
        "microseconds": table,
        "floors": common,
        "parts": steps,
    }


def floors(norm: Norm) -> Calls:
    """What every op pays for, and what eager does."""
    return {
        "torch.empty_like": lambda: torch.empty_like(norm.x),
        "a vector by torch.empty": lambda: torch.empty(SHAPE[1], dtype=torch.float32, device=norm.device),
        "F.batch_norm, eval mode (on the host it also computes)": lambda: F.batch_norm(
            norm.x, *norm.running, norm.weight, norm.bias, False, 0.0, EPS
        ),
    }


_LIBRARY = torch.library.Library("fused_resnet_bench", "DEF")
_RESULTS: dict[str, Any] = {}


def op_that_does_nothing(name: str, results: Any) -> Callable[..., object]:
    """An op of this one's schema whose body is Python and returns these results."""
    if name not in _RESULTS:
        _LIBRARY.define(name + SCHEMAS[name])
        _LIBRARY.impl(name, lambda *arguments: _RESULTS[name], "CompositeExplicitAutograd")
    _RESULTS[name] = results
    return getattr(torch.ops.fused_resnet_bench, name)


def parts(norm: Norm) -> Calls:
    """Steps of bn_apply between the dispatcher and the kernel, those of them that are still called so."""
    x = norm.x
    named = {
        "place_of": lambda: cuda_launch.place_of(x),
        "norm_of": lambda: cuda_launch.norm_of([*norm.norm]),
        "addresses of 2": lambda: cuda_launch.addresses(x, None),
        "channels_last, of what lies so": lambda: cuda_launch.channels_last(x),
        "vector_of 4": lambda: [*map(cuda_launch.vector_of, norm.norm)],
        "empty_mask": lambda: cuda_launch.empty_mask(x),
    }
    found: Calls = {}
    for name, call in named.items():
        with contextlib.suppress(AttributeError):
            call()
            found[name] = call
    return found


def measure(
    calls: Calls, backends: Mapping[str, str], device: str, *, count: int, rounds: int, machine: Any
) -> dict[str, dict[str, float]]:
    """Microseconds of one call of each, in turns: until the last of them has returned, and until the device is done."""
    enqueued: dict[str, list[float]] = {name: [] for name in calls}
    finished: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(WARMUP_ROUNDS + rounds):
        for name in rotate(list(calls), index):
            with use_backend(backends.get(name, "cuda")):
                seconds, all_seconds = _time(calls[name], count, device)
            if machine is not None:
                machine.library.host_execution_clear_launches()  # which it records
            if index >= WARMUP_ROUNDS:
                enqueued[name].append(seconds / count * 1e6)
                finished[name].append((all_seconds - seconds) / count * 1e6)
    return {name: _entry(Timing(tuple(enqueued[name])), Timing(tuple(finished[name])), device) for name in calls}


def _time(call: Callable[[], object], count: int, device: str) -> tuple[float, float]:
    """Seconds of so many calls, and with the device's work behind them; on the host in CPU time of the process."""
    collecting = gc.isenabled()
    gc.disable()
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronize()
    try:
        start = clock()
        for _ in range(count):
            call()
        enqueued = clock()
        synchronize()
        return enqueued - start, clock() - start
    finally:
        if collecting:
            gc.enable()


def _entry(enqueued: Timing, synchronized: Timing, device: str) -> dict[str, float]:
    entry = {"median": enqueued.median, "p20": enqueued.p20, "p80": enqueued.p80}
    return entry | ({"synchronization": synchronized.median} if device == "cuda" else {})


def line(name: str, entries: dict[str, dict[str, float]]) -> str:
    cells = (f"{e['median']:.2f} ({e['p20']:.2f} to {e['p80']:.2f})" for e in entries.values())
    return f"{name:56}" + "".join(f"{cell:>25}" for cell in cells)


def profile(op: Op, count: int) -> None:
    """cProfile's table: its own cost is in every call, so that it says what is called and how often, not how long."""
    call = functools.partial(getattr(torch.ops.fused_resnet, op.name), *op.arguments)
    with use_backend("cuda"):
        call()
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(count):
            call()
        profiler.disable()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)


def write(arguments: argparse.Namespace, found: dict[str, Any], device: str) -> None:
    where = "cpu" if device == "cpu" else re.sub(r"\W+", "_", device_name(device)).lower()
    path = arguments.output or RESULTS / f"{where}_host_cost_of_cuda_ops_1thread.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
