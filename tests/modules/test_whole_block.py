"""Blocks run whole, as one step of autograd: ours and fused torchvision's against torchvision's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet

import fused_resnet
from fused_resnet.convert import fuse
from fused_resnet.modules import BasicBlock, BatchNormAct2d
from fused_resnet.modules.whole_block import why_not_whole
from fused_resnet.ops import use_backend, use_fusion_level
from tests.modules.compare import assert_close, assert_equal, randomize, step
from tests.modules.test_blocks import pair, projection

BLOCKS = ("basic", "basic projection", "bottleneck", "bottleneck projection", "bottleneck groups, dilated")
RUN = [("reference", 3), ("reference", 1), ("auto", 3), ("auto", None)]
MODEL_FLOAT64 = 1e-9
"""Rounding of float64, through a network in which the last normalisations divide by the spread of 4 values each."""


@contextlib.contextmanager
def running(level: int | None, backend: str = "auto") -> Iterator[None]:
    with use_backend(backend), use_fusion_level(level):
        yield


def fused_pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(torchvision's, fused; torchvision's)."""
    twin = pair(name, dtype)[1]
    return fuse(copy.deepcopy(twin)), twin


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


# Whole blocks are torchvision's blocks.


@pytest.mark.parametrize("make", [pair, fused_pair], ids=["ours", "torchvision's"])
@pytest.mark.parametrize("name", BLOCKS)
def test_two_training_steps_and_eval(name, make, whole):
    for memory in ("default", "efficient"):
        block, twin = make(name, torch.float64)
        fuse(block, memory=memory)
        for training in (True, True, False):
            block.train(training), twin.train(training)
            x = images(3, 8, 9, 6)
            with use_fusion_level(3):
                assert_close(step(block, block, x, backend="reference"), step(twin, twin, x))
    assert whole == ["default"] * 3 + ["efficient"] * 3


@pytest.mark.parametrize(("backend", "level"), RUN)
def test_float32_with_what_runs_here(backend, level, whole):
    """One step against float64: at every level, an error like torchvision's."""
    for name in ("basic projection", "bottleneck"):
        block, twin = pair(name)
        x = images(4, 8, 9, 6, dtype=torch.float32)
        exact = copy.deepcopy(twin).double()
        with running(level, backend):
            actual = step(block, block, x)
        expected, truth = step(twin, twin, x), step(exact, exact, x.double())
        for key, true in truth.items():
            errors = [torch.dist(result[key].double(), true.double()) for result in (actual, expected)]
            assert errors[0] <= 2 * errors[1] + 1e-6 * true.double().norm(), key
    assert len(whole) == (0 if level is None else 2)  # with nothing asked for, no block gains here


@pytest.mark.parametrize("memory", ["default", "efficient"])
def test_a_model_of_ours_and_a_fused_one_run_every_block_whole(memory, whole):
    plain = randomize(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)).double()
    ours = fused_resnet.ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4).double()
    ours.load_state_dict(plain.state_dict())
    fused, x = copy.deepcopy(plain), images(4, 3, 32, 32)
    with use_fusion_level(3):
        expected = step(plain, plain, x)
        for model in (ours, fused):
            fuse(model, memory=memory)
            assert_close(step(model, model, x, backend="reference"), expected, MODEL_FLOAT64)
    assert whole == [memory] * 8


def test_in_eval_without_gradients_parts_are_better(whole):
    """There a convolution, its norm and what follows are one kernel; in training without gradients, statistics move."""
    block, twin = pair("basic projection", torch.float64)
    x = images(2, 8, 6, 6)
    with running(3, "reference"), torch.no_grad():
        assert torch.allclose(block(x), twin(x), rtol=0, atol=1e-12)
        assert len(whole) == 1
        assert_close(dict(block.named_buffers()), dict(twin.named_buffers()))
        block.eval(), twin.eval()
        assert torch.allclose(block(x), twin(x), rtol=0, atol=1e-12)
    assert len(whole) == 1


@pytest.mark.parametrize("frozen", [("bn1",), ("bn2", "downsample.1"), ("bn1", "bn2", "downsample.1")])
def test_frozen_norms_in_training(frozen, whole):
    block, twin = pair("basic projection", torch.float64)
    for module in (block, twin):
        for name in frozen:
            module.get_submodule(name).eval().requires_grad_(False)
    x = images(2, 8, 6, 6)
    with use_fusion_level(3):
        assert_close(step(block, block, x, backend="reference"), step(twin, twin, x))
    assert len(whole) == 1


