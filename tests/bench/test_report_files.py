"""CSV, Markdown and the merging of results, of a small made-up result whose every number is known."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import io
import json

import pytest

from fused_resnet.bench.report import condition, files
from fused_resnet.bench.report.condition import merged
from fused_resnet.bench.report.figures import best_eager, best_of_ours, best_rival, figures, text_table, times_faster
from fused_resnet.bench.report.files import COLUMNS, csv_text, markdown_report
from fused_resnet.bench.report.tables import in_order, standing
from fused_resnet.bench.result import (
    ABSENT,
    FAILED,
    INFERENCE,
    MODEL,
    OP,
    RIGHT,
    TRAINING_STEP,
    WRONG,
    Measurement,
    Outcome,
    Result,
)
from fused_resnet.bench.timer import Timing

MACHINE = {
    "device": "a machine",
    "threads": 2,
    "cores": 2,
    "torch": "2.13.0",
    "packages": {"openvino": "2026.1"},
    "commit": "c" * 40 + "-dirty",
    "date": "2026-11-25T10:00:00+00:00",
    "load_average": 0.25,
}


def right(milliseconds: float, **others) -> Outcome:
    return Outcome(RIGHT, timing=Timing(tuple(milliseconds * 1e-3 * step for step in (1, 0.8, 1.2))), **others)


def inference(batch_size: int = 1, **outcomes: Outcome) -> Measurement:
    found = {
        "eager NCHW": right(20 * batch_size),
        "eager channels_last": right(16 * batch_size, moved_bytes=1_000_000),
        "openvino": right(8 * batch_size, setup_seconds=2.5),
        "frozen": right(10 * batch_size, peak_bytes=3_000_000),
        "fused": Outcome(WRONG, "off by one", Timing((1e-3,) * 3), error=0.5),
        "apex": Outcome(ABSENT, "apex is not installed"),
    }
    found |= outcomes
    return Measurement(MODEL, "resnet18", INFERENCE, batch_size, "float32", 224, found, 4_000_000, 800_000)


def result(*measurements: Measurement, **machine) -> Result:
    ceilings = {"float32": {"bytes_per_second": 1e9, "flop_per_second": 1e9}}
    return Result(MACHINE | machine, {"model": ["resnet18"]}, ceilings, list(measurements))


def training() -> Measurement:
    outcomes = {
        "eager NCHW": right(100, saved_bytes=50_000_000),
        "fused": right(50, saved_bytes=25_000_000),
        "onnxruntime": Outcome(ABSENT, "inference only"),
        "torch.compile": Outcome(FAILED, "RuntimeError: no"),
    }
    return Measurement(MODEL, "resnet18", TRAINING_STEP, 16, "float32", 224, outcomes)


def test_who_is_best_leaves_out_the_wrong_ones():
    entry = inference()
    assert (best_eager(entry), best_rival(entry), best_of_ours(entry)) == ("eager channels_last", "openvino", "frozen")
    assert times_faster(entry, "frozen", "openvino") == pytest.approx(0.8)


def test_ratios_are_formed_round_by_round():
    slow = Outcome(RIGHT, timing=Timing((4.0, 1.0, 3.0)))
    fast = Outcome(RIGHT, timing=Timing((1.0, 1.0, 2.0)))
    entry = inference(**{"eager channels_last": slow, "eager NCHW": slow, "frozen": fast})
    assert times_faster(entry, "frozen", "eager NCHW") == 1.5  # the medians' quotient is 3
    shorter = inference(**{"eager NCHW": slow, "frozen": Outcome(RIGHT, timing=Timing((1.0, 1.0)))})
    assert times_faster(shorter, "frozen", "eager NCHW") == 3


def test_figures_by_hand():
    found, ceilings = inference(batch_size=8), result().ceilings
    eager = figures(found, "eager channels_last", ceilings)
    assert eager.images_per_second == pytest.approx(8 / 0.128)
    assert eager.bytes_per_second == pytest.approx(1e6 / 0.128)
    assert eager.flop_per_second == pytest.approx(4e6 / 0.128)
    assert eager.flop_per_byte == 4
    assert eager.roofline_fraction == pytest.approx(4e-3 / 0.128)  # the FLOP take longer than the least bytes
    assert figures(found, "frozen", ceilings).times_best_eager == pytest.approx(1.6)
    wrong = figures(found, "fused", ceilings)
    assert wrong.times_best_eager is None and wrong.roofline_fraction is None
    assert figures(found, "apex", ceilings).images_per_second is None
    assert figures(found, "frozen", {}).roofline_fraction is None


def test_csv_has_a_row_for_each_contender_in_si_units():
    rows = list(csv.DictReader(io.StringIO(csv_text(result(inference(8), training())))))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 10
    frozen = next(row for row in rows if row["contender"] == "frozen")
    assert float(frozen["median_seconds"]) == pytest.approx(0.08)
    assert float(frozen["p20_seconds"]) == pytest.approx(0.0704)
    assert float(frozen["images_per_second"]) == pytest.approx(100)
    assert (frozen["rounds"], frozen["peak_bytes"], frozen["flop"]) == ("3", "3000000", "4000000")
    assert frozen["commit"] == MACHINE["commit"] and frozen["saved_bytes"] == ""
    absent = next(row for row in rows if row["contender"] == "apex")
    assert (absent["status"], absent["reason"], absent["median_seconds"]) == (ABSENT, "apex is not installed", "")


def table_below(text: str, title: str) -> list[list[str]]:
    """The cells of the first table behind a headline."""
    lines = text[text.index(title) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def test_markdown_shows_times_losses_and_reasons():
    text = markdown_report(result(inference(8), inference(1), training()))
    assert "commit: cccccccccc-dirty" in text and "openvino 2026.1" in text and "load before: 0.2" in text
    assert "1.00 GB/s copied" in text
    header, _, *rows = table_below(text, "### resnet18, inference, batch 8, float32, 224x224")
    assert header[:4] == ["contender", "ms (20-80 %)", "images/s", "to eager"] and "saved MB" not in header
    assert [row[0] for row in rows] == ["openvino", "frozen", "eager channels_last", "eager NCHW", "fused"]
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(cells["frozen"].values())[1:4] == ["80.0 (70.4-89.6)", "100", "1.60x"]
    assert cells["eager NCHW"]["to eager"] == "0.80x" and cells["openvino"]["setup s"] == "2.5"
    assert cells["fused"]["to eager"] == "-" and cells["fused"]["numbers"] == "WRONG: off by one"
    eager = cells["eager channels_last"]
    assert [eager[title] for title in ("moved MB", "GB/s", "% roof")] == ["1.00", "0.00781", "3"]
    assert cells["frozen"]["peak MB"] == "3.00" and cells["frozen"]["numbers"] == "right"
    assert "Ours was the fastest, or as fast as the fastest, in 1 of 3 measurements." in text
    summary = {row[0].split(", ")[2]: row for row in table_below(text, "## Summary")[2:]}
    assert summary["batch 1"][1:] == [
        "1.60x",
        "0.80x",
        "frozen 10.0 ms",
        "openvino 8.00 ms",
        "eager channels_last 16.0 ms",
    ]
    assert text.count("apex is not installed") == 1
    assert (
        "- torch.compile failed, in 1 of 3: resnet18, training step, batch 16, float32, 224x224: RuntimeError" in text
    )
    header, _, *rows = table_below(text, "### resnet18, training step")
    assert [row[header.index("saved MB")] for row in rows] == ["25.0", "50.0"]


def test_a_tie_is_no_loss_and_who_was_wrong_has_not_taken_part():
    def won(measurement: Measurement) -> str:
        return standing([measurement]).partition(" in ")[2]

    assert won(training()) == "1 of 1 measurements."
    assert won(inference(openvino=right(10 / 1.004))) == "1 of 1 measurements."
    assert won(inference(openvino=right(10 / 1.006))) == "0 of 1 measurements."
    assert won(inference(openvino=right(30), frozen=right(32))) == "0 of 1 measurements."
    assert won(inference(frozen=Outcome(FAILED, "no"))) == "0 of 0 measurements."


def test_an_op_is_told_in_microseconds_and_without_images():
    outcomes = {"eager": right(0.25, moved_bytes=10**6), "ours native": right(0.125)}
    entry = Measurement(OP, "bn_apply 64x56x56", INFERENCE, 8, "float32", None, outcomes, least_bytes=10**6)
    header, _, *rows = table_below(markdown_report(result(entry)), "### bn_apply 64x56x56")
    assert header == ["contender", "µs (20-80 %)", "to eager", "moved MB", "GB/s", "% roof", "numbers"]
    assert rows[0] == ["ours native", "125 (110-140)", "2.00x", "-", "-", "800", "right"]


def test_nothing_measured():
    assert "Nothing was measured" in markdown_report(result())
    assert csv_text(result()).strip() == ",".join(COLUMNS)


def test_results_of_one_condition_are_merged_and_others_stand_beside():
    later = {"date": "2026-11-25T12:00:00+00:00", "load_average": 0.75}
    again = inference(1, frozen=right(5))
    first, second = result(inference(1), inference(8)), result(again, training(), **later)
    other = result(inference(1), commit="d" * 40)
    for order in ([first, second, other], [second, first, other]):
        one, two = merged(order)
        assert [entry.key for entry in one.measurements] == [entry.key for entry in (again, inference(8), training())]
        assert one.measurements[0] is again
        assert one.machine["load_average"] == 0.75 and one.machine["date"] == later["date"]
        assert two is other
    assert [entry.title for entry in in_order(one.measurements)] == [
        entry.title for entry in (again, inference(8), training())
    ]
    assert len(merged([first, result(inference(), threads=1)])) == 2
    assert len(merged([first, result(inference(), packages={"openvino": "2026.2"})])) == 2


def test_differences_of_conditions():
    other = result(threads=4, packages={"openvino": "2026.1", "timm": "1.0"}, load_average=9.0, date="tomorrow")
    assert condition.differences(result(), other) == {"threads": (2, 4), "timm": (None, "1.0")}


def test_a_table_needs_rows_as_long_as_its_header():
    assert text_table(["a", "b"], [["x|y", "1"]]).splitlines()[2] == "| x\\|y |   1 |"
    with pytest.raises(ValueError, match="shorter"):
        text_table(["a", "b"], [["x"]])


def test_write_all_without_what_the_page_needs(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.warns(UserWarning, match=r"run.html was not made: matplotlib"):
        paths = files.write_all(result(inference()), tmp_path / "new", "run")
    assert [path.name for path in paths] == ["run.json", "run.csv", "run.md"]
    assert Result.load(paths[0]) == result(inference())


def test_a_file_with_facts_that_nobody_reads_any_more_is_read(tmp_path):
    path = tmp_path / "run.json"
    result(inference()).save(path)
    plain = json.loads(path.read_text())
    plain["ledgers"] = {}
    plain["measurements"][0]["clocks"] = {"notes": []}
    path.write_text(json.dumps(plain))
    assert Result.load(path) == result(inference())


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    files.add_arguments(parser)
    return files.main(parser.parse_args([str(word) for word in words]))


def test_the_command_remakes_the_files_and_refuses_others(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    paths = files.write_all(result(inference(), training()), tmp_path, "run")
    before = {path: path.read_bytes() for path in paths}
    assert [path.suffix for path in paths] == [".json", ".csv", ".md", ".html"]
    for path in paths[1:]:
        path.unlink()
    assert run(paths[0]) == 0
    assert {path: path.read_bytes() for path in paths} == before, "not the same every time"
    dataclasses.replace(result(inference()), machine=MACHINE | {"threads": 1}).save(tmp_path / "other.json")
    capsys.readouterr()
    assert run(paths[0], tmp_path / "other.json") == 2
    assert "must be of one condition and commit" in capsys.readouterr().err
    assert run(paths[0], paths[0], "--output", tmp_path / "both") == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "both" / f"report.{end}") for end in ("csv", "md", "html")
    ]
    (tmp_path / "old.json").write_text(json.dumps({"machine": {}}))
    assert run(tmp_path / "old.json") == 2
    assert "old.json: schema: Field required" in capsys.readouterr().err
    assert run(tmp_path / "nowhere.json") == 2
