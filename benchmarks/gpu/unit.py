"""A unit of work: a command with a log, a time limit, and what its end means."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.state import DONE, FAILED, ROOT, SKIPPED, UNFINISHED

PYTHON = sys.executable
LOGS = "logs"
NOT_ALL = 75
"""The exit status of a command that had no time for all it was asked for."""
TIME_TO_SAVE = 15.0
"""Seconds between asking a command to stop (as Ctrl-C does) and ending it."""


@dataclass(frozen=True)
class Unit:
    """What one command does.

    Attributes:
        phase, title: "ops", "batch 32".
        command: makes the words from the seconds that there are; the first is a program.
        why_skipped: why it has no place here; None if it has.
        left: of a command that saves as it goes, asked at its end: what it had no time for; None if nothing. One whose
            time was up is done if this says so.
        repeated: also done where an earlier call has done it: its product is this machine's, or made of others'.
        fine: exit statuses that are no failure.
        environment: variables beside those of all units.
    """

    phase: str
    title: str
    command: Callable[[float], list[str]]
    why_skipped: str | None = None
    left: Callable[[], str | None] | None = None
    repeated: bool = False
    fine: tuple[int, ...] = (0,)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.phase}/{self.title}"


@dataclass(frozen=True)
class End:
    """How a unit ended: a status of ``state``, the seconds it took, and a line on it."""

    status: str
    seconds: float
    note: str


def run(unit: Unit, seconds: float, log: Path, environment: dict[str, str]) -> End:
    """Runs a unit for so many seconds at most, all of its output appended to the log.

    At the limit it is asked to stop, as by Ctrl-C, and ended with its children if it does not.
    """
    if unit.why_skipped is not None:
        return End(SKIPPED, 0.0, unit.why_skipped)
    log.parent.mkdir(parents=True, exist_ok=True)
    words = unit.command(max(1.0, seconds - TIME_TO_SAVE))
    start = time.monotonic()
    with log.open("a") as output:
        output.write(f"$ {' '.join(words)}\n")
        output.flush()
        begin = output.tell()
        try:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={**os.environ, **environment, **unit.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_listen_to_interrupts,
            )
        except OSError as error:
            return End(FAILED, time.monotonic() - start, str(error))
        try:
            status: int | None = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _stop(process)
    took, said = time.monotonic() - start, last_line(log, begin)
    if status is None and unit.left is None:
        return End(UNFINISHED, took, f"its {seconds:.0f} s were up; {said}")
    if status == NOT_ALL:
        return End(UNFINISHED, took, said)
    if status is not None and status not in unit.fine:
        return End(FAILED, took, f"exit status {status}; {said}")
    left = None if unit.left is None else unit.left()
    if left is not None:
        return End(UNFINISHED, took, left)
    return End(DONE, took, said if status is not None else "all is measured; there was no time for its page")


def last_line(log: Path, begin: int = 0) -> str:
    """What the command said last, as far as it says something."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t=-_│╭╮╰╯─")]
    return lines[-1][:200] if lines else "it said nothing"


def _listen_to_interrupts() -> None:
    """In the child: a shell lets what it runs in the background ignore them, and its children with it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the command and whatever it has started, if it is still there."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=TIME_TO_SAVE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # a group of its own: its children only
    process.wait()


def log_name(name: str) -> str:
    """The file of a unit's log, in the folder `LOGS`."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name) + ".log"
