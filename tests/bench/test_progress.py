"""What a run prints: the table of a measurement, what stands beneath it, and the bar."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("rich")
from rich.console import Console

from fused_resnet.bench.report.tables import measured
from fused_resnet.bench.result import ABSENT, FAILED, INFERENCE, MODEL, RIGHT, WRONG, Measurement, Outcome, Result
from fused_resnet.bench.suite.progress import BenchProgress, footnotes, terminal_table
from fused_resnet.bench.timer import Timing


def timing(*milliseconds: float) -> Timing:
    return Timing(tuple(value / 1e3 for value in milliseconds))


OUTCOMES = {
    "eager NCHW": Outcome(RIGHT, timing=timing(20, 20, 20), error=1e-6, setup_seconds=0.5),
    "eager channels_last": Outcome(RIGHT, timing=timing(10, 20, 15), peak_bytes=5_000_000, moved_bytes=30_000_000),
    "ours": Outcome(RIGHT, timing=timing(5, 5, 5), moved_bytes=10_000_000),
    "cheat": Outcome(WRONG, "differs", timing=timing(1, 1, 1), error=0.5),
    "broken": Outcome(FAILED, "RuntimeError: no"),
    "openvino": Outcome(ABSENT, "not installed"),
    "onnxruntime": Outcome(ABSENT, "not installed"),
}
MEASUREMENT = Measurement(
    *(MODEL, "resnet50", INFERENCE, 8, "float32", 224, OUTCOMES), flop=10_000_000, least_bytes=10_000_000
)
CEILINGS = {"float32": {"bytes_per_second": 4e9, "flop_per_second": 4e9}}


def cells(ceilings: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    table = measured(MEASUREMENT, ceilings)
    return {
        row[0].text: {title: cell.text for title, cell in zip(table.header, row, strict=True)} for row in table.rows
    }


def test_the_cells_of_a_table():
    found = cells(CEILINGS)
    assert list(found) == ["ours", "eager channels_last", "eager NCHW", "cheat"]
    ours, eager = found["ours"], found["eager channels_last"]
    assert ours["ms (20-80 %)"] == "5.00 (5.00-5.00)"
    assert ours["images/s"] == "1600"
    assert ours["to eager"] == "3.00x"  # the median of 2, 4 and 3
    assert ours["GB/s"] == "2.00" and ours["% roof"] == "50"
    assert eager["to eager"] == "1.00x" and eager["peak MB"] == "5.00" and eager["setup s"] == "-"
    assert found["cheat"]["numbers"] == "WRONG: differs"
    assert "% roof" not in cells({})["ours"]


def test_what_stands_beneath_a_table():
    assert footnotes(MEASUREMENT, set()) == [
        "failed: broken: RuntimeError: no",
        "absent: openvino, onnxruntime (not installed)",
    ]
    told = {("openvino", "not installed"), ("onnxruntime", "other")}
    assert footnotes(MEASUREMENT, told)[1] == "absent: onnxruntime (not installed); 1 for reasons told above"
    assert footnotes(MEASUREMENT, told)[1] == "absent: 2 for reasons told above"


def test_the_table_is_told_in_words_and_leaves_empty_columns_out(capsys):
    Console(width=140).print(terminal_table(MEASUREMENT, {}))
    lines = capsys.readouterr().out.splitlines()
    assert "resnet50, inference, batch 8, float32, 224x224" in lines[0]
    assert not any("saved MB" in line for line in lines)
    assert any("WRONG: differs" in line for line in lines)


def test_a_bar_in_a_terminal_shows_the_time_left():
    screen = io.StringIO()
    with BenchProgress(Console(file=screen, force_terminal=True, width=160)) as progress:
        progress.start([1.0, 3.0])
        progress.begin("one")
        progress.stage("rounds", 0.5)
        progress.finish(MEASUREMENT, Result({}, {}, {}, [MEASUREMENT]))
        progress.begin("two")
        progress.leave_out("two", "no time")
    shown = screen.getvalue()
    assert "25%" in shown and "100%" in shown and "2 of 2: two" in shown and "left" in shown
    assert "two: not measured; no time" in shown
