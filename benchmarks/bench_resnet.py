"""ResNet-50 as plain PyTorch, fused and frozen, with pytest-benchmark.

    python -m pytest benchmarks/bench_resnet.py [-k training] [--benchmark-json=FILE]

pytest-benchmark runs one contender after the other. For numbers to quote, measured in turns, see cpu_speed.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fused_resnet.bench.contenders import (
    FROZEN,
    FUSED,
    PLAIN_FORMATS,
    build,
    inference_contenders,
    plain_twin,
    settle_statistics,
    training_contenders,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
AUTOCAST_DTYPE = torch.bfloat16 if ON_GPU else None
MODEL, SIZE = "resnet50", 224
INFERENCE_BATCHES = (1, 256) if ON_GPU else (1, 8)
TRAINING_BATCH = 256 if ON_GPU else 16
ROUNDS = 30 if ON_GPU else 5


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = build(MODEL).to(DEVICE)
    settle_statistics(model, torch.randn(8, 3, SIZE, SIZE, device=DEVICE))
    return model, plain_twin(model, MODEL)[0]


@pytest.mark.parametrize("batch_size", INFERENCE_BATCHES)
@pytest.mark.parametrize("contender", [*PLAIN_FORMATS, FUSED, FROZEN])
def test_inference(benchmark, twins: tuple[nn.Module, nn.Module], contender: str, batch_size: int) -> None:
    images = torch.randn(batch_size, 3, SIZE, SIZE, device=DEVICE)
    measure(benchmark, inference_contenders(*twins, images, AUTOCAST_DTYPE)[contender], batch_size)


@pytest.mark.parametrize("contender", [*PLAIN_FORMATS, FUSED])
def test_training(benchmark, twins: tuple[nn.Module, nn.Module], contender: str) -> None:
    images = torch.randn(TRAINING_BATCH, 3, SIZE, SIZE, device=DEVICE)
    labels = torch.randint(1000, (TRAINING_BATCH,), device=DEVICE)
    measure(benchmark, training_contenders(*twins, images, labels, AUTOCAST_DTYPE)[contender], TRAINING_BATCH)


def measure(benchmark, run, batch_size: int) -> None:
    def run_to_the_end() -> Tensor:
        result = run()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{benchmark.name.split('[')[0].removeprefix('test_')} {MODEL}, batch {batch_size}"
    benchmark.pedantic(run_to_the_end, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["images_per_second"] = batch_size / benchmark.stats.stats.median
