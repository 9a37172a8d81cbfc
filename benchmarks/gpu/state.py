"""What was done in earlier calls: one JSON file in the output folder, rewritten after every unit of work."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("fused_resnet", "kernels", "csrc")

DONE, FAILED, UNFINISHED, SKIPPED = "done", "failed", "unfinished", "skipped"


@dataclass
class Entry:
    """What became of a unit.

    Attributes:
        status: "done"; "failed", which the next call tries again; "unfinished", its time was up and the next call goes
            on; "skipped", it has no place on this machine.
        seconds: of all tries together.
        tries: how often it was started.
        note: why it is not done, or what it said last.
        sources: what `fingerprint` was.
    """

    status: str
    seconds: float = 0.0
    tries: int = 0
    note: str = ""
    sources: str = ""


class State:
    """Entries by the name of the unit, such as "ops/batch 32"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        if path.exists():
            try:
                found = json.loads(path.read_text())
                self.entries = {name: Entry(**entry) for name, entry in found.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} is not the state of earlier calls ({error}); remove it to begin anew"
                ) from None

    def status(self, name: str) -> str | None:
        entry = self.entries.get(name)
        return None if entry is None else entry.status

    def note(self, name: str, status: str, seconds: float, note: str) -> None:
        """Adds a try, and writes the file, whole or not at all."""
        before = self.entries.get(name, Entry(status))
        tries = before.tries + (status != SKIPPED)
        self.entries[name] = Entry(status, before.seconds + seconds, tries, note, fingerprint())
        self._write()

    def forget(self, phase: str) -> None:
        """The units of a phase are done again."""
        self.entries = {name: entry for name, entry in self.entries.items() if not name.startswith(f"{phase}/")}
        self._write()

    def of_other_sources(self) -> list[str]:
        """The units that were done before the package's sources were changed."""
        now = fingerprint()
        return [name for name, entry in self.entries.items() if entry.status == DONE and entry.sources != now]

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text(
            json.dumps({name: asdict(entry) for name, entry in self.entries.items()}, indent=1) + "\n"
        )
        unfinished.replace(self.path)


def fingerprint(root: Path = ROOT) -> str:
    """Twelve digits that change with the package's sources; there may be no git on a closed machine."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
