"""The measurements of one or several results in the order of a report: a section for each subject, mode and dtype."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from fused_resnet.bench.result import ABSENT, LEVELS, MODES, OP, Measurement, Result


@dataclass(frozen=True)
class Column:
    """One measurement of a section, and the result it is of."""

    measurement: Measurement
    result: Result
    letter: str
    """Of the result, where there are several; else empty."""

    @property
    def title(self) -> str:
        batch = f"batch {self.measurement.batch_size}"
        return f"{self.letter}: {batch}" if self.letter else batch


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
        return list(
            dict.fromkeys(
                name
                for column in self.columns
                for name, outcome in column.measurement.outcomes.items()
                if outcome.status != ABSENT
            )
        )

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
    found = [
        Section(*key, tuple(sorted(columns, key=lambda column: column.measurement.batch_size)))
        for key, columns in groups.items()
    ]
    return sorted(
        found,
        key=lambda section: (
            _place(section.level, LEVELS[::-1]),
            subjects.index((section.level, section.subject)),
            _place(section.mode, MODES),
        ),
    )


def _place(word: str, order: Sequence[str]) -> int:
    return order.index(word) if word in order else len(order)
