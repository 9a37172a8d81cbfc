"""The tables of README and docs/measured.md, and README's chart, made from the committed result files.

python -m benchmarks.readme_table            prints the tables
python -m benchmarks.readme_table --write    puts them into the two pages, each between its two marks; draws the chart
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import readme_chart
from fused_resnet.bench.report import condition
from fused_resnet.bench.report.condition import merged
from fused_resnet.bench.report.figures import (
    PLAIN_EAGER,
    best_eager,
    best_of_ours,
    best_rival,
    is_ours,
    right_timings,
    text_table,
    three_digits,
    times_faster,
)
from fused_resnet.bench.result import ABSENT, INFERENCE, MODEL, MODES, RIGHT, TRAINING_STEP, Measurement, Result
from fused_resnet.bench.suite.subjects import builder_names

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MEASURED_PAGE = ROOT / "docs" / "measured.md"
CHART = ROOT / "docs" / "speed.svg"
RESULTS = ROOT / "benchmarks" / "results"
DECIDING = ("<!-- deciding: python -m benchmarks.readme_table --write -->", "<!-- /deciding -->")
MEASURED = ("<!-- measured: python -m benchmarks.readme_table --write -->", "<!-- /measured -->")
COUNTED = ("<!-- counted: python -m benchmarks.readme_table --write -->", "<!-- /counted -->")
PAGES = {README: (DECIDING,), MEASURED_PAGE: (MEASURED, COUNTED)}
STEP_BYTES = "step_bytes_*.json"
DECISIVE = "cpu_float32_*"
DEVICE = "AMD EPYC (AVX2)"
"""The results behind README's table: all networks, in training and inference, in float32 on this device."""
TASKS = ((INFERENCE, 1), (INFERENCE, 8), (TRAINING_STEP, 4))
"""Its columns: mode and batch size."""
PEERS = ("onnxruntime", "openvino", "torch_tensorrt", "timm", "apex")
"""Whose versions are told."""
OURS_ALWAYS = ("fused", "frozen")
RIVALS = (best_eager, best_rival)
READING = (
    "Milliseconds, medians; the fastest in bold. The last columns say how many times as fast as the faster eager, and "
    "as the fastest of all that this package does not run, the best of ours was: medians of ratios formed by the round."
)
DECIDING_READING = (
    "Milliseconds of the fastest of ours (frozen in inference, fused in training), and how many times as fast it is as "
    "eager PyTorch in its faster memory format, and as the fastest of what this package does not run: eager, "
    "torch.compile, ONNX Runtime, OpenVINO, timm. Below 1.00x the others win."
)
NOTHING_MEASURED = "Nothing was measured yet: benchmarks/results holds no result of `python -m fused_resnet bench`."


def tables(results: Path = RESULTS) -> dict[tuple[str, str], str]:
    """The text between each pair of marks: Markdown tables, each under its condition.

    Raises:
        ValueError: a JSON file in the folder is neither a `Result` nor one of the counted bytes; the message names it.
    """
    counted = sorted(results.glob(STEP_BYTES))
    measured = sorted(set(results.glob("*.json")) - set(counted))
    return {
        DECIDING: _deciding(decisive(results)),
        MEASURED: _measured(measured),
        COUNTED: "\n\n".join(_counted(path, json.loads(path.read_text())) for path in counted),
    }


def decisive(results: Path = RESULTS) -> dict[str, dict[tuple[str, int], Measurement]]:
    """For each network, by mode and batch size, what README's table and chart tell; in the builders' order."""
    found: dict[str, dict[tuple[str, int], Measurement]] = {}
    for path in sorted(results.glob(f"{DECISIVE}.json")):
        result = Result.load(path)
        if result.machine.get("device") != DEVICE:
            continue
        for entry in result.measurements:
            task = (entry.mode, entry.batch_size)
            if entry.level == MODEL and entry.dtype == "float32" and task in TASKS:
                found.setdefault(entry.subject, {})[task] = entry
    return {subject: found[subject] for subject in sorted(found, key=_place)}


def _deciding(networks: Mapping[str, Mapping[tuple[str, int], Measurement]]) -> str:
    """One row for each network; what of it was not measured is a dash."""
    if not networks:
        return NOTHING_MEASURED
    header = [""]
    for mode, batch_size in TASKS:
        header += [f"{mode}, batch {batch_size}: ms", "to eager", "to the fastest"]
    rows = []
    for subject, entries in networks.items():
        row = [subject]
        for task in TASKS:
            entry = entries.get(task)
            ours = None if entry is None else best_of_ours(entry)
            if entry is None or ours is None:
                row += ["-", "-", "-"]
                continue
            row += [three_digits(right_timings(entry)[ours].median * 1e3)]
            row += [_ratio(entry, best(entry)) for best in RIVALS]
        rows.append(row)
    return f"{DECIDING_READING}\n\n{text_table(header, rows)}"


def _measured(paths: Sequence[Path]) -> str:
    """For each condition and commit its networks: a table for each mode, batch size, dtype and image size."""
    files = {path: Result.load(path) for path in paths}
    if not files:
        return NOTHING_MEASURED
    parts = [READING]
    for result in merged(list(files.values())):
        names = [path.name for path, one in files.items() if condition.same(result, one)]
        parts += [_condition(result, names), *_networks(result)]
    return "\n\n".join(parts)


