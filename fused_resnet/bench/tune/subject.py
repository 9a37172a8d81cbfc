"""Something to decide for one shape: what it is called in a plan, who takes part, and what is kept of the answer."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.tune.measure import Found
from fused_resnet.ops.plan.plan_file import Key


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
    def candidates(self) -> dict[str, Callable[[], Prepared]]:
        """By name, functions that make one ready; they raise where it cannot run after all."""

    def compiled_candidates(self) -> dict[str, Callable[[], Prepared]]:
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
