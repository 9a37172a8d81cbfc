"""README's tables of measured times and counted bytes, made from the committed result files.

python -m benchmarks.readme_table            prints them
python -m benchmarks.readme_table --write    puts them into README.md, each between its two marks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = ("<!-- measured: python -m benchmarks.readme_table --write -->", "<!-- /measured -->")
COUNTED = ("<!-- counted: python -m benchmarks.readme_table --write -->", "<!-- /counted -->")
STEP_BYTES = "step_bytes_*.json"
PLAIN = ("plain NCHW", "plain channels_last")


def tables(results: Path = RESULTS) -> dict[tuple[str, str], str]:
    """The text between each pair of marks: a Markdown table for each result file, under its condition."""
    counted = sorted(results.glob(STEP_BYTES))
    measured = sorted(set(results.glob("*.json")) - set(counted))
    return {
        MEASURED: "\n\n".join(_measured(path, json.loads(path.read_text())) for path in measured),
        COUNTED: "\n\n".join(_counted(path, json.loads(path.read_text())) for path in counted),
    }


def _counted(path: Path, result: dict[str, Any]) -> str:
    step, saved, size = result["step"], result["saved"], result["image_size"]
    columns = next(iter(result["models"].values()))
    titles = [*columns["step"], *(f"kept: {name}" for name in columns["saved"])]
    lines = [
        f"MB (10^6 bytes) an image at {size}x{size}, as a fraction of eager's behind it: read and written by a step in "
        f"{step['dtype']} at batch {step['batch_size']}, and kept for backward in {saved['dtype']}; commit "
        f"{result['machine']['commit'][:10]} ([file](benchmarks/results/{path.name})).",
        "",
        "| | " + " | ".join(titles) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for model, found in result["models"].items():
        entries = [*found["step"].values(), *found["saved"].values()]
        cells = (f"{entry['bytes_per_image'] / 1e6:.0f} ({entry['ratio_to_eager']:.3f})" for entry in entries)
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _measured(path: Path, result: dict[str, Any]) -> str:
    machine = result["machine"]
    load = machine["load_average"]
    condition = (
        f"{result['model']}, {result['image_size']}x{result['image_size']}, {result['dtype']}, {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, commit {machine['commit'][:10]}, "
        f"load before {load:.1f}"
    )
    lines = [
        f"{condition} ([file](benchmarks/results/{path.name})). Medians (20th to 80th percentile); ratios are "
        "medians of those formed round by round:",
        "",
        "| | batch | " + " | ".join(PLAIN) + " | here | against NCHW | against channels_last |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["measured"]:
        medians = {name: _milliseconds(timing) for name, timing in entry["seconds"].items()}
        for name in (name for name in medians if name not in PLAIN):
            cells = [entry["mode"] + ", " + name, str(entry["batch_size"]), *(medians[plain] for plain in PLAIN)]
            cells += [medians[name], *(f"{entry['speedup'][name][plain]:.2f}x" for plain in PLAIN)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _milliseconds(timing: dict[str, Any]) -> str:
    median, low, high = (timing[key] * 1e3 for key in ("median", "p20", "p80"))
    return f"{median:.0f} ms ({low:.0f}-{high:.0f})"


def with_tables(readme: str, texts: dict[tuple[str, str], str]) -> str:
    """The README with each text between its marks."""
    for (begin, end), text in texts.items():
        before, _, rest = readme.partition(begin)
        _, mark, after = rest.partition(end)
        if not mark:
            raise ValueError(f"README must contain {begin} and, below it, {end}")
        readme = f"{before}{begin}\n{text}\n{end}{after}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    if parser.parse_args().write:
        README.write_text(with_tables(README.read_text(), tables()))
    else:
        print(*tables().values(), sep="\n\n")


if __name__ == "__main__":
    main()
