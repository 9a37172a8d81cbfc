"""What the demo leaves behind: one table on the screen, a JSON with every number, a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fused_resnet.training.comparison import EAGER, FROZEN, FUSED, REFERENCE, YARDSTICK
from fused_resnet.training.demo_picture import draw_picture, milliseconds

JSON_NAME = "demo.json"
PICTURE_NAME = "demo.png"


def print_report(results: dict[str, Any], console: Console) -> None:
    """Prints the table; ``results`` as `fused_resnet.training.demo.run_demo` returns them."""
    table = Table(
        title=f"fused_resnet on {results['machine']['device']}",
        title_style="bold",
        caption=_caption(results),
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    for column in (EAGER, FUSED, FROZEN):
        table.add_column(column, justify="right")
    _add_training(table, results["training"])
    for entry in results["inference"]:
        table.add_section()
        _add_inference(table, entry)
    console.print(table)


def write_report(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes demo.json and demo.png into the folder, which is made if it is not there; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / JSON_NAME, folder / PICTURE_NAME
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    draw_picture(results, picture)
    return [picture, numbers]


def _add_training(table: Table, training: dict[str, Any]) -> None:
    contenders = training["contenders"]
    pair = [contenders[name] for name in (REFERENCE, FUSED)]
    table.add_row(f"[bold]Training {training['model']}, batch {training['batch_size']}")
    table.add_row("  test accuracy", *(f"{run['accuracy']:.1%}" for run in pair))
    table.add_row("  loss of the last step", *(f"{run['losses'][-1]:.4f}" for run in pair))
    yardstick = [contenders[name]["loss_difference"] for name in (YARDSTICK, FUSED)]
    for which in ("first", "mean", "max"):
        table.add_row(f"  loss difference, {which}", *(f"{difference[which]:.1e}" for difference in yardstick))
    _add_times(table, contenders, [FUSED])
    table.add_row("  saved for backward", *(f"{run['saved_bytes'] / 1e6:.1f} MB" for run in pair))
    table.add_row("  saved bytes", _times(1), _times(training["saved_bytes_ratio"]))


def _add_inference(table: Table, entry: dict[str, Any]) -> None:
    contenders = entry["contenders"]
    table.add_row(f"[bold]Inference {entry['model']}, batch {entry['batch_size']}")
    _add_times(table, contenders, [FUSED, FROZEN])
    shown = (REFERENCE, FUSED, FROZEN)
    table.add_row("  error to float64", *(f"{contenders[n]['error']:.1e} {contenders[n]['status']}" for n in shown))


def _add_times(table: Table, contenders: dict[str, Any], ours: list[str]) -> None:
    table.add_row("  time, NCHW", milliseconds(contenders[YARDSTICK]["median"]))
    table.add_row("  time, channels_last", *(milliseconds(contenders[name]["median"]) for name in (REFERENCE, *ours)))
    table.add_row("  speed", _times(1), *(_times(contenders[name]["speedup"]) for name in ours))


def _caption(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    threads = "" if machine["device_type"] == "cuda" else f", threads: {machine['threads']}"
    sizes = [f"{settings[key]}x{settings[key]}" for key in ("size", "inference_size")]
    return (
        "Medians of interleaved rounds; speed is to the faster of eager's memory formats. "
        "Loss differences are to eager channels_last; in eager's column that of eager NCHW, which is rounding alone. "
        f"{settings['autocast'] or 'float32'}{threads}, torch {machine['torch']}; "
        f"training images {sizes[0]}, inference {sizes[1]}; {results['seconds']:.0f} s in all."
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"
