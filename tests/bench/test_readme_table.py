"""README and docs/measured.md quote what the committed result files say, and nothing else; so does the chart."""

from __future__ import annotations

import re

import pytest

from benchmarks.readme_chart import label
from benchmarks.readme_table import (
    CHART,
    COUNTED,
    DECIDING,
    DEVICE,
    MEASURED,
    NOTHING_MEASURED,
    PAGES,
    README,
    RESULTS,
    STEP_BYTES,
    chart_rows,
    tables,
    with_tables,
)
from fused_resnet.bench.result import (
    ABSENT,
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

MACHINE = {"device": "a machine", "threads": 2, "torch": "2.13.0", "commit": "c" * 40, "load_average": 0.5}


def foreign_results() -> list[str]:
    found = []
    for path in set(RESULTS.glob("*.json")) - set(RESULTS.glob(STEP_BYTES)):
        try:
            Result.load(path)
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_of_the_committed_results(page):
    if foreign := foreign_results():
        pytest.xfail("; ".join(foreign))
    texts, text = tables(), page.read_text()
    quoted = with_tables(text, {marks: texts[marks] for marks in PAGES[page]})
    assert text == quoted, "run: python -m benchmarks.readme_table --write"


def test_the_chart_has_the_ratios_of_the_committed_results():
    if foreign := foreign_results():
        pytest.xfail("; ".join(foreign))
    expected = [label(ratio) for ratios in zip(*chart_rows().values(), strict=True) for ratio in ratios if ratio]
    assert re.findall(r">(\d+\.\d\dx)<", CHART.read_text()) == expected, (
        "run: python -m benchmarks.readme_table --write"
    )


def test_the_status_has_the_range_of_the_committed_results():
    if foreign := foreign_results():
        pytest.xfail("; ".join(foreign))
    small, large, training = zip(*chart_rows().values(), strict=True)
    inference, readme = [*small, *large], README.read_text().replace("\n", " ")
    assert f"run {label(min(inference))} to {label(max(inference))} as fast as eager PyTorch in inference" in readme
    assert f"and {label(min(training))} to {label(max(training))} in training" in readme


def test_the_deciding_table_by_hand(tmp_path):
    save(tmp_path / "cpu_float32_a.json", network("resnet50"), network("resnet18", batch_size=8), device=DEVICE)
    save(tmp_path / "cpu_float32_b.json", network("resnet50", batch_size=8), device="another machine")
    save(tmp_path / "cpu_bfloat16.json", network("resnet34"), device=DEVICE)
    header, _, *found = rows(tables(tmp_path)[DECIDING], "Below 1.00x")
    assert header[:4] == ["", "inference, batch 1: ms", "to eager", "to the fastest"] and len(header) == 10
    assert found == [
        ["resnet18", *"---", "10.0", "1.60x", "0.80x", *"---"],
        ["resnet50", "10.0", "1.60x", "0.80x", *"------"],
    ]


def right(milliseconds: float) -> Outcome:
    return Outcome(RIGHT, timing=Timing(tuple(milliseconds * 1e-3 * step for step in (1, 0.8, 1.2))))


def network(name: str, mode: str = INFERENCE, batch_size: int = 1, level: str = MODEL, **outcomes: Outcome):
    found = {
        "frozen": right(10),
        "eager NCHW": right(20),
        "openvino": right(8),
        "eager channels_last": right(16),
        "fused level 1": right(30),
        "apex": Outcome(ABSENT, "not installed"),
    }
    return Measurement(level, name, mode, batch_size, "float32", 224, found | outcomes)


def save(path, *measurements: Measurement, **machine) -> None:
    Result(MACHINE | machine, {}, {}, list(measurements)).save(path)


def rows(text: str, title: str) -> list[list[str]]:
    lines = text[text.index(title) :].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_measured_table_by_hand(tmp_path):
    save(tmp_path / "b.json", network("resnet50"), network("resnet18", fused=Outcome(WRONG, "no", Timing((1.0,)))))
    save(tmp_path / "a.json", network("resnet18", TRAINING_STEP, 16), network("x", level=OP))
    text = tables(tmp_path)[MEASURED]
    assert "a machine, 2 threads, torch 2.13.0, commit cccccccccc, load before 0.5" in text
    assert "`benchmarks/results/a.json`, `benchmarks/results/b.json`" in text
    header, _, first, second = rows(text, "**inference, batch 1, float32, 224x224**")
    assert header[1:] == [
        "eager NCHW",
        "eager channels_last",
        "openvino",
        "frozen",
        "fused",
        "to eager",
        "to the fastest rival",
    ]
    assert first == ["resnet18", "20.0", "16.0", "**8.00**", "10.0", "wrong", "1.60x", "0.80x"]
    assert second == ["resnet50", "20.0", "16.0", "**8.00**", "10.0", "-", "1.60x", "0.80x"]
    assert "**training step, batch 16, float32, 224x224**" in text and "| x " not in text


def test_conditions_are_not_mixed(tmp_path):
    save(tmp_path / "a.json", network("resnet18"))
    save(tmp_path / "b.json", network("resnet18"), commit="d" * 40)
    text = tables(tmp_path)[MEASURED]
    assert text.count("**inference, batch 1, float32, 224x224**") == 2
    assert text.count("/a.json") == text.count("/b.json") == 1


def test_without_results_it_says_so(tmp_path):
    assert tables(tmp_path) == {DECIDING: NOTHING_MEASURED, MEASURED: NOTHING_MEASURED, COUNTED: ""}


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "old.json").write_text('{"machine": {}}')
    with pytest.raises(ValueError, match="old.json: schema: Field required"):
        tables(tmp_path)


def test_older_tables_are_replaced():
    readme = f"head\n{COUNTED[0]}\n{COUNTED[1]}\nbetween\n{MEASURED[0]}\n| old |\n{MEASURED[1]}\ntail\n"
    expected = f"head\n{COUNTED[0]}\nbytes\n{COUNTED[1]}\nbetween\n{MEASURED[0]}\n| new |\n{MEASURED[1]}\ntail\n"
    assert with_tables(readme, {MEASURED: "| new |", COUNTED: "bytes"}) == expected


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="must contain"):
        with_tables("no marks", {MEASURED: ""})
