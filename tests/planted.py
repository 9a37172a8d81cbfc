"""Faults planted into a copy of C++ sources, all into one: the environment variable PLANTED_FAULT says which there is.

A statement or an expression is replaced by one that asks. What is replaced has to stand in the file exactly once, so
that the tests fail when the source changes, and are then adapted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import build_cache

ASK = """// Which fault there is, by its number; 0 for none.
#pragma once
#include <cstdlib>

inline const int planted_fault = [] {
  const char* const number = std::getenv("PLANTED_FAULT");
  return number == nullptr ? 0 : std::atoi(number);
}();
"""


@dataclass(frozen=True)
class Fault:
    """``wrong`` instead of what stands between « and » in ``place``, a part of ``file``."""

    file: str
    name: str
    place: str
    wrong: str = ""

    def span(self, text: str) -> tuple[int, int] | None:
        """Where in the file's text that stands; None unless once."""
        before, _, rest = self.place.partition("«")
        original, _, after = rest.partition("»")
        whole = before + original + after
        start = text.find(whole) + len(before)
        return (start, start + len(original)) if original and text.count(whole) == 1 else None

    def assert_plantable(self, folder: Path) -> None:
        text = (folder / self.file).read_text()
        found = text.count(re.sub("[«»]", "", self.place))
        assert self.span(text), f"{self.file} has changed: the place of {self.name!r} stands in it {found} times"

    def asking(self, otherwise: str, number: int) -> str:
        if ";»" in self.place:
            return f"if (planted_fault == {number}) {{ {self.wrong} }} else {{ {otherwise} }}"
        return f"(planted_fault == {number} ? ({self.wrong}) : ({otherwise}))"


def numbered(faults: Iterable[Fault]) -> dict[str, int]:
    return {fault.name: number for number, fault in enumerate(faults, 1)}


def copy_with_faults(folder: Path, faults: Iterable[Fault]) -> Path:
    """A copy of the C++ files of ``folder`` with every fault that has a place in them."""
    of_file = defaultdict(list)
    for number, fault in enumerate(faults, 1):
        of_file[fault.file].append((number, fault))
    texts = {"planted.h": ASK}
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".cpp", ".cu", ".cuh", ".h"}:
            name = path.relative_to(folder).as_posix()
            include = f'#include "{"../" * name.count("/")}planted.h"\n'
            texts[name] = _with_faults(path.read_text(), of_file[name], include)
    key = build_cache.key([word for item in texts.items() for word in item])
    return build_cache.made(key, folder.name, lambda to: _write(to, texts))


def _with_faults(text: str, faults: Iterable[tuple[int, Fault]], include: str) -> str:
    places = defaultdict(list)
    for number, fault in faults:
        if span := fault.span(text):  # assert_plantable says which has none
            places[span].append((number, fault))
    for (start, end), here in sorted(places.items(), reverse=True):
        planted = text[start:end]
        for number, fault in here:
            planted = fault.asking(planted, number)
        line = text.rfind("\n", 0, start) + 1
        # What asks is no constant expression.
        before = re.sub(r"^constexpr ", "const ", text[line:start])
        text = text[:line] + before + planted + text[end:]
    return include + text if places else text


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
