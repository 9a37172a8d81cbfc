"""A task at op level: random inputs, the ways to do it, what each moves, and whether results are right."""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.bench.accuracy import Results, doubled, first_wrong, listed, relative_error, why_wrong
from fused_resnet.bench.dry_run import DryRun
from fused_resnet.bench.ledger import ledger
from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.result import OP
from fused_resnet.bench.suite.task import Prepared, Task
from fused_resnet.bench.traffic import tensors
from fused_resnet.ops import reference, use_backend
from fused_resnet.ops.route.choose import why_not
from fused_resnet.ops.route.packing import packed
from fused_resnet.ops.route.reasons import unavailable

EAGER, COMPILE, SEPARATE = "eager", "torch.compile", "separate"
BACKENDS = ("cuda", "triton", "native", SEPARATE, "reference")
CACHE_BYTES = 2**26
"""Rotating inputs are as many as together pass this, `MOST_SETS` at most: larger than what a CPU caches for one core.
On a GPU the runner flushes the L2 cache."""
MOST_SETS = 4
Call = Callable[[], Results]


class OpTask(Task):
    """One op on tensors of one shape; random inputs, made when first asked for, in a few sets for turns.

    Attributes:
        subject: the op's name and its shape for one image.
        compile_backend: of ``torch.compile``; "eager" where only the numbers matter, as in tests.
        exists: False of a combination that no network has.
    """

    level, image_size, exists = OP, None, True
    compile_backend, compile_mode = "inductor", ""
    made = ("input_sets", "_exact")

    def __init__(
        self, subject: str, mode: str, batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.subject, self.mode, self.batch_size, self.dtype = subject, mode, batch_size, dtype
        self.device = torch.device(device)

    def __repr__(self) -> str:
        return f"{self.subject} x {self.batch_size} {dtype_name(self.dtype)} {self.device.type}"

    @abstractmethod
    def make_inputs(self) -> Any:
        """One set of inputs, of the generator as it stands."""

    @abstractmethod
    def ops(self, inputs: Any) -> list[tuple[str, tuple[Any, ...]]]:
        """The ops that `ours` consists of and their arguments: what a backend must not refuse."""

    @abstractmethod
    def eager(self, inputs: Any) -> Results:
        """As a network in eager PyTorch runs it; what is compiled, and the baseline of the rule."""

    def least_bytes(self) -> int:
        """What anyone has to move: the op's inputs read and its results written, once (``bench/traffic.py``)."""
        op, arguments = self.ops(self.first)[0]
        with DryRun(), use_backend("reference"):
            return ledger(lambda: getattr(torch.ops.fused_resnet, op)(*arguments)).total

    def ours(self, inputs: Any) -> Call:
        """This package's op, on the backend that is asked for when it is called."""
        op, arguments = self.ops(inputs)[0]
        return without_gradients(lambda: listed(getattr(torch.ops.fused_resnet, op)(*arguments)))

    def ways(self) -> dict[str, Callable[[Any], Call]]:
        """By the name of a contender, from a set of inputs to a function that does the task on it."""
        backends = {name: lambda inputs, name=name: on_backend(name, self.ours(inputs)) for name in BACKENDS}
        eager = lambda inputs: without_gradients(lambda: self.eager(inputs))  # noqa: E731
        return {EAGER: eager, COMPILE: self.compiled, **backends}

    def compiled(self, inputs: Any) -> Call:
        if inputs is self.first:  # forget what was compiled before: after eight shapes PyTorch would run it in eager
            torch.compiler.reset()
        settings: Any = {"dynamic": False, "backend": self.compile_backend, "mode": self.compile_mode or None}
        function = torch.compile(self.eager, **settings)
        return without_gradients(lambda: function(inputs))

    def exact(self) -> Results:
        """The results for the first set of inputs in float64."""
        op, arguments = self.ops(self.first)[0]
        return listed(getattr(reference, op)(*packed(op, doubled(arguments))))

    def judge(self, index: int, ours: Tensor, theirs: Tensor | None, right: Tensor) -> str | None:
        """What is wrong with one of the results, None if nothing is."""
        return why_wrong(ours, theirs, right, self.terms(index, right), self.magnitude(index))

    def baseline(self) -> Results:
        return self.eager(self.first)

    def terms(self, index: int, exact: Tensor) -> int:
        """How many rounded numbers a result adds up, for the floor of the rule."""
        return 1

    def magnitude(self, index: int) -> float | None:
        """Of the numbers that are rounded, where they are not of the size of the result."""
        return None

    def moved(self, name: str) -> int | None:
        """Bytes that this contender reads and writes, counted; None where nobody can count them."""
        if name == EAGER:
            return counted(self.ways()[EAGER](self.first))
        return None if name == COMPILE else self.least_bytes()

    def saved(self, name: str) -> int | None:
        """Bytes that its forward keeps for its backward; None where it has none of the two."""
        return None

    def flop(self) -> int | None:
        return None

    @functools.cached_property
    def input_sets(self) -> list[Any]:
        """The rotating inputs; the first is the one that results are checked on."""
        self.let_go_of_others()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            first = self.make_inputs()
            size = sum(value.nbytes for _, arguments in self.ops(first)[:1] for value in tensors(list(arguments)))
            count = max(1, min(MOST_SETS, -(-CACHE_BYTES // max(size, 1))))
            return [first, *(self.make_inputs() for _ in range(count - 1))]

    @property
    def first(self) -> Any:
        return self.input_sets[0]

    def why_not(self, name: str) -> list[str]:
        """The reasons why a contender cannot do it here; an empty list means that it can."""
        if name not in self.ways():
            return [f"it has no {self.subject.split()[0]}"]
        if name not in BACKENDS:
            return []
        if reasons := unavailable(name):
            return list(reasons)
        of_ops = ([f"{op}: {why}" for why in why_not(name, op, *args)] for op, args in self.ops(self.first))
        return next(filter(None, of_ops), [])

    def prepare(self, name: str, make: Callable[[Any], Call]) -> Prepared:
        """A contender from its way to do the task on a set of inputs; it has run once on each when this returns."""
        calls = [make(inputs) for inputs in self.input_sets]
        for call in calls:
            call()
        turns = itertools.cycle(calls)
        return Prepared(lambda: next(turns)(), calls[0], lambda: self.saved(name), lambda: self.moved(name))

    def why_wrong(self, prepared: Prepared) -> tuple[float | None, str | None]:
        results = prepared.results()
        with torch.no_grad():
            wrong = first_wrong(results, self.baseline(), self._exact, self.judge)
        return relative_error(results, self._exact), wrong

    @functools.cached_property
    def _exact(self) -> Results:
        return self.exact()


def on_backend(name: str, call: Call) -> Call:
    """The same, asking for a backend by name."""

    def run() -> Results:
        with use_backend(name):
            return call()

    return run


def without_gradients(call: Call) -> Call:
    def run() -> Results:
        with torch.no_grad():
            return call()

    return run


def random_norm(channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, bias, running mean and running variance."""
    weight, bias, mean, variance = (torch.rand(channels, device=device) + 0.5 for _ in range(4))
    return weight, bias, mean, variance


def random_image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Channels_last."""
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Such that outputs are of the size of inputs."""
    return (random_image(shape, torch.float32, device) * torch.Size(shape[1:]).numel() ** -0.5).to(dtype)


def counted(call: Callable[[], object]) -> int | None:
    """Bytes that PyTorch's own ops move in it; None where ``bench/traffic.py`` has no row for one of them."""
    try:
        return ledger(call).total
    except NotImplementedError:
        return None
