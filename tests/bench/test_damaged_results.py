"""``bench report`` and ``compare`` of damaged files: one message with the file and the place, status 2, no traceback;
and every file that this repository has is whole."""

from __future__ import annotations

import base64
import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fused_resnet.__main__ import main
from fused_resnet.bench.report import page
from fused_resnet.bench.result import Result
from tests.bench.test_report_files import inference, result, training

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMMITTED = sorted(
    path for path in RESULTS.rglob("*.json") if path.parent.name != "launch" and path.name != "step_bytes_224px.json"
)
"""The others are of scripts with files of their own."""

WRONG_VALUES: dict[str, Any] = {
    "null": None,
    "string": "7",
    "number": 7.5,
    "flag": True,
    "list": [1],
    "object": {"x": 1},
    "NaN": math.nan,
    "infinity": math.inf,
    "negative": -1,
    "huge": 10**400,
}
"""Put in the place of each value of a whole file."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything in a file, by the way to it; of a list the first entry stands for all."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], (*path, name))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "whole.json"
    result(inference(), training()).save(path)
    return json.loads(path.read_text())


def changed(given: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    found = copy.deepcopy(given)
    inner = found
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return found


def without(given: Any, place: tuple[Any, ...]) -> Any:
    found = copy.deepcopy(given)
    inner = found
    for name in place[:-1]:
        inner = inner[name]
    del inner[place[-1]]
    return found


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "report": lambda path, good: ["bench", "report", str(path), "--output", str(path.parent / "out")],
    "report, two files": lambda path, good: ["bench", "report", str(good), str(path), "--output", str(path.parent)],
    "compare, before": lambda path, good: ["bench", "compare", str(path), str(good)],
    "compare, after": lambda path, good: ["bench", "compare", str(good), str(path)],
}
command = pytest.mark.parametrize("command", COMMANDS)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr, one line; nothing went to stdout."""
    status, said = main(words), capsys.readouterr()
    assert status == 2, said.out
    assert said.out == "" and said.err.count("\n") == 1 and len(said.err) < 500, said.err
    return said.err


NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "text": b"this is no JSON",
    "binary": bytes(range(256)),
    "zeros": bytes(4096),
    "latin-1": '{"schema": "é"}'.encode("latin-1"),
    "UTF-16": '{"schema": 1}'.encode("utf-16"),
    "two values": b'{"schema": 1} {"schema": 1}',
    "Python": b"{'schema': 1}",
    "deep": b"[" * 100_000,
    "half a surrogate": b'{"schema": 1, "machine": {"device": "\\ud800"}}',
}


@command
@pytest.mark.parametrize("damage", NOT_JSON)
def test_what_is_not_json(damage: str, command: str, tmp_path: Path, capsys, given):
    path = tmp_path / "damaged.json"
    path.write_bytes(NOT_JSON[damage])
    said = refused(COMMANDS[command](path, tmp_path / "whole.json"), capsys)
    assert f"{path}: Invalid JSON: " in said and " line 1 column " in said.replace("line 2", "line 1")


