"""The result of a benchmark as data: what was measured, under which condition, by whom, and whether it was right.

Written by ``bench/suite``, read by ``bench/report`` and ``benchmarks/readme_table.py``. A file holds one `Result`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_resnet.bench.timer import Timing

SCHEMA = 1

RIGHT, WRONG, ABSENT, FAILED = "right", "wrong", "absent", "failed"
INFERENCE, TRAINING_FORWARD, TRAINING_STEP = "inference", "training forward", "training step"
MODES = (INFERENCE, TRAINING_FORWARD, TRAINING_STEP)
OP, BLOCK, MODEL = "op", "block", "model"
LEVELS = (OP, BLOCK, MODEL)


@dataclass(frozen=True)
class Outcome:
    """What one contender did in one measurement."""

    status: str
    """"right", "wrong" (measured, but its numbers are not those of the task), "absent" (cannot take part here: it is
    not installed, or cannot do this task) or "failed" (it tried, and raised)."""
    reason: str | None = None
    """Why it is wrong, absent or failed; None if right."""
    timing: Timing | None = None
    """Seconds of one run: of the whole batch. None if absent or failed."""
    error: float | None = None
    """The largest difference to the exact result, as a fraction of the largest exact value."""
    setup_seconds: float | None = None
    """What came before the first run and comes once: compiling, tuning, packing weights, capture."""
    peak_bytes: int | None = None
    """The most memory held during a run beyond what was held before it: on a GPU of PyTorch's allocator, on the CPU of
    the process (``suite/peak_memory.py``)."""
    saved_bytes: int | None = None
    """Kept by the forward for its backward; of the training modes."""
    moved_bytes: int | None = None
    """Read and written by its passes over memory, counted and not measured; None where nobody can count them."""


@dataclass(frozen=True)
class Measurement:
    """One task and what every contender did in it, measured in turns: round i of one is round i of all."""

    level: str
    """"op", "block" or "model"."""
    subject: str
    """Such as "resnet50", "resnet50 layer1.0" or "bn_apply 256x56x56"."""
    mode: str
    """"inference", "training forward" or "training step" (forward, backward, update)."""
    batch_size: int
    dtype: str
    """Such as "bfloat16": of activations."""
    image_size: int | None
    """Pixels of an image's side; None of an op."""
    outcomes: dict[str, Outcome]
    flop: int | None = None
    """Additions and multiplications of the task's convolutions and matrix products: the same for every contender."""
    least_bytes: int | None = None
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
class Result:
    """A whole run."""

    machine: dict[str, Any]
    """``machine_facts()``, and "packages": the versions of the installed peers."""
    arguments: dict[str, Any]
    """What the run was asked for."""
    ceilings: dict[str, dict[str, float]]
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
        """Reads what `save` wrote, and what earlier versions wrote; a fact that nobody reads any more is left out."""
        try:
            found = json.loads(path.read_text())
        except ValueError as error:  # of the encoding, too
            raise ValueError(f"{path} is not JSON: {error}") from None
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} must be a result of schema {SCHEMA}; got schema {schema!r}")
        for entry in found["measurements"]:
            for name, outcome in entry["outcomes"].items():
                timing = outcome["timing"] and Timing(tuple(outcome["timing"]["samples"]))
                entry["outcomes"][name] = Outcome(**{**outcome, "timing": timing})
        known = [entry.name for entry in dataclasses.fields(Measurement)]
        measurements = [Measurement(**{n: entry[n] for n in known if n in entry}) for entry in found["measurements"]]
        return cls(found["machine"], found["arguments"], found["ceilings"], measurements)
