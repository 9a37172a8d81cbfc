"""The demo's picture: on the left the two losses and how far they are apart, on the right the speeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fused_resnet.training.comparison import EAGER, FROZEN, FUSED, REFERENCE, YARDSTICK

INK = "#1f2933"
QUIET = "#7b8794"
WHITE: Any = {"facecolor": "white", "edgecolor": "none", "pad": 1}
COLORS = {EAGER: "#b8c1cc", FUSED: "#1273de", FROZEN: "#0b8a6f"}
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
        losses, differences = left.subplots(2, 1, height_ratios=[2.2, 1], sharex=True)
        _draw_losses(losses, results["training"])
        _draw_differences(differences, results["training"])
        _draw_speeds(right.subplots(), results)
        figure.savefig(path)


def milliseconds(seconds: float) -> str:
    """A duration for people: "0.312 ms", "1418.0 ms"."""
    return f"{seconds * 1e3:.{1 if seconds >= 0.01 else 3}f} ms"


def _title(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    where = machine["device"] + ("" if machine["device_type"] == "cuda" else f", threads: {machine['threads']}")
    return f"{where}   ·   torch {machine['torch']}   ·   {settings['autocast'] or 'float32'}"


def _draw_losses(axes: Axes, training: dict[str, Any]) -> None:
    steps = range(1, training["steps"] + 1)
    for name, contender, width in ((EAGER, REFERENCE, 6.0), (FUSED, FUSED, 1.6)):
        run = training["contenders"][contender]
        label = f"{name}: {run['accuracy']:.1%} of test images right"
        axes.plot(steps, run["losses"], label=label, linewidth=width, color=COLORS[name])
    axes.set_title(f"Training {training['model']} from the same seed")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def _draw_differences(axes: Axes, training: dict[str, Any]) -> None:
    contenders = training["contenders"]
    lines = ((YARDSTICK, COLORS[EAGER], 3.0, "eager in the other memory format"), (FUSED, COLORS[FUSED], 1.6, FUSED))
    for name, color, width, label in lines:
        pairs = zip(contenders[name]["losses"], contenders[REFERENCE]["losses"], strict=True)
        # Equal losses have no logarithm; they are drawn at the bottom, float32's resolution.
        differences = [max(abs(a - b), 1e-8) for a, b in pairs]
        axes.semilogy(range(1, len(differences) + 1), differences, color=color, linewidth=width, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("How far the losses are from eager's", fontsize=11)
    axes.set_ylabel("difference")
    axes.set_xlabel("step")
    axes.legend(loc="lower right", fontsize=9.5)


def _draw_speeds(axes: Axes, results: dict[str, Any]) -> None:
    names: list[tuple[float, str]] = []
    position = fastest = 0.0
    for heading, bars in _speed_groups(results):
        axes.text(0, position, heading, va="center", color=INK)
        for name, (speedup, seconds) in bars.items():
            position += 1
            names.append((position, name))
            axes.barh(position, speedup, height=0.8, color=COLORS[name])
            value = axes.annotate(
                f"{speedup:.2f}x",
                (speedup, position),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold",
                bbox=WHITE,
            )
            axes.annotate(f"  {milliseconds(seconds)}", (1, 0.5), xycoords=value, va="center", color=QUIET, fontsize=10)
            fastest = max(fastest, speedup)
        position += 1.4
    axes.set_ylim(position - 0.7, -0.6)
    axes.set_xlim(0, fastest * 1.4)
    axes.axvline(1, color=QUIET, linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    axes.set_yticks([place for place, _ in names], [name for _, name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.set_title("Speed")
    axes.set_xlabel("times as fast as eager PyTorch, in its faster memory format")


def _speed_groups(results: dict[str, Any]) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """(heading, {contender: (speed, median seconds)}) of the training and of each inference batch size."""
    groups = []
    for kind, entry in [("training", results["training"]), *(("inference", entry) for entry in results["inference"])]:
        names = {EAGER: entry["baseline"], FUSED: FUSED, FROZEN: FROZEN}
        contenders = {name: entry["contenders"][key] for name, key in names.items() if key in entry["contenders"]}
        bars = {name: (contender["speedup"], contender["median"]) for name, contender in contenders.items()}
        groups.append((f"{kind} {entry['model']}, batch {entry['batch_size']}", bars))
    return groups