@pytest.mark.parametrize(
    "settings", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.7, "eps": 0.1}]
)
def test_settings_of_norms(settings, whole):
    """``momentum=None`` is the average of all batches so far: the counter is read as it is after this one."""

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **settings)

    block = BasicBlock(8, 12, 2, projection(8, 12, 2, norm), norm_layer=norm).double()
    twin = resnet.BasicBlock(8, 12, 2, projection(8, 12, 2, norm), norm_layer=norm).double()
    twin.load_state_dict(block.state_dict())
    for training in (True, True, False):
        block.train(training), twin.train(training)
        x = images(2, 8, 6, 6)
        with use_fusion_level(3):
            assert_close(step(block, block, x, backend="reference"), step(twin, twin, x))
    assert len(whole) == 3


# What is around the block.


@pytest.mark.parametrize("images_dtype", [torch.float32, torch.bfloat16], ids=["first block", "later block"])
@pytest.mark.parametrize("name", ["basic projection", "bottleneck"])
def test_autocast(name, images_dtype, whole):
    """Every block of a network but its first gets an image that is in autocast's dtype already, beside weights that are
    not. Gradients arrive in float32; errors, as lengths, are like torchvision's."""
    block, twin = pair(name)
    x = images(4, 8, 6, 6, dtype=images_dtype)

    def autocast(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return torch.autocast("cpu", torch.bfloat16)(module.__call__)

    exact = copy.deepcopy(twin).double()
    with running(3, "reference"):
        actual = step(block, autocast(block), x)
    expected, truth = step(twin, autocast(twin), x), step(exact, exact, x.double())
    assert len(whole) == 1
    for key, true in truth.items():
        assert actual[key].dtype == expected[key].dtype, key
        errors = [torch.dist(result[key].double(), true.double()) for result in (actual, expected)]
        assert errors[0] <= 2 * errors[1] + 2**-8 * true.double().norm(), key


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["basic projection", "bottleneck"])
def test_checkpointing_moves_the_statistics_once(name, use_reentrant, whole):
    block, _ = pair(name, torch.float64)
    twin, x = copy.deepcopy(block), images(2, 8, 6, 6)
    with use_fusion_level(3):
        for _ in range(2):
            actual = step(block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant), x, backend="reference")
            assert_equal(actual, step(twin, twin, x, backend="reference"))
    assert len(whole) == 6  # the block's forward ran twice a step


def test_distributed_data_parallel(tmp_path, whole):
    block, twin = pair("bottleneck projection", torch.float64)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(block)
        x = images(2, 8, 6, 6)
        with use_fusion_level(3):
            for _ in range(2):
                assert_close(step(block, parallel, x, backend="reference"), step(twin, twin, x))
    finally:
        dist.destroy_process_group()
    assert len(whole) == 2


def test_one_block_used_twice(whole):
    block, twin = pair("basic", torch.float64)
    x = images(2, 8, 6, 6)
    with use_fusion_level(3):
        actual = step(block, lambda x: block(block(x)), x, backend="reference")
        assert_close(actual, step(twin, lambda x: twin(twin(x)), x))
    assert len(whole) == 2


def test_compiled_blocks_are_not_whole(whole):
    """The compiler's own partitioner decides there what is kept."""
    block, _ = pair("bottleneck projection")
    twin, x = copy.deepcopy(block), images(2, 8, 6, 6, dtype=torch.float32)
    torch._dynamo.reset()
    with use_fusion_level(3):
        compiled = torch.compile(fuse(block, memory="efficient"), fullgraph=True, backend="aot_eager")
        actual = step(block, compiled, x)
    assert whole == []
    assert_close(actual, step(twin, twin, x))


def test_the_meta_device():
    """Shapes without numbers, as torch's own modules give them, also in training."""
    block = BasicBlock(8, 12, 2, projection(8, 12, 2)).to("meta")
    for level in (None, 3):
        with use_fusion_level(level):
            assert block(torch.empty(2, 8, 6, 6, device="meta")).shape == (2, 12, 3, 3)


# Where a part is not plain, the parts run, and the reason is given.


def hooked(name: str) -> Callable[[nn.Module], None]:
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *_: None) and None