def _condition(result: Result, names: Sequence[str]) -> str:
    machine, load = result.machine, result.machine.get("load_average")
    versions = ", ".join(
        f"{name} {version}" for name in PEERS if (version := (machine.get("packages") or {}).get(name))
    )
    files = ", ".join(f"`benchmarks/results/{name}`" for name in names)
    load_text = "" if load is None else f", load before {load:.1f}"
    return f"{condition.one_line(result)}{', ' + versions if versions else ''}{load_text} ({files})."


def _networks(result: Result) -> Iterator[str]:
    groups: dict[tuple[str, int, str, int | None], list[Measurement]] = {}
    for entry in result.measurements:
        if entry.level == MODEL:
            groups.setdefault((entry.mode, entry.batch_size, entry.dtype, entry.image_size), []).append(entry)
    order = sorted(groups, key=lambda key: (MODES.index(key[0]), key[1], list(groups).index(key)))
    for mode, batch_size, dtype, image_size in order:
        entries = groups[mode, batch_size, dtype, image_size]
        size = f", {image_size}x{image_size}" if image_size else ""
        yield f"**{mode}, batch {batch_size}, {dtype}{size}**\n\n{_network_table(entries)}"


def _network_table(entries: Sequence[Measurement]) -> str:
    """A row for each network, a column for each contender that had a time somewhere: eager, then rivals, then ours.

    Of ours only `OURS_ALWAYS` and who was the best of ours somewhere: levels and backends are for the reports.
    """
    found = dict.fromkeys(name for entry in entries for name, o in entry.outcomes.items() if o.timing is not None)
    fastest = {best_of_ours(entry) for entry in entries}
    names = [name for name in found if not is_ours(name) or name in OURS_ALWAYS or name in fastest]
    names.sort(key=lambda name: (is_ours(name), name not in PLAIN_EAGER))
    rows = [
        [entry.subject, *(_cell(entry, name) for name in names), *(_ratio(entry, best(entry)) for best in RIVALS)]
        for entry in sorted(entries, key=lambda entry: _place(entry.subject))
    ]
    return text_table(["", *names, "to eager", "to the fastest rival"], rows)


def _cell(entry: Measurement, name: str) -> str:
    outcome = entry.outcomes.get(name)
    if outcome is None or outcome.status == ABSENT:
        return "-"
    if outcome.status != RIGHT or outcome.timing is None:
        return outcome.status
    right = right_timings(entry)
    text = three_digits(outcome.timing.median * 1e3)
    return f"**{text}**" if name == min(right, key=lambda name: right[name].median) else text


def _ratio(entry: Measurement, other: str | None) -> str:
    ours = best_of_ours(entry)
    return "-" if ours is None or other is None else f"{times_faster(entry, ours, other):.2f}x"


def _place(subject: str) -> int:
    """Networks in the order of this package's builders, others after them as they came."""
    names = builder_names()
    return names.index(subject) if subject in names else len(names)


def _counted(path: Path, result: dict[str, Any]) -> str:
    step, saved, size = result["step"], result["saved"], result["image_size"]
    columns = next(iter(result["models"].values()))
    titles = [*columns["step"], *(f"kept: {name}" for name in columns["saved"])]
    lines = [
        f"MB (10^6 bytes) an image at {size}x{size}, in brackets as a fraction of eager's: read and written by a step "
        f"in {step['dtype']} at batch {step['batch_size']}, and kept for backward in {saved['dtype']}; commit "
        f"{result['machine']['commit'][:10]} (`benchmarks/results/{path.name}`).",
        "",
        "| | " + " | ".join(titles) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for model, found in result["models"].items():
        entries = [*found["step"].values(), *found["saved"].values()]
        cells = (f"{entry['bytes_per_image'] / 1e6:.0f} ({entry['ratio_to_eager']:.3f})" for entry in entries)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_tables(page: str, texts: Mapping[tuple[str, str], str]) -> str:
    """The page with each text between its marks."""
    for (begin, end), text in texts.items():
        before, _, rest = page.partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"the page must contain {begin} and, below it, {end}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the pages")
    texts = tables()
    if not parser.parse_args().write:
        print(*texts.values(), sep="\n\n")
        return
    for page, marks in PAGES.items():
        page.write_text(with_tables(page.read_text(), {mark: texts[mark] for mark in marks}))
    readme_chart.draw(chart_rows(), [f"{mode}, batch {batch_size}" for mode, batch_size in TASKS], DEVICE, CHART)


def chart_rows() -> dict[str, list[float | None]]:
    """For each network, how many times as fast as eager the best of ours was, task by task; None: not measured."""
    return {subject: [_to_eager(entries.get(task)) for task in TASKS] for subject, entries in decisive().items()}


def _to_eager(entry: Measurement | None) -> float | None:
    if entry is None or (ours := best_of_ours(entry)) is None or (eager := best_eager(entry)) is None:
        return None
    return times_faster(entry, ours, eager)


if __name__ == "__main__":
    main()