@command
def test_a_file_cut_short_anywhere(command: str, tmp_path: Path, capsys, given):
    text, path = (tmp_path / "whole.json").read_bytes(), tmp_path / "damaged.json"
    for length in range(0, len(text) - 2, len(text) // 40):
        path.write_bytes(text[:length])
        assert f"{path}: Invalid JSON: EOF" in refused(COMMANDS[command](path, tmp_path / "whole.json"), capsys)


@command
@pytest.mark.parametrize("kind", ["missing", "a directory", "unreadable", "a loop of links"])
def test_what_is_no_file(kind: str, command: str, tmp_path: Path, capsys, given):
    path = tmp_path / "damaged.json"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a loop of links":
        path.symlink_to(path)
    elif kind == "unreadable":
        path.write_text("{}")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads everything")
    assert str(path) in refused(COMMANDS[command](path, tmp_path / "whole.json"), capsys)


def needed(given: Any) -> list[tuple[Any, ...]]:
    """The places that a file must have: those of fields without a default, of everything but facts and arguments."""
    facts = ("status", "level", "subject", "mode", "batch_size", "dtype", "image_size", "outcomes", "samples", "schema")
    names = (*facts, "machine", "arguments", "ceilings", "measurements", "bytes_per_second", "flop_per_second")
    return [place for place in places(given) if place and place[-1] in names and place[0] != "arguments"]


@command
def test_a_missing_key(command: str, tmp_path: Path, capsys, given):
    path = tmp_path / "damaged.json"
    assert len(needed(given)) > 20
    for place in needed(given):
        path.write_text(json.dumps(without(given, place)))
        said = refused(COMMANDS[command](path, tmp_path / "whole.json"), capsys)
        assert f"{path}: {'.'.join(map(str, place))}: Field required" in said


@pytest.mark.parametrize("command", ["report", "compare, after"])
@pytest.mark.parametrize("damage", WRONG_VALUES)
def test_another_value_anywhere(damage: str, command: str, tmp_path: Path, capsys, given, monkeypatch):
    """Refused with the place, or, where anything may stand (what a fact says, what was asked for), reported."""
    monkeypatch.setattr(page, "roofline", lambda result, dtype: None)  # which takes a second to draw
    path, value, count = tmp_path / "damaged.json", WRONG_VALUES[damage], 0
    for place in places(given):
        path.write_text(json.dumps(changed(given, place, value)))
        words = COMMANDS[command](path, tmp_path / "whole.json")
        status = main(words)
        said = capsys.readouterr()
        assert status in (0, 1, 2), place
        if status == 2 and "be of one condition" not in said.err and "no measurement in common" not in said.err:
            count += 1
            assert said.err.count("\n") == 1 and f"{path}: {'.'.join(map(str, place[:2]))}" in said.err, place
    assert count > 20


EXTREMES: dict[tuple[Any, ...], tuple[Any, ...]] = {
    ("measurements", 0, "outcomes", "frozen", "timing", "samples", 0): (1e-12, 1e12),
    ("measurements", 0, "outcomes", "frozen", "moved_bytes"): (1, 2**63 - 1),
    ("measurements", 0, "batch_size"): (2**31 - 1,),
    ("measurements", 0, "flop"): (1, 2**63 - 1),
    ("measurements", 0, "least_bytes"): (0, 2**63 - 1),
    ("ceilings", "float32", "bytes_per_second"): (1, 1e24),
    ("ceilings", "float32", "flop_per_second"): (1, 1e24),
}
"""The least and the most that a file may say."""


@pytest.mark.slow
@pytest.mark.parametrize("place", EXTREMES, ids=lambda place: ".".join(map(str, place)))
def test_what_may_stand_in_a_file_can_be_drawn(place: tuple[Any, ...], tmp_path: Path, capsys, given):
    path = tmp_path / "extreme.json"
    for value in EXTREMES[place]:
        path.write_text(json.dumps(changed(given, place, value)))
        assert main(["bench", "report", str(path)]) == 0
        assert "<svg" in base64.b64decode(_drawing(path.with_suffix(".html").read_text())).decode()


def _drawing(html: str) -> str:
    return html.partition("data:image/svg+xml;base64,")[2].partition('"')[0]


@pytest.mark.parametrize("version", [0, 2, -1, "1", 1.5, None])
def test_another_version(version: Any, tmp_path: Path, capsys, given):
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(given | {"schema": version}))
    assert f"{path}: schema: Input should be 1; got {version!r}" in refused(["bench", "report", str(path)], capsys)


def test_the_process_says_it_too(tmp_path: Path):
    path = tmp_path / "damaged.json"
    path.write_text("{")
    words = [sys.executable, "-m", "fused_resnet", "bench", "report", str(path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert done.stderr == f"bench report: {path}: Invalid JSON: EOF while parsing an object at line 1 column 1\n"


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: str(path.relative_to(RESULTS)))
def test_committed_results_are_whole(path: Path, tmp_path: Path):
    found = Result.load(path)
    assert found.measurements and all(measurement.outcomes for measurement in found.measurements)
    found.save(tmp_path / "again.json")
    assert Result.load(tmp_path / "again.json") == found


def test_there_are_committed_results():
    assert len(COMMITTED) >= 12
