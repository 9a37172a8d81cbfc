"""The CPU comparison behind README's table: one process, contenders in turns, medians, written with their condition.

    python -m benchmarks.cpu_speed [--rounds 15] [--model resnet50] [--threads 2]

Inference at batch 1 and 8: plain NCHW, plain channels_last, fused, frozen. A training step (forward, backward, SGD) at
batch 16: plain NCHW, plain channels_last, fused. All in float32. Writes benchmarks/results/<condition>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fused_resnet.bench.contenders import (
    PLAIN_FORMATS,
    build,
    builder_names,
    inference_contenders,
    plain_twin,
    relative_difference,
    settle_statistics,
    training_contenders,
)
from fused_resnet.bench.machine import machine_facts
from fused_resnet.bench.timer import interleave, ratio

WARMUP_ROUNDS = 2
RESULTS = Path(__file__).parent / "results"


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = machine_facts("cpu")  # before the work, so that the load average is of others
    torch.manual_seed(0)
    model = build(arguments.model)
    settle_statistics(model, torch.randn(8, 3, arguments.size, arguments.size))
    plain, plain_code = plain_twin(model, arguments.model)

    measured = []
    for batch_size in arguments.inference_batches:
        images = torch.randn(batch_size, 3, arguments.size, arguments.size)
        contenders = inference_contenders(model, plain, images)
        logits = {name: contender().clone() for name, contender in contenders.items()}
        measured.append({"mode": "inference", "batch_size": batch_size, **measure(contenders, arguments.rounds)})
        measured[-1]["relative_difference"] = {
            name: relative_difference(logits[name], logits["plain NCHW"]) for name in contenders
        }
        show(measured[-1])
    batch_size = arguments.training_batch
    images, labels = torch.randn(batch_size, 3, arguments.size, arguments.size), torch.randint(1000, (batch_size,))
    contenders = training_contenders(model, plain, images, labels)
    measured.append({"mode": "training", "batch_size": batch_size, **measure(contenders, arguments.training_rounds)})
    show(measured[-1])

    condition = f"cpu_float32_{arguments.model}_{arguments.size}px_{facts['threads']}threads"
    path = arguments.output or RESULTS / f"{condition}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": facts,
        "model": arguments.model,
        "plain_code": plain_code,
        "dtype": "float32",
        "image_size": arguments.size,
        "measured": measured,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=builder_names(), default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--inference-batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--training-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of inference")
    parser.add_argument("--training-rounds", type=int, help="measured rounds of training (default: --rounds)")
    parser.add_argument("--threads", type=int, help="default: PyTorch's choice")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<condition>.json")
    arguments = parser.parse_args(words)
    arguments.training_rounds = arguments.training_rounds or arguments.rounds
    return arguments


def measure(contenders: dict[str, Any], rounds: int) -> dict[str, Any]:
    timings = interleave(contenders, rounds, WARMUP_ROUNDS, "cpu")
    return {
        "seconds": {name: timing.as_dict() for name, timing in timings.items()},
        "speedup": {
            name: {plain: ratio(timings[plain], timing) for plain in PLAIN_FORMATS} for name, timing in timings.items()
        },
    }


def show(entry: dict[str, Any]) -> None:
    print(f"{entry['mode']}, batch {entry['batch_size']}")
    for name, timing in entry["seconds"].items():
        spread = f"{timing['p20'] * 1e3:.1f} to {timing['p80'] * 1e3:.1f}"
        speedups = ", ".join(f"{speedup:.2f}x {plain}" for plain, speedup in entry["speedup"][name].items())
        print(f"  {name:20} {timing['median'] * 1e3:9.1f} ms ({spread})   {speedups}")


if __name__ == "__main__":
    main()
