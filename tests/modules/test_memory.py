"""Blocks that keep less for backward: ``fuse(model, memory="efficient")``, and what becomes of it in copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import resnet

from fused_resnet.bench.ledger import saved_bytes
from fused_resnet.convert import fuse, unfuse
from fused_resnet.modules import Bottleneck
from fused_resnet.modules.plain import UNFUSED
from fused_resnet.modules.whole_block import MEMORY
from fused_resnet.ops import use_fusion_level
from tests.modules.compare import assert_close, assert_equal, randomize, step
from tests.modules.test_blocks import projection
from tests.modules.test_whole_block import images


def stack(owner: str) -> nn.Module:
    """Three blocks, of ours or of torchvision's, with the same weights."""
    block = {"ours": Bottleneck, "torchvision's": resnet.Bottleneck}[owner]
    torch.manual_seed(2)
    return randomize(nn.Sequential(block(8, 2), block(8, 3, 2, projection(8, 12, 2)), block(12, 3)))


BLOCKS_IN_STACK = 3
owners = pytest.mark.parametrize("owner", ["ours", "torchvision's"])


def bytes_of_training(model: nn.Module) -> int:
    """What a step keeps for backward; the statistics move."""
    x = images(2, 8, 12, 12, dtype=torch.float32)
    return saved_bytes(model, lambda: model(x).sum())


@owners
def test_efficient_memory_keeps_less_and_computes_the_same(owner, whole):
    """Where no level is asked for, as users have it. By hand, in float32: for a block x and, of each convolution but
    the last, the output; for the last the result (the next block's x); two vectors for each norm."""
    model, plain = stack(owner), stack("torchvision's")
    with use_fusion_level(None):
        plain_bytes = bytes_of_training(copy.deepcopy(plain))
        fused_bytes = bytes_of_training(fuse(copy.deepcopy(model)))
        assert whole == []
        assert fuse(model, memory="efficient") is model
        efficient_bytes = bytes_of_training(copy.deepcopy(model))
        assert whole == ["efficient"] * BLOCKS_IN_STACK
        large, small = 2 * 12 * 12, 2 * 6 * 6
        first = large * (8 + 2 + 2 + 8)
        second = large * 3 + small * (3 + 12 + 12)  # the projection's output is kept
        third = small * (3 + 3 + 12)
        vectors = 2 * (2 + 2 + 8 + 3 + 3 + 12 + 12 + 3 + 3 + 12)
        assert efficient_bytes == 4 * (first + second + third + vectors)
        assert efficient_bytes < 0.65 * fused_bytes <= 0.65 * plain_bytes
        model.double(), plain.double()
        x = images(3, 8, 9, 6)
        for backend in ("reference", "auto"):
            assert_close(step(model, model, x, backend=backend), step(plain, plain, x), 1e-11)


@owners
def test_unfuse_restores_bit_for_bit(owner):
    model, plain = stack(owner), stack("torchvision's")
    before = [(module, type(module), set(module.__dict__)) for module in model.modules()]
    unfuse(fuse(model, memory="efficient"))
    for module, kind, attributes in before:
        assert type(module) is kind
        assert set(module.__dict__) - attributes <= {UNFUSED}
    x = images(3, 8, 9, 6, dtype=torch.float32)
    for training in (True, True, False):
        model.train(training), plain.train(training)
        with use_fusion_level(3):
            assert_equal(step(model, model, x), step(plain, plain, x))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded])
@owners
def test_copies_stay_efficient(owner, copied, whole):
    model = fuse(stack(owner), memory="efficient")
    twin = copied(model)
    assert bytes_of_training(twin) == bytes_of_training(model)
    assert whole == ["efficient"] * 2 * BLOCKS_IN_STACK
    unfuse(twin)
    bytes_of_training(twin), bytes_of_training(model)
    assert whole == ["efficient"] * 3 * BLOCKS_IN_STACK


@owners
def test_the_last_fuse_decides(owner, whole):
    """Of the whole model, or of a part of it: memory where it is short, speed elsewhere."""
    model = fuse(stack(owner), memory="efficient")
    fuse(model[0])
    assert [MEMORY in block.__dict__ for block in model] == [False, True, True]
    bytes_of_training(model)
    assert whole == ["efficient"] * 2
    with pytest.raises(ValueError, match=r"^memory must be 'default' or 'efficient'; got 'small'"):
        fuse(model, memory="small")
    assert [MEMORY in block.__dict__ for block in model] == [False, True, True]
    fuse(model)
    bytes_of_training(model)
    assert whole == ["efficient"] * 2
    assert not any(MEMORY in module.__dict__ for module in model.modules())
