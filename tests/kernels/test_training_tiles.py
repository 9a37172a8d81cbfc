"""The tiles that the cost model chooses, for every convolution of the ten ResNets on every chip named: never absurd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_resnet.bench.sites import Convolution, convolutions
from fused_resnet.bench.suite.subjects import builder_names
from fused_resnet.kernels.conv_grad_input import grad_input_product
from fused_resnet.kernels.conv_grad_weight import grad_weight_product
from fused_resnet.kernels.conv_shape import ConvShape
from fused_resnet.kernels.conv_stats import forward_product
from fused_resnet.kernels.device import CHIPS, Chip
from fused_resnet.kernels.training_tiles import CANDIDATES, Product, Tiles, cycles, occupancy, training_tiles

BATCHES = (1, 32, 256)
NAMED = {kind: CHIPS[kind] for kind in ((8, 0), (8, 9), (9, 0))}


def products(conv: Convolution, batch: int, chip: Chip, element_bytes: int = 2) -> dict[str, Product]:
    x, weight = (torch.empty(shape, device="meta") for shape in (conv.input_shape(batch), conv.weight_shape))
    settings = conv.settings
    shape = ConvShape.of(x, weight, settings)
    return {
        "forward": forward_product(shape, element_bytes),
        "grad_input": grad_input_product(shape, element_bytes, settings.stride, operands=2, epilogue=2),
        "grad_weight": grad_weight_product(shape, element_bytes, operands=2, chip=chip),
    }


def programs(product: Product, tiles: Tiles) -> int:
    width = product.columns // int(product.taps) if product.splittable and not tiles.flat else product.columns
    blocks = -(-product.rows // tiles.rows) * (product.columns // width) * -(-width // tiles.columns) * product.phases
    return -(-blocks // tiles.row_tiles) * tiles.splits


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: f"sm_{kind[0]}{kind[1]}")
@pytest.mark.parametrize("builder", builder_names())
def test_every_convolution_of_the_ten_models(builder: str, kind: tuple[int, int]) -> None:
    chip = NAMED[kind]
    found = [conv for conv in convolutions(builder) if conv.groups == 1]
    assert len(found) >= 10
    for conv in found:
        for batch in BATCHES:
            for name, product in products(conv, batch, chip).items():
                assert_sensible(product, training_tiles(product, 2, chip), chip, f"{name} of {conv} x {batch}")


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
    (deep,) = (conv for conv in convolutions("resnet50") if str(conv) == "128x28x28 3x3 to 128")
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
