"""The measurements of one or several results in the order of a report: a section for each subject, mode and dtype."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from fused_resnet.bench.result import ABSENT, LEVELS, MODES, OP, Measurement, Result

TITLE = "fused_resnet benchmark"
READING = (
    'Times are medians, with the 20th to 80th percentile in brackets. "to eager" is how many times as fast as the '
    "faster plain eager PyTorch: the median of the quotients of each round. Who was wrong is not compared."
)


@dataclass(frozen=True)
class Column:
    """One measurement of a section, and the result it is of; ``letter`` is the result's, of several."""

    measurement: Measurement
    result: Result
    letter: str

    def lettered(self, text: str) -> str:
        return f"{self.letter}: {text}" if self.letter else text

    @property
    def title(self) -> str:
        return self.lettered(self.measurement.title)


@dataclass(frozen=True)
class Section:
    """All batch sizes of one subject, mode, dtype and image size."""

    level: str
    subject: str
    mode: str
    dtype: str
    image_size: int | None
    columns: tuple[Column, ...]

    @property
    def title(self) -> str:
        size = f", {self.image_size}x{self.image_size}" if self.image_size else ""
        return f"{self.subject}, {self.mode}, {self.dtype}{size}"

    @property
    def contenders(self) -> list[str]:
        """Those that are not absent from all of it, in the order of the run."""
        outcomes = [item for column in self.columns for item in column.measurement.outcomes.items()]
        return list(dict.fromkeys(name for name, outcome in outcomes if outcome.status != ABSENT))

    @property
    def largest(self) -> list[Column]:
        """Those of the largest batch size: one for each result."""
        return [c for c in self.columns if c.measurement.batch_size == self.columns[-1].measurement.batch_size]

    @property
    def unit(self) -> tuple[str, float]:
        """(the unit that its times are told in, seconds of one): microseconds for ops."""
        return ("µs", 1e-6) if self.level == OP else ("ms", 1e-3)


def letters(results: Sequence[Result]) -> list[str]:
    """A name for each result: empty for a single one, else A, B, ..., Z, 27, 28, ..."""
    if len(results) == 1:
        return [""]
    alphabet = string.ascii_uppercase
    return [alphabet[index] if index < len(alphabet) else str(index + 1) for index in range(len(results))]


def sections(results: Sequence[Result]) -> list[Section]:
    """Models first, then blocks and ops; subjects and dtypes in the order of the run, modes from inference to training
    step, batch sizes rising, and of one batch size the results beside each other."""
    groups: dict[tuple[str, str, str, str, int | None], list[Column]] = {}
    for result, letter in zip(results, letters(results), strict=True):
        for entry in result.measurements:
            key = (entry.level, entry.subject, entry.mode, entry.dtype, entry.image_size)
            groups.setdefault(key, []).append(Column(entry, result, letter))
    subjects = list(dict.fromkeys(key[:2] for key in groups))

    def place(section: Section) -> tuple[int, int, int]:
        subject = subjects.index((section.level, section.subject))
        return -LEVELS.index(section.level), subject, MODES.index(section.mode)

    found = [
        Section(*key, tuple(sorted(columns, key=lambda column: column.measurement.batch_size)))
        for key, columns in groups.items()
    ]
    return sorted(found, key=place)
