"""ResNet's constructor arguments, errors, and the ways a model is copied and stored."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fused_resnet import models
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bottleneck import Bottleneck

TINY = (1, 1, 1, 1)
THEIR_BLOCKS = {BasicBlock: torchvision.models.resnet.BasicBlock, Bottleneck: torchvision.models.resnet.Bottleneck}


class FrozenNorm(nn.Module):
    """A norm that is not batch normalisation: constant statistics, all four vectors are buffers."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 1.5, num_features))
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, num_features))
        self.register_buffer("running_mean", torch.linspace(-1, 1, num_features))
        self.register_buffer("running_var", torch.linspace(1, 2, num_features))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


ARGUMENTS = {
    "zero_init_residual, BasicBlock": (BasicBlock, {"zero_init_residual": True}),
    "zero_init_residual, Bottleneck": (Bottleneck, {"zero_init_residual": True}),
    "groups and width": (Bottleneck, {"groups": 4, "width_per_group": 8}),
    "dilate the last stage": (Bottleneck, {"replace_stride_with_dilation": (False, False, True)}),
    "dilate the last two stages": (Bottleneck, {"replace_stride_with_dilation": [False, True, True]}),
    "dilate all but stage 3": (Bottleneck, {"replace_stride_with_dilation": [True, False, True]}),
    "GroupNorm": (BasicBlock, {"norm_layer": lambda channels: nn.GroupNorm(8, channels), "zero_init_residual": True}),
    "InstanceNorm": (BasicBlock, {"norm_layer": nn.InstanceNorm2d, "zero_init_residual": True}),
    "frozen norm": (Bottleneck, {"norm_layer": FrozenNorm, "zero_init_residual": True}),
    "other eps and momentum": (Bottleneck, {"norm_layer": functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)}),
    "cumulative average": (BasicBlock, {"norm_layer": functools.partial(nn.BatchNorm2d, momentum=None)}),
    "no running statistics": (BasicBlock, {"norm_layer": functools.partial(nn.BatchNorm2d, track_running_stats=False)}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_mean_what_they_mean_in_torchvision(case):
    """Two blocks in stage 4, so that both of a stage's dilations occur; one step, then eval, in float64."""
    block, kwargs = ARGUMENTS[case]
    torch.manual_seed(1)
    ours = models.ResNet(block, (1, 1, 1, 2), num_classes=7, **kwargs)
    torch.manual_seed(1)
    theirs = torchvision.models.ResNet(THEIR_BLOCKS[block], [1, 1, 1, 2], num_classes=7, **kwargs)
    assert_same_state(ours, theirs)
    for attribute in ("inplanes", "dilation", "groups", "base_width"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)

    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for model in (ours.double(), theirs.double()):
        loss = F.cross_entropy(model(images), torch.tensor([3, 6]))
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            results.append((loss.detach(), gradients, dict(model.named_buffers()), model.eval()(images)))
    # The last stage normalises over 8 values in float64; the values here are of order 1 to 1000.
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_norms_without_weights_build_where_torchvision_fails():
    norm_layer = functools.partial(nn.BatchNorm2d, affine=False)
    model = models.ResNet(BasicBlock, TINY, num_classes=3, norm_layer=norm_layer, zero_init_residual=True)
    output = model(torch.randn(2, 3, 64, 64))
    output.sum().backward()
    assert not [name for name, _ in model.named_parameters() if "bn" in name]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_zero_init_residual_starts_the_network_as_its_shortcuts():
    torch.manual_seed(1)
    model = models.resnet18(num_classes=5, zero_init_residual=True).eval()
    images = torch.randn(2, 3, 64, 64)
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            x = model.relu(x if block.downsample is None else block.downsample(x))
    torch.testing.assert_close(model(images), model.fc(model.avgpool(x).flatten(1)))


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (ValueError, "replace_stride_with_dilation.*3", lambda lib: {"replace_stride_with_dilation": [True, False]}),
        (ValueError, "groups", lambda lib: {"groups": 2}),
        (ValueError, "base_width", lambda lib: {"width_per_group": 128}),
        (NotImplementedError, "[Dd]ilation", lambda lib: {"replace_stride_with_dilation": [True, True, False]}),
    ],
)
def test_errors_of_torchvision(error, message, build):
    with pytest.raises(error):
        torchvision.models.resnet18(**build(torchvision))
    with pytest.raises(error, match=message):
        models.resnet18(**build(models))


@pytest.mark.parametrize("layers", [(2, 2, 2), (2, 2, 2, 2, 2)])
def test_layers_must_be_four(layers):
    with pytest.raises(ValueError, match="layers must give the number of blocks of 4 stages"):
        models.ResNet(BasicBlock, layers)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnext50_32x4d", {"groups": 16}, "groups must be 32"),
        ("resnext101_64x4d", {"width_per_group": 8}, "width_per_group must be 4"),
        ("wide_resnet50_2", {"width_per_group": 64}, "width_per_group must be 128"),
    ],
)
def test_arguments_that_make_the_architecture_are_fixed(name, kwargs, message):
    with pytest.raises(ValueError):
        getattr(torchvision.models, name)(**kwargs)
    with pytest.raises(ValueError, match=message):
        getattr(models, name)(**kwargs)


def test_builders_take_only_known_names():
    with pytest.raises(TypeError, match="unheard_of"):
        models.resnet18(unheard_of=True)


def test_state_dict_goes_into_torchvision_and_back():
    torch.manual_seed(1)
    ours = models.resnet50(num_classes=4)
    randomize_statistics(ours)
    theirs = torchvision.models.resnet50(num_classes=4)
    back = models.resnet50(num_classes=4)
    theirs.load_state_dict(ours.state_dict())
    back.load_state_dict(theirs.state_dict())
    assert_same_state(back, ours)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    outputs = [model.double().eval()(images) for model in (ours, theirs, back)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=0, atol=0)


def test_deepcopy_and_pickle_give_independent_equal_models():
    torch.manual_seed(1)
    model = models.ResNet(Bottleneck, TINY, num_classes=3, norm_layer=lambda channels: nn.BatchNorm2d(channels))
    randomize_statistics(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    images = torch.randn(2, 3, 64, 64)
    expected = model.eval()(images)
    for clone in (copy.deepcopy(model), pickled):
        assert_same_state(clone, model)
        torch.testing.assert_close(clone.eval()(images), expected, rtol=0, atol=0)
        clone.train()(images)  # moves the clone's running statistics
        assert not torch.equal(clone.bn1.running_mean, model.bn1.running_mean)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


def test_builds_on_the_meta_device():
    with torch.device("meta"):
        model = models.resnet50()
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032


def randomize_statistics(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    state, expected_state = got.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    for name, tensor in expected_state.items():
        assert torch.equal(state[name], tensor), name
