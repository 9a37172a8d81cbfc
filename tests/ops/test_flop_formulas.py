"""``FlopCounterMode`` counts for our ops and modules what it counts for the PyTorch that they equal."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import freeze, ops
from fused_resnet.ops import use_backend, use_fusion_level
from tests.convert.twins import FOLDED, TWINS, images, twins
from tests.ops import test_stem
from tests.ops.blocks import BLOCKS, LEVELS, MEMORY, cotangent_of, fused, plain, step, tensors_of

ROUTES = [("auto", None), *(("reference", level) for level in LEVELS), ("auto", 3)]
OPS = torch.ops.fused_resnet


def counts(run: Callable[[], Any]) -> dict[Any, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts().get("Global", {})


def total(run: Callable[[], Any]) -> int:
    return sum(counts(run).values())


@contextlib.contextmanager
def asked(backend: str, level: int | None):
    with use_backend(backend), use_fusion_level(level):
        yield


@pytest.mark.parametrize(("backend", "level"), ROUTES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_trained_as_a_function(name: str, backend: str, level: int | None):
    block = BLOCKS[name]
    tensors = tensors_of(block, torch.float32)
    cotangent = cotangent_of(block, tensors)
    wanted = total(lambda: step(plain(block), tensors, cotangent))
    with asked(backend, level):
        assert total(lambda: step(fused(block), tensors, cotangent)) == wanted > 0


def test_our_own_ops_were_counted():
    block = BLOCKS["basic"]
    tensors = tensors_of(block, torch.float32)
    with asked("reference", 3):
        found = counts(lambda: step(fused(block), tensors, cotangent_of(block, tensors)))
    assert {OPS.conv_stats, OPS.conv_grad_input, OPS.conv_grad_weight} <= set(found)


def test_a_convolution_that_is_computed_again_counts_again():
    block = BLOCKS["basic"]
    tensors = tensors_of(block, torch.float32)
    cotangent = cotangent_of(block, tensors)
    last = total(lambda: F.conv2d(torch.zeros(3, 4, 5, 7), torch.zeros(4, 4, 3, 3), padding=1))
    default, efficient = (
        total(lambda memory=memory: step(fused(block, memory), tensors, cotangent)) for memory in MEMORY
    )
    assert efficient - default == last


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("backend", "level"), ROUTES)
def test_a_stem_as_a_function(backend: str, level: int | None, training: bool):
    tensors = test_stem.tensors(torch.float32)
    wanted = total(lambda: test_stem.step(test_stem.plain, tensors, training=training))
    with asked(backend, level):
        assert total(lambda: test_stem.step(test_stem.fused, tensors, training=training)) == wanted > 0


@pytest.mark.parametrize("backend", ["auto", "separate", "reference"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_for_inference(groups: int, backend: str):
    x, weight = torch.randn(2, 4, 9, 7), torch.randn(6, 4 // groups, 3, 3)
    vectors = (None, None, torch.randn(6), torch.rand(6))
    settings: dict[str, Any] = {"stride": 2, "padding": 1, "groups": groups}
    with use_backend(backend):
        found = counts(lambda: ops.conv_bn_act(x, weight, *vectors, **settings))
    assert found == {OPS.conv_bn_act: total(lambda: F.conv2d(x, weight, **settings))}


def test_the_stem_of_bytes():
    x, weight = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.randn(64, 3, 7, 7)
    found = total(lambda: OPS.stem(x, weight, None, None, [1.0] * 3, [0.0] * 3))
    assert found == total(lambda: F.conv2d(x.float(), weight, stride=2, padding=3))


def trained(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def inferred(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def by_module(model: nn.Module, run: Callable[[nn.Module, Tensor], None]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run(model, images())
    counts = counter.get_flop_counts().items()
    return {name.partition(".")[2]: sum(found.values()) for name, found in counts}  # without the name of its class


@pytest.mark.parametrize(("training", "run"), [(True, trained), (False, trained), (False, inferred)])
@pytest.mark.parametrize("name", TWINS)
def test_a_model(name: str, training: bool, run: Callable[[nn.Module, Tensor], None]):
    ours, plain = twins(name, training)
    run(ours, images())  # a model that has run knows its routes
    found, wanted = by_module(ours, run), by_module(plain, run)
    assert found[""] == wanted[""] > 0
    if name != "modules":  # whose children have names of ours
        assert found == wanted


@pytest.mark.parametrize("name", FOLDED)
def test_a_frozen_model(name: str):
    ours, plain = twins(name)
    frozen = freeze(ours, images())
    before = frozen(images())
    assert by_module(frozen, inferred)[""] == by_module(plain, inferred)[""] > 0
    assert torch.equal(frozen(images()), before)


def test_the_counter_may_be_imported_before_or_after():
    """And this package does not import it: 0.18 s."""
    for first, second in (("fused_resnet", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "fused_resnet")):
        script = (
            f"import sys, {first}\n"
            f"if {first!r} == 'fused_resnet': assert 'torch.utils.flop_counter' not in sys.modules\n"
            f"import {second}, torch\n"
            "registry = sys.modules['torch.utils.flop_counter'].flop_registry\n"
            "assert torch.ops.fused_resnet.conv_stats in registry, registry\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
