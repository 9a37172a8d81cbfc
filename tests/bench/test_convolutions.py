"""The shapes that benchmarks and tile tests run over, and the roofline they are held against."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.bench.roofline import Ceilings, measure_ceilings
from fused_resnet.bench.sites import convolutions


@pytest.mark.parametrize(("name", "count", "gigaflop"), [("resnet18", 20, 3.63), ("resnet50", 53, 8.17)])
def test_all_of_them_and_their_operations(name: str, count: int, gigaflop: float):
    """The operations are those that the papers and torchvision give for one image (multiply and add are two)."""
    found = convolutions(name)
    assert found.total() == count
    assert sum(often * conv.flop(1) for conv, often in found.items()) / 1e9 == pytest.approx(gigaflop, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_shapes_are_those_of_conv2d(name: str):
    for conv in convolutions(name, 64):
        x, weight = torch.empty(conv.input_shape(2), device="meta"), torch.empty(conv.weight_shape, device="meta")
        assert F.conv2d(x, weight, None, *conv.settings).shape == conv.output_shape(2)


def test_names_tell_shapes_apart():
    for name in ("resnet50", "resnext50_32x4d"):
        found = convolutions(name)
        assert len({str(conv) for conv in found}) == len(found)
    assert "256x56x56 3x3/2 to 256 in 32 groups" in {str(conv) for conv in convolutions("resnext50_32x4d")}


def test_fraction_of_the_roofline():
    ceilings = Ceilings(bytes_per_second=100.0, flop_per_second=1000.0)
    assert ceilings.fraction(4.0, moved=200, flop=1000) == 0.5  # 2 s of bytes, 1 s of operations
    assert ceilings.fraction(4.0, moved=100, flop=4000) == 1.0


def test_ceilings_are_measured():
    found = measure_ceilings("cpu", torch.float32)
    assert 1e8 < found.bytes_per_second < 1e13 and 1e8 < found.flop_per_second < 1e15
