"""The result of a benchmark as data: what was measured, under which condition, by whom, and whether it was right.

Written by ``bench/suite``, read by ``bench/report`` and ``benchmarks/readme_table.py``. A file holds one `Result`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import TypedDict  # pydantic takes the one of typing from Python 3.12 on

from fused_resnet.bench.schema import Count, Limits, Number, Seconds, one_of, read
from fused_resnet.bench.timer import Timing

SCHEMA = 1

RIGHT, WRONG, ABSENT, FAILED = "right", "wrong", "absent", "failed"
INFERENCE, TRAINING_FORWARD, TRAINING_STEP = "inference", "training forward", "training step"
MODES = (INFERENCE, TRAINING_FORWARD, TRAINING_STEP)
OP, BLOCK, MODEL = "op", "block", "model"
LEVELS = (OP, BLOCK, MODEL)


class Machine(TypedDict, total=False):
    """What is read of ``machine_facts()``."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    device: str | None
    cores: Count | None
    threads: Count | None
    load_average: Annotated[float, Limits(allow_inf_nan=False)] | None
    packages: dict[str, str] | None
    commit: str | None
    date: str | None


class Ceiling(TypedDict):
    """What the device was seen to reach."""

    bytes_per_second: Annotated[float, Limits(ge=1, le=1e24)]
    flop_per_second: Annotated[float, Limits(ge=1, le=1e24)]


@dataclass(frozen=True)
class Outcome:
    """What one contender did in one measurement."""

    status: Annotated[str, one_of((RIGHT, WRONG, ABSENT, FAILED))]
    """"right", "wrong" (measured, but its numbers are not those of the task), "absent" (cannot take part here: it is
    not installed, or cannot do this task) or "failed" (it tried, and raised)."""
    reason: str | None = None
    """Why it is wrong, absent or failed; None if right."""
    timing: Timing | None = None
    """Seconds of one run: of the whole batch. None if absent or failed."""
    error: float | None = None
    """The largest difference to the exact result, as a fraction of the largest exact value."""
    setup_seconds: Seconds | None = None
    """What came before the first run and comes once: compiling, tuning, packing weights, capture."""
    peak_bytes: Count | None = None
    """The most memory held during a run beyond what was held before it: on a GPU of PyTorch's allocator, on the CPU of
    the process (``suite/peak_memory.py``)."""
    saved_bytes: Count | None = None
    """Kept by the forward for its backward; of the training modes."""
    moved_bytes: Count | None = None
    """Read and written by its passes over memory, counted and not measured; None where nobody can count them."""


@dataclass(frozen=True)
class Measurement:
    """One task and what every contender did in it, measured in turns: round i of one is round i of all."""

    level: Annotated[str, one_of(LEVELS)]
    """"op", "block" or "model"."""
    subject: str
    """Such as "resnet50", "resnet50 layer1.0" or "bn_apply 256x56x56"."""
    mode: Annotated[str, one_of(MODES)]
    """"inference", "training forward" or "training step" (forward, backward, update)."""
    batch_size: Number
    dtype: str
    """Such as "bfloat16": of activations."""
    image_size: Number | None
    """Pixels of an image's side; None of an op."""
    outcomes: dict[str, Outcome]
    flop: Count | None = None
    """Additions and multiplications of the task's convolutions and matrix products: the same for every contender."""
    least_bytes: Count | None = None
    """What anyone has to move at least, for the roofline: each input and weight read and each result written once
    where the task is an op; the fewest counted bytes among the contenders where it is more."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What two results are compared by."""
        return self.level, self.subject, self.mode, self.batch_size, self.dtype, self.image_size

    @property
    def title(self) -> str:
        size = f", {self.image_size}x{self.image_size}" if self.image_size else ""
        return f"{self.subject}, {self.mode}, batch {self.batch_size}, {self.dtype}{size}"


@dataclass(frozen=True)
class Header:
    """What every version of a file has."""

    schema: Literal[1]  # `SCHEMA`


@dataclass(frozen=True)
class Result:
    """A whole run."""

    machine: Annotated[dict[str, Any], Limits(Machine)]
    """``machine_facts()``, and "packages": the versions of the installed peers."""
    arguments: dict[str, Any]
    """What the run was asked for."""
    ceilings: Annotated[dict[str, dict[str, float]], Limits(dict[str, Ceiling])]
    """By dtype: "bytes_per_second" and "flop_per_second" that the device was seen to reach in this run."""
    measurements: list[Measurement]

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        plain = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for entry, measurement in zip(plain["measurements"], self.measurements, strict=True):
            for name, outcome in measurement.outcomes.items():
                entry["outcomes"][name]["timing"] = outcome.timing and outcome.timing.as_dict()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(plain, indent=1) + "\n")
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Reads what `save` wrote, and what earlier versions wrote; a fact that nobody reads any more is left out.
        ValueError or OSError as of `read`."""
        read(path, Header)
        return read(path, cls)
