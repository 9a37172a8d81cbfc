"""The demo's picture: on the left the two losses and how far they are apart, on the right the speeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fused_resnet.bench.contenders import FROZEN, FUSED, PLAIN

INK = "#1f2933"
QUIET = "#7b8794"
COLORS = {PLAIN: "#b8c1cc", FUSED: "#1273de", FROZEN: "#0b8a6f"}
STYLE: Any = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}


def draw_picture(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG of 1760 x 960 pixels; ``results`` as `fused_resnet.training.demo.run_demo` returns them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6), dpi=160, layout="constrained")
        figure.suptitle(_title(results), x=0.01, ha="left", fontsize=10.5, color=QUIET)
        left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1], squeeze=False)[0]
        losses, differences = left.subplots(2, 1, height_ratios=[3, 1], sharex=True)
        _draw_losses(losses, results["training"])
        _draw_differences(differences, results["training"])
        _draw_speeds(right.subplots(), results)
        figure.savefig(path)


def _title(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    where = machine["device"] + ("" if machine["device_type"] == "cuda" else f", {machine['threads']} threads")
    return f"{where}   ·   torch {machine['torch']}   ·   {settings['autocast'] or 'float32'}"


def _draw_losses(axes: Axes, training: dict[str, Any]) -> None:
    plain, fused = training[PLAIN], training[FUSED]
    steps = range(1, training["steps"] + 1)
    for name, run, width in ((PLAIN, plain, 6.0), (FUSED, fused, 1.6)):
        label = f"{name}: {run['accuracy']:.1%} of test images right"
        axes.plot(steps, run["losses"], label=label, linewidth=width, color=COLORS[name])
    axes.set_title(f"Training {training['model']} twice from the same seed")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def _draw_differences(axes: Axes, training: dict[str, Any]) -> None:
    differences = [abs(a - b) for a, b in zip(training[PLAIN]["losses"], training[FUSED]["losses"], strict=True)]
    # Equal losses have no logarithm; they are drawn at the bottom, float32's resolution.
    axes.semilogy(range(1, len(differences) + 1), [max(d, 1e-8) for d in differences], color=INK, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("|difference|")
    axes.set_xlabel("step")


def _draw_speeds(axes: Axes, results: dict[str, Any]) -> None:
    names: list[tuple[float, str]] = []
    position = fastest = 0.0
    for heading, bars in _speed_groups(results):
        axes.text(0, position, heading, va="center", color=INK)
        for name, (speedup, seconds) in bars.items():
            position += 1
            names.append((position, name))
            axes.barh(position, speedup, height=0.8, color=COLORS[name])
            value = axes.text(speedup, position, f" {speedup:.2f}x", va="center", color=INK, fontweight="bold")
            axes.annotate(f"  {seconds * 1e3:.4g} ms", (1, 0.5), xycoords=value, va="center", color=QUIET, fontsize=10)
            fastest = max(fastest, speedup)
        position += 1.4
    axes.set_ylim(position - 0.7, -0.6)
    axes.set_xlim(0, fastest * 1.4)
    axes.axvline(1, color=QUIET, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    axes.set_yticks([place for place, _ in names], [name for _, name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.set_title("Speed")
    axes.set_xlabel("times as fast as plain PyTorch, in its faster memory format")


def _speed_groups(results: dict[str, Any]) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """(heading, {contender: (speed, median seconds)}) of the training and of each inference batch size."""
    training = results["training"]
    heading = f"training {training['model']}, batch {results['settings']['batch_size']}"
    speeds = {PLAIN: 1.0, FUSED: training["speedup"]}
    groups = [(heading, {name: (speeds[name], training[name]["step_seconds"]["median"]) for name in speeds})]
    for entry in results["inference"]:
        contenders = entry["contenders"]
        bars = {PLAIN: (1.0, contenders[entry["baseline"]]["median"])}
        bars |= {name: (contenders[name]["speedup"], contenders[name]["median"]) for name in (FUSED, FROZEN)}
        groups.append((f"inference {entry['model']}, batch {entry['batch_size']}", bars))
    return groups
