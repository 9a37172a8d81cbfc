"""README's table of measured numbers, made from the committed result files.

python -m benchmarks.readme_table            prints it
python -m benchmarks.readme_table --write    puts it into README.md, between its two marks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: python -m benchmarks.readme_table --write -->", "<!-- /measured -->"
PLAIN = ("plain NCHW", "plain channels_last")


def table(results: Path = RESULTS) -> str:
    """One Markdown table for each result file, under its condition."""
    return "\n\n".join(_table_of(path, json.loads(path.read_text())) for path in sorted(results.glob("*.json")))


def _table_of(path: Path, result: dict[str, Any]) -> str:
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


def with_table(readme: str, text: str) -> str:
    """The README with ``text`` between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README must contain {BEGIN} and, below it, {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text(), table()))
    else:
        print(table())


if __name__ == "__main__":
    main()
