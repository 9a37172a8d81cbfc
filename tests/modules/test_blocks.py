"""``BasicBlock`` and ``Bottleneck`` against the real torchvision's, and inside what people wrap around them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet.modules import BasicBlock, Bottleneck
from tests.modules.compare import LANES, assert_close, assert_equal, randomize, step


def projection(inplanes: int, planes: int, stride: int, norm_layer=nn.BatchNorm2d) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm_layer(planes))


def pooled_projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))


class PaddedShortcut(nn.Module):
    def forward(self, x):
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))


# (our class, torchvision's, arguments); every input has 8 channels.
BLOCKS = {
    "basic": (BasicBlock, resnet.BasicBlock, lambda: (8, 8)),
    "basic projection": (BasicBlock, resnet.BasicBlock, lambda: (8, 12, 2, projection(8, 12, 2))),
    "basic, a shortcut without a norm": (BasicBlock, resnet.BasicBlock, lambda: (8, 16, 2, PaddedShortcut())),
    "basic GroupNorm": (
        BasicBlock,
        resnet.BasicBlock,
        lambda: (8, 8, 1, None, 1, 64, 1, lambda channels: nn.GroupNorm(4, channels)),
    ),
    "bottleneck": (Bottleneck, resnet.Bottleneck, lambda: (8, 2)),
    "bottleneck projection": (Bottleneck, resnet.Bottleneck, lambda: (8, 3, 2, projection(8, 12, 2))),
    "bottleneck pooled projection": (Bottleneck, resnet.Bottleneck, lambda: (8, 3, 2, pooled_projection(8, 12, 2))),
    "bottleneck groups, dilated": (Bottleneck, resnet.Bottleneck, lambda: (8, 2, 1, None, 2, 96, 2)),
}


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's) with the same weights."""
    ours, theirs, arguments = BLOCKS[name]
    block = randomize(ours(*arguments())).to(dtype)
    twin = theirs(*arguments()).to(dtype)
    twin.load_state_dict(block.state_dict())
    return block, twin


@LANES
@pytest.mark.parametrize("name", BLOCKS)
def test_two_training_steps_and_eval(name, dtype, backend):
    block, twin = pair(name, dtype)
    for training in (True, True, False):
        block.train(training), twin.train(training)
        x = torch.randn(3, 8, 10, 6, dtype=dtype)
        assert_close(step(block, block, x, backend=backend), step(twin, twin, x))


@pytest.mark.parametrize("name", BLOCKS)
def test_same_children_attributes_and_initial_weights(name):
    ours, theirs, arguments = BLOCKS[name]
    torch.manual_seed(3)
    block = ours(*arguments())
    torch.manual_seed(3)
    twin = theirs(*arguments())
    assert repr(block) == repr(twin)
    assert list(block.state_dict()) == list(twin.state_dict())
    for key, tensor in twin.state_dict().items():
        assert torch.equal(block.state_dict()[key], tensor)
    assert (block.expansion, block.stride) == (twin.expansion, twin.stride)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"groups": 2}, ValueError, "groups=1 and base_width=64 only; got groups=2, base_width=64"),
        ({"base_width": 128}, ValueError, "got groups=1, base_width=128"),
        ({"dilation": 2}, NotImplementedError, "dilation=1 only; got 2"),
    ],
)
def test_basic_block_refuses_what_torchvision_refuses(arguments, error, words):
    with pytest.raises(error):
        resnet.BasicBlock(8, 8, **arguments)
    with pytest.raises(error, match=words):
        BasicBlock(8, 8, **arguments)


@pytest.mark.parametrize("name", ["basic projection", "bottleneck projection"])
@pytest.mark.parametrize("place", ["bn1", "bn2", "relu", "downsample", "downsample.0", "downsample.1"])
def test_hooks_on_inner_modules_fire_and_change_nothing(name, place):
    block, twin = pair(name, torch.float64)
    seen, expected = [], []
    block.get_submodule(place).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    twin.get_submodule(place).register_forward_hook(lambda module, inputs, output: expected.append(output.shape))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert_close(step(block, block, x), step(twin, twin, x))
    assert seen == expected != []


@pytest.mark.parametrize("norm_layer", [FrozenBatchNorm2d, nn.InstanceNorm2d, lambda channels: nn.Identity()])
def test_other_norm_layers_equal_torchvision_bit_for_bit(norm_layer):
    arguments = (8, 12, 2, projection(8, 12, 2, norm_layer))
    block = BasicBlock(*arguments, norm_layer=norm_layer)
    twin = resnet.BasicBlock(*copy.deepcopy(arguments), norm_layer=norm_layer)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 6, 6)
    assert_equal(step(block, block, x), step(twin, twin, x))


@pytest.mark.parametrize("frozen", ["bn1", "bn2", "downsample.1"])
def test_frozen_statistics_inside_training(frozen):
    block, twin = pair("basic projection", torch.float64)
    for module in (block, twin):
        module.get_submodule(frozen).eval().requires_grad_(False)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert_close(step(block, block, x), step(twin, twin, x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format):
    block = pair("bottleneck")[0].to(memory_format=memory_format)
    x = torch.randn(2, 8, 6, 5).to(memory_format=memory_format)
    assert block(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", ["basic projection", "bottleneck"])
def test_autocast(name):
    """bfloat16 has 8 bits, so every intermediate is rounded by up to 2^-9; at most 8 roundings add up here."""
    block, twin = pair(name)
    x = torch.randn(4, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, expected = block(x), twin(x)
    assert actual.dtype == expected.dtype
    exact = copy.deepcopy(twin).double()(x.double())
    scale = exact.abs().max()
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max() + 2**-8 * scale


@pytest.mark.parametrize("name", ["basic projection", "bottleneck", "basic, a shortcut without a norm"])
def test_compiles_without_a_graph_break(name):
    block, _ = pair(name)
    twin = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        block.train(training), twin.train(training)
        x = torch.randn(2, 8, 6, 6)
        assert_close(step(block, compiled, x), step(twin, twin, x))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["basic projection", "bottleneck"])
def test_checkpointing_is_the_same_step(name, use_reentrant):
    block, _ = pair(name)
    twin, x = copy.deepcopy(block), torch.randn(2, 8, 6, 6)
    for _ in range(2):
        actual = step(block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant), x)
        assert_equal(actual, step(twin, twin, x))


def test_distributed_data_parallel(tmp_path):
    block, twin = pair("bottleneck projection", torch.float64)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(block)
        x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
        assert_close(step(block, parallel, x), step(twin, twin, x))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["basic projection", "bottleneck"])
def test_copies_and_pickles(name):
    block = pair(name)[0].eval()
    x = torch.randn(2, 8, 6, 6)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
