"""Host time of a residual block on a CPU: a 4x4 image, so small that only what Python and PyTorch do per call counts.

    python -m benchmarks.host_time [--rounds 40] [--write]

One thread, one process; fused and torchvision's blocks take turns in random order, a batch of calls each. Ratios are of
medians over rounds, with the interval that a bootstrap gives (scipy). With --write also into
benchmarks/results/launch/cpu_host_time_of_a_block.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

import fused_resnet
from fused_resnet.bench.machine import machine_facts
from fused_resnet.bench.suite.torchvision_ops import missing_torchvision_ops

RESULT = Path(__file__).parent / "results" / "launch" / "cpu_host_time_of_a_block.json"
CHANNELS, SIZE, CALLS = 64, 4, 50


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the result file")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    found = {
        f"{kind}, {layout}, {way}": measured(block, memory_format, backward, arguments.rounds)
        for kind, block in blocks().items()
        for layout, memory_format in (("channels_last", torch.channels_last), ("NCHW", torch.contiguous_format))
        for way, backward in (("forward", False), ("forward and backward", True))
    }
    for name, numbers in found.items():
        low, high = numbers["interval"]
        print(
            f"{name:48} {numbers['fused_us']:7.0f} us, torchvision {numbers['plain_us']:7.0f} us:"
            f" {numbers['ratio']:.2f}x ({low:.2f} to {high:.2f})"
        )
    if arguments.write:
        RESULT.write_text(json.dumps({"machine": machine_facts("cpu"), "blocks": found}, indent=1) + "\n")
        print(f"wrote {RESULT}")


def blocks() -> dict[str, nn.Module]:
    """torchvision's."""
    missing_torchvision_ops()
    from torchvision.models import resnet

    return {
        "BasicBlock": resnet.BasicBlock(CHANNELS, CHANNELS),
        "Bottleneck": resnet.Bottleneck(CHANNELS, CHANNELS // 4),
    }


def measured(block: nn.Module, memory_format: torch.memory_format, backward: bool, rounds: int) -> dict[str, Any]:
    """Microseconds of a training forward (and backward), and the ratio of fused to plain."""
    plain = block.to(memory_format=memory_format)  # type: ignore[call-overload]
    fused = fused_resnet.fuse(copy.deepcopy(plain))
    x = torch.randn(1, CHANNELS, SIZE, SIZE).to(memory_format=memory_format).requires_grad_()
    cotangent = torch.ones_like(x)

    def timed(module: nn.Module) -> Callable[[], float]:
        def run() -> float:
            begin = time.perf_counter()
            for _ in range(CALLS):
                out = module(x)
                if backward:
                    out.backward(cotangent)
            return (time.perf_counter() - begin) / CALLS * 1e6

        return run

    ways = {"fused": timed(fused), "plain": timed(plain)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 2):
        for name in random.sample(list(ways), 2):
            seconds[name].append(ways[name]())
    ours, theirs = (np.array(seconds[name][2:]) for name in ("fused", "plain"))
    interval = stats.bootstrap((ours, theirs), ratio, vectorized=False, paired=True, random_state=0).confidence_interval
    return {
        "fused_us": float(np.median(ours)),
        "plain_us": float(np.median(theirs)),
        "ratio": ratio(ours, theirs),
        "interval": [float(interval.low), float(interval.high)],
    }


def ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.median(ours) / np.median(theirs))


if __name__ == "__main__":
    main()
