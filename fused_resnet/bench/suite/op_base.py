"""A task at op level: random inputs, the ways to do it, what each moves, and whether results are right."""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_resnet.bench.ledger import ledger
from fused_resnet.bench.result import OP
from fused_resnet.bench.suite.task import Prepared, Results, Task
from fused_resnet.ops import use_backend
from fused_resnet.ops.route.choose import why_not
from fused_resnet.ops.route.reasons import unavailable

EAGER, COMPILE, SEPARATE = "eager", "torch.compile", "separate"
CACHE_BYTES = 2**26
"""Rotating inputs are as many as together pass this, where a few suffice: larger than what a CPU caches for one core.
On a GPU the runner flushes the L2 cache."""
MOST_SETS = 4
NormVectors = tuple[Tensor, Tensor, Tensor, Tensor]
"""weight, bias, running mean and running variance."""


class OpTask(Task):
    """One op on tensors of one shape.

    Inputs are random, from a seed of their own, and made when first asked for; there are a few sets of them, which
    every contender takes in turn.

    Attributes:
        subject: the op's name and its shape for one image.
        compile_backend: of ``torch.compile``; "eager" where only the numbers matter, as in tests.
    """

    level = OP
    image_size = None
    compile_backend = "inductor"
    most_sets = MOST_SETS
    exists = True
    """False of a combination that no network has."""
    _latest: OpTask | None = None

    def __init__(
        self, subject: str, mode: str, batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.subject, self.mode, self.batch_size, self.dtype = subject, mode, batch_size, dtype
        self.device = torch.device(device)
        self._users = 0

    def __repr__(self) -> str:
        dtype, device = str(self.dtype).removeprefix("torch."), self.device.type
        return f"{self.subject} x {self.batch_size} {dtype} {device}"

    @abstractmethod
    def make_inputs(self) -> Any:
        """One set of inputs, of the generator as it stands."""

    @abstractmethod
    def ways(self) -> dict[str, Callable[[Any], Callable[[], Results]]]:
        """What is there beside this package's backends, by the name of the contender: from a set of inputs to a
        function that does the task on it."""

    @abstractmethod
    def ours(self, inputs: Any) -> Callable[[], Results]:
        """This package's op, on the backend that is asked for when it is called."""

    @abstractmethod
    def ops(self, inputs: Any) -> list[tuple[str, tuple[Any, ...]]]:
        """The ops that `ours` consists of and their arguments: what a backend must not refuse."""

    @abstractmethod
    def exact(self) -> Results:
        """The results for the first set of inputs in float64."""

    @abstractmethod
    def why_results_are_wrong(self, results: Results) -> str | None:
        """By the project's rule: at most twice the error of PyTorch's eager mode in the same dtype."""

    @abstractmethod
    def least_bytes(self) -> int:
        """What anyone has to move: each input and weight read, and each result written, once."""

    def moved(self, name: str) -> int | None:
        """Bytes that this contender reads and writes, counted; None where nobody can count them."""
        return None if name == COMPILE else self.least_bytes()

    def saved(self, name: str) -> int | None:
        """Bytes that its forward keeps for its backward; None where it has none of the two."""
        return None

    def flop(self) -> int | None:
        return None

    @functools.cached_property
    def input_sets(self) -> list[Any]:
        """The rotating inputs; the first is the one that results are checked on."""
        OpTask._let_go_of_others(self)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            count = max(1, min(self.most_sets, -(-CACHE_BYTES // max(self.least_bytes(), 1))))
            return [self.make_inputs() for _ in range(count)]

    @property
    def first(self) -> Any:
        return self.input_sets[0]

    def why_not(self, backend: str) -> list[str]:
        """The reasons why a backend of this package cannot do it; an empty list means that it can."""
        if reasons := unavailable(backend):
            return list(reasons)
        return self.why_not_ops(backend, self.ops(self.first))

    def why_not_way(self, name: str) -> list[str]:
        """The same of a contender that is no backend."""
        return [] if name in self.ways() else [f"it has no {self.subject.split()[0]}"]

    @staticmethod
    def why_not_ops(backend: str, ops: list[tuple[str, tuple[Any, ...]]]) -> list[str]:
        if reasons := unavailable(backend):
            return list(reasons)
        for op, arguments in ops:
            if reasons := why_not(backend, op, *arguments):
                return [f"{op}: {reason}" for reason in reasons]
        return []

    def prepare(self, name: str, make: Callable[[Any], Callable[[], Results]]) -> Prepared:
        """A contender from its way to do the task on a set of inputs; it has run once on each when this returns."""
        calls = [make(inputs) for inputs in self.input_sets]
        for call in calls:
            call()
        turns = itertools.cycle(calls)
        self._users += 1
        return Prepared(
            run=lambda: next(turns)(),
            results=calls[0],
            saved_bytes=lambda: self.saved(name),
            moved_bytes=lambda: self.moved(name),
            close=self._close,
        )

    def release(self) -> None:
        """Gives back the inputs and the exact results; asked for again, they are made again and are the same."""
        for name in ("input_sets", "_exact"):
            self.__dict__.pop(name, None)

    def _close(self) -> None:
        self._users -= 1
        if self._users == 0:
            self.release()

    def _let_go_of_others(self) -> None:
        """A list of tasks must not hold the inputs of all of them, of those that nobody could do either."""
        before, OpTask._latest = OpTask._latest, self
        if before is not None and before is not self and before._users == 0:
            before.release()

    def why_wrong(self, prepared: Prepared) -> tuple[float | None, str | None]:
        results = prepared.results()
        return relative_error(results, self._exact), self.why_results_are_wrong(results)

    @functools.cached_property
    def _exact(self) -> Results:
        return self.exact()


def on_backend(name: str, call: Callable[[], Results]) -> Callable[[], Results]:
    """The same, asking for a backend by name."""

    def run() -> Results:
        with use_backend(name):
            return call()

    return run


def without_gradients(call: Callable[[], Results]) -> Callable[[], Results]:
    @functools.wraps(call)
    def run() -> Results:
        with torch.no_grad():
            return call()

    return run


def random_norm(channels: int, device: torch.device) -> NormVectors:
    return (*(torch.rand(channels, device=device) + 0.5 for _ in range(4)),)  # type: ignore[return-value]


def counted(call: Callable[[], object]) -> int | None:
    """Bytes that PyTorch's own ops move in it; None where ``bench/traffic.py`` has no row for one of them."""
    try:
        return ledger(call).total
    except NotImplementedError:
        return None


def terms_of_products(dtype: torch.dtype, count: int) -> int:
    """How many rounded numbers a sum of so many products adds up, for the floor of the project's rule. Sums are
    float32: their rounding is lost in that of a narrower result."""
    return count if dtype == torch.float32 else 1


def listed(results: Any) -> Results:
    return [results] if isinstance(results, Tensor) else list(results)


def relative_error(results: Results, exact: Results) -> float | None:
    """The largest difference to the exact results, each as a fraction of its own largest value; bits left out."""
    found = [
        ((ours.detach().double() - right).abs().max() / right.abs().max().clamp(min=1e-30)).item()
        for ours, right in zip(results, exact, strict=True)
        if ours is not None and right is not None and right.numel() > 0 and right.is_floating_point()
    ]
    return max(found, key=lambda error: (error != error, error)) if found else None