def replaced(name: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        torch.manual_seed(1)
        setattr(block, name, make().double())

    return change


def own_forward(block: nn.Module) -> None:
    block.conv2.forward = lambda x: nn.Conv2d.forward(block.conv2, x) * 2


def pruned(block: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(block.conv1)


# (what is changed in both blocks, the start of the reason)
NOT_WHOLE = {
    "hook on conv1": (hooked("conv1"), "the convolution has hooks"),
    "hook on bn2": (hooked("bn2"), "the norm has hooks"),
    "hook on relu": (hooked("relu"), "the activation has hooks"),
    "hook on downsample": (hooked("downsample"), "downsample has hooks"),
    "hook on downsample's convolution": (hooked("downsample.0"), "the convolution has hooks"),
    "hook on downsample's norm": (hooked("downsample.1"), "the norm has hooks"),
    "GroupNorm": (replaced("bn1", lambda: nn.GroupNorm(4, 12)), "the norm is torch.nn.modules.normalization.GroupNorm"),
    "another activation": (replaced("relu", nn.SiLU), "the activation is torch.nn.modules.activation.SiLU"),
    "a bias": (replaced("conv2", lambda: nn.Conv2d(12, 12, 3, padding=1)), "the convolution has a bias"),
    "a kind of padding": (
        replaced("conv2", lambda: nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect", bias=False)),
        "the convolution has a bias, or padding other than",
    ),
    "padding by name": (
        replaced("conv2", lambda: nn.Conv2d(12, 12, 3, padding="same", bias=False)),
        "the convolution has a bias, or padding other than",
    ),
    "a parametrization": (pruned, "the convolution is torch.nn.utils.parametrize.ParametrizedConv2d"),
    "a forward of its own": (own_forward, "the convolution has hooks, or a forward of its own"),
    "a pooled downsample": (
        replaced("downsample", lambda: nn.Sequential(nn.AvgPool2d(2), *projection(8, 12, 1))),
        "downsample is not a convolution and a norm",
    ),
    "a downsample without a norm": (
        replaced("downsample", lambda: nn.Conv2d(8, 12, 1, 2)),
        "downsample is not a convolution and a norm",
    ),
}


@pytest.mark.parametrize(("change", "reason"), NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_why_not_whole(change, reason, whole):
    block, twin = pair("basic projection", torch.float64)
    fuse(block, memory="efficient")
    assert why_not_whole(block) == []
    change(block), change(twin)
    reasons = why_not_whole(block)
    assert len(reasons) == 1
    assert reasons[0].startswith(reason)
    x = images(2, 8, 6, 6)
    for training in (True, True, False):
        block.train(training), twin.train(training)
        with use_fusion_level(3):
            # Gradients that are 0 but for rounding (a bias in front of a norm, a length of weights) have no scale.
            assert_close(step(block, block, x, backend="reference"), step(twin, twin, x), 1e-11)
    assert whole == []


def test_every_reason_is_given_once():
    block = BasicBlock(8, 12, 2, projection(8, 12, 2))
    for name in ("conv1", "conv2", "bn1", "downsample.0"):
        hooked(name)(block)
    assert [reason.split(",")[0] for reason in why_not_whole(block)] == [
        "the convolution has hooks",
        "the norm has hooks",
    ]
    block.bn2 = BatchNormAct2d(12)
    assert "a BatchNormAct2d that applies an activation itself" in why_not_whole(block)[2]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "a hook is registered on all modules" in why_not_whole(BasicBlock(8, 8))
    finally:
        handle.remove()


@pytest.mark.parametrize("memory", ["default", "efficient"])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 5, 6, 6),
        torch.randn(2, 8, 6, 6, dtype=torch.float64),
        torch.randn(2, 8, 6, 6).to(torch.bfloat16),
        torch.ones(2, 8, 6, 6, dtype=torch.int64),
        torch.randn(8, 6),
    ],
    ids=["channels", "float64", "bfloat16", "integers", "two dimensions"],
)
def test_a_wrong_image_gets_torchs_own_error(x, memory, whole):
    block, twin = pair("basic projection")
    fuse(block, memory=memory)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(Exception) as theirs:
        twin(x)
    with running(3, "reference"), pytest.raises(type(theirs.value)) as ours:
        block(x)
    assert str(ours.value) == str(theirs.value)
    assert_equal(block.state_dict(), before)
    assert whole == []


def test_one_value_per_channel_gets_torchs_own_error(whole):
    block, twin = pair("basic projection")
    x = torch.randn(1, 8, 2, 2)
    with pytest.raises(ValueError, match="Expected more than 1 value") as theirs:
        twin(x)
    with running(3, "reference"), pytest.raises(ValueError, match="Expected more than 1 value") as ours:
        block(x)
    assert str(theirs.value) in str(ours.value)
    assert not whole


def test_parameters_that_somebody_made_plain_attributes(whole):
    """As FullyShardedDataParallel does, which shards one flat parameter and leaves views of it."""
    block, twin = pair("basic projection", torch.float64)
    for module in block.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                setattr(module, name, parameter.detach().clone().requires_grad_())
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    with running(3, "reference"):
        out, expected = block(x), twin(x)
        out.sum().backward()
    expected.sum().backward()
    assert whole == ["default"]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(block.conv1.weight.grad, twin.conv1.weight.grad)
    torch.testing.assert_close(block.bn2.bias.grad, twin.bn2.bias.grad)
