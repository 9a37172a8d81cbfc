"""The tiles that the cost model chooses, for every convolution of the ten ResNets on every chip named: never absurd."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fused_resnet import models
from fused_resnet.kernels import conv_grad_input, conv_grad_weight, conv_stats
from fused_resnet.kernels.conv_shape import ConvShape
from fused_resnet.kernels.device import CHIPS, Chip
from fused_resnet.kernels.training_tiles import CANDIDATES, Product, Tiles, cycles, occupancy, training_tiles

BUILDERS = [name for name in models.__all__ if name.startswith(("resne", "wide_resne"))]
BATCHES = (1, 32, 256)
NAMED = {kind: CHIPS[kind] for kind in ((8, 0), (8, 9), (9, 0))}
PRODUCTS = {
    "forward": conv_stats.__globals__["forward_product"],
    "grad_input": conv_grad_input.__globals__["grad_input_product"],
    "grad_weight": conv_grad_weight.__globals__["grad_weight_product"],
}

Convolution = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@functools.cache
def convolutions(builder: str) -> frozenset[Convolution]:
    """(input, weight, stride, padding, dilation) of every convolution without groups, for one image of 224x224."""
    found: set[Convolution] = set()

    def note(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if conv.groups == 1:
            shapes = tuple(inputs[0].shape), tuple(conv.weight.shape)
            found.add((*shapes, conv.stride, conv.padding, conv.dilation))  # type: ignore[arg-type]

    with torch.device("meta"):
        model = getattr(models, builder)().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return frozenset(found)


def products(convolution: Convolution, batch: int, chip: Chip, element_bytes: int = 2) -> dict[str, Product]:
    (_, *image), weight, stride, padding, dilation = convolution
    x, conv_weight = torch.empty((batch, *image), device="meta"), torch.empty(weight, device="meta")
    shape = ConvShape.of(x, conv_weight, list(stride), list(padding), list(dilation))
    return {
        "forward": PRODUCTS["forward"](shape, element_bytes),
        "grad_input": PRODUCTS["grad_input"](shape, element_bytes, list(stride), 2, 2),
        "grad_weight": PRODUCTS["grad_weight"](shape, element_bytes, 2, chip),
    }


def programs(product: Product, tiles: Tiles) -> int:
    width = product.columns // int(product.taps) if product.splittable and not tiles.flat else product.columns
    blocks = -(-product.rows // tiles.rows) * (product.columns // width) * -(-width // tiles.columns) * product.phases
    return -(-blocks // tiles.row_tiles) * tiles.splits


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: f"sm_{kind[0]}{kind[1]}")
@pytest.mark.parametrize("builder", BUILDERS)
def test_every_convolution_of_the_ten_models(builder: str, kind: tuple[int, int]) -> None:
    chip = NAMED[kind]
    assert len(convolutions(builder)) >= 10
    for convolution in convolutions(builder):
        for batch in BATCHES:
            for name, product in products(convolution, batch, chip).items():
                assert_sensible(product, training_tiles(product, 2, chip), chip, f"{name} of {convolution} x {batch}")


def assert_sensible(product: Product, tiles: Tiles, chip: Chip, what: str) -> None:
    width = product.columns // int(product.taps) if product.splittable and not tiles.flat else product.columns
    assert tiles.rows <= max(16, 2 * product.rows) and tiles.columns <= max(16, 2 * width), f"{what}: larger than it"
    assert programs(product, tiles) >= chip.multiprocessors / 2, f"{what}: half of the chip idle ({tiles})"
    operands = product.row_operands * tiles.rows + product.column_operands * tiles.columns
    assert operands * tiles.depth * tiles.stages * 2 <= chip.shared_bytes, f"{what}: too much shared memory"
    if tiles.row_tiles > 1:
        assert programs(product, tiles) >= 2 * chip.multiprocessors, f"{what}: chunks that leave a tail"
    if tiles.splits > 1:
        partial = 4 * tiles.splits * product.rows * product.columns
        operands = 2 * product.channels * (product.rows * product.row_operands + product.columns / product.taps)
        assert partial <= 2 * operands, f"{what}: more partial results than operands"


def test_large_tiles_where_there_is_enough_to_do() -> None:
    chip = CHIPS[9, 0]
    deep = ((1, 128, 28, 28), (128, 128, 3, 3), (1, 1), (1, 1), (1, 1))
    tiles = training_tiles(products(deep, 256, chip)["forward"], 2, chip)
    assert (tiles.rows, tiles.columns) == (128, 128)
    one_image = training_tiles(products(deep, 1, chip)["forward"], 2, chip)
    assert one_image.rows * one_image.columns < 128 * 128
    assert training_tiles(products(deep, 256, chip)["grad_weight"], 2, chip).splits > 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 2**31),
    columns=st.integers(1, 4096),
    depth=st.integers(1, 4096),
    taps=st.sampled_from([1, 9, 49]),
    row_operands=st.integers(1, 2),
    element_bytes=st.sampled_from([2, 4]),
    kind=st.sampled_from(sorted(CHIPS)),
    aligned=st.booleans(),
    sums=st.sampled_from([32, 64]),
)
def test_any_product_has_the_cheapest_of_tiles_that_fit(
    rows, columns, depth, taps, row_operands, element_bytes, kind, aligned, sums
) -> None:
    chip = CHIPS[kind]
    product = Product(rows, columns, taps, depth, row_operands, flat=True, aligned=aligned, sums=sums)
    tiles = training_tiles(product, element_bytes, chip)
    assert min(tiles.rows, tiles.columns, tiles.depth) >= 16  # what a matrix instruction takes
    shared = (row_operands * tiles.rows + tiles.columns) * tiles.depth * tiles.stages * element_bytes
    assert shared <= chip.shared_bytes and occupancy(product, tiles, element_bytes, chip) >= 1
    assert tiles.rows * tiles.columns / (32 * tiles.warps) <= sums
    cost = cycles(product, replace(tiles, row_tiles=1), element_bytes, chip)
    for block_rows, block_columns, warps in CANDIDATES:
        other = replace(tiles, rows=block_rows, columns=block_columns, warps=warps, row_tiles=1)
        smaller = block_rows <= tiles.rows and block_columns <= tiles.columns
        if smaller and block_rows * block_columns <= 32 * warps * sums:
            assert (
                cost <= cycles(product, other, element_bytes, chip) or programs(product, other) < chip.multiprocessors
            )


def test_refuses_an_empty_product() -> None:
    with pytest.raises(ValueError, match="rows and columns"):
        training_tiles(Product(0, 16, 1, 16), 2, CHIPS[9, 0])
