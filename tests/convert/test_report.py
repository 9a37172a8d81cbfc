"""``fusion_report``: every norm once, and the reasons are those that forward finds."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from fused_resnet import models, modules
from fused_resnet.convert import fuse, fusion_report, report, unfuse
from fused_resnet.modules import bn_act, conv_bn_act
from fused_resnet.ops import use_backend, use_fusion_level


@pytest.fixture(autouse=True)
def every_backend(monkeypatch):
    """Reports as where the native backend is built; one test below takes it away."""
    monkeypatch.setattr(report, "unavailable", lambda backend: ["not here"] if backend == "triton" else [])


def sites(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {site.name: site.reasons for site in fusion_report(model).sites}


def small_resnet(block=resnet.BasicBlock, **settings) -> nn.Module:
    return resnet.ResNet(block, [1, 1, 1, 2], num_classes=4, **settings)


MODELS = {
    "torchvision": lambda: resnet.resnet50(),
    "torchvision fused": lambda: fuse(resnet.resnet18()),
    "ours": lambda: models.resnet34(),
    "ours unfused": lambda: unfuse(models.resnet18()),
    "frozen": lambda: fuse(resnet.resnet18(norm_layer=FrozenBatchNorm2d)),
    "GroupNorm": lambda: models.resnet18(norm_layer=lambda channels: nn.GroupNorm(2, channels)),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(models.resnet18()),
    "BatchNormAct2d": lambda: models.resnet18(norm_layer=modules.BatchNormAct2d),
    "CIFAR": lambda: models.cifar_resnet20(),
    "CIFAR plain": lambda: models.cifar_plain20(),
    "no norms": lambda: models.resnet18(norm_layer=lambda channels: nn.Identity()),
    "single": lambda: modules.BatchNormAct2d(3),
    "bare": lambda: nn.BatchNorm2d(3),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_norm_is_in_one_site(make):
    model = make()
    norms = [name for name, module in model.named_modules() if "Norm" in type(module).__name__]
    assert sorted(norm for site in fusion_report(model).sites for norm in site.norms) == sorted(norms)


@pytest.mark.parametrize("name", ["torchvision fused", "ours", "SyncBatchNorm", "CIFAR", "CIFAR plain"])
def test_as_many_fused_sites_as_fused_calls(name, monkeypatch):
    model, calls = MODELS[name](), []
    block = importlib.import_module("fused_resnet.ops.residual_block")
    for caller, op in ((bn_act, "normalize"), (bn_act, "bn_act_dual"), (block, "normalize"), (block, "normalize_dual")):
        real = getattr(caller, op)
        monkeypatch.setattr(caller, op, lambda *args, real=real, **kwargs: calls.append(1) or real(*args, **kwargs))
    with use_fusion_level(0):  # where every norm is called by itself
        model(torch.randn(2, 3, 32, 32))
    assert all(site.fused for site in fusion_report(model).sites)
    assert len(calls) == len(fusion_report(model).sites)


def test_names_of_the_sites():
    assert list(sites(fuse(small_resnet(resnet.Bottleneck))))[:4] == [
        "bn1 + relu",
        "layer1.0.bn1 + relu",
        "layer1.0.bn2 + relu",
        "layer1.0.bn3 + downsample.1 + add + relu",
    ]
    assert list(sites(modules.BasicBlock(4, 4))) == ["bn1 + relu", "bn2 + add + relu"]
    assert list(sites(modules.ConvBNAct2d(4, 4, 3))) == ["bn + act"]
    assert list(sites(modules.ConvBNAct2d(4, 4, 3, activation=None))) == ["bn"]
    assert list(sites(nn.Sequential(modules.BatchNormAct2d(4)))) == ["0 + relu"]


def test_not_fused_yet_and_unfused():
    for site in fusion_report(small_resnet()).sites:
        assert site.reasons == ("fused_resnet.fuse was not called, or before this block was there",)
    for reasons in sites(unfuse(models.cifar_resnet20())).values():
        assert reasons == ("fused_resnet.unfuse was called on it",)
    assert sites(unfuse(modules.BatchNormAct2d(4))) == {
        "BatchNormAct2d + relu": ("fused_resnet.unfuse was called on it",)
    }


def test_hooks_split_a_projection_site():
    model = fuse(small_resnet())
    model.layer2[0].downsample[1].register_forward_hook(lambda *args: None)
    model.layer3[0].bn2.register_forward_hook(lambda *args: None)
    model.layer4[0].downsample.register_forward_hook(lambda *args: None)
    model.layer4[1].relu.register_forward_hook(lambda *args: None)
    hooked = "the norm has hooks, or a forward of its own"
    found = {name: reasons for name, reasons in sites(model).items() if name.startswith(("layer2", "layer3", "layer4"))}
    assert found == {
        "layer2.0.bn1 + relu": (),
        "layer2.0.bn2 + add + relu": (),
        "layer2.0.downsample.1": (hooked,),
        "layer3.0.bn1 + relu": (),
        "layer3.0.bn2 + add + relu": (hooked,),
        "layer3.0.downsample.1": (),
        "layer4.0.bn1 + relu": (),
        "layer4.0.bn2 + add + relu": (),
        "layer4.0.downsample.1": ("downsample has hooks, or a forward of its own",),
        "layer4.1.bn1 + relu": ("the activation has hooks, or a forward of its own",),
        "layer4.1.bn2 + add + relu": ("the activation has hooks, or a forward of its own",),
    }


class OwnForward(resnet.BasicBlock):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda: nn.BatchNorm2d(3), "BatchNorm2d", "torch.nn.modules.batchnorm.BatchNorm2d is not in a block"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "1", "Sequential, is not one that fuse knows"),
        (lambda: fuse(OwnForward(4, 4)), "bn1", "OwnForward, is not one that fuse knows"),
        (lambda: small_resnet(norm_layer=FrozenBatchNorm2d), "bn1", "fuse was not called"),
        (lambda: fuse(small_resnet(norm_layer=FrozenBatchNorm2d)), "bn1 + relu", "the norm is torchvision"),
        (lambda: modules.BasicBlock(4, 4, norm_layer=nn.InstanceNorm2d), "bn1 + relu", "InstanceNorm2d, not exactly"),
    ],
)
def test_reasons_of_what_is_not_known(make, name, words):
    (reason,) = sites(make())[name]
    assert words in reason


def test_replaced_forward():
    block = modules.BasicBlock(4, 4)
    block.forward = lambda x: x
    assert sites(block)["bn1"] == ("the forward of its fused_resnet.modules.torchvision.BasicBlock was replaced",)


def test_a_norm_in_the_middle_of_a_shortcut():
    downsample = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    found = sites(modules.BasicBlock(4, 8, downsample=downsample))
    assert found["bn2 + downsample.3 + add + relu"] == ()
    assert found["downsample.1"] == ("it is not the last norm of downsample",)


def test_what_the_backends_refuse(monkeypatch):
    assert sites(modules.BasicBlock(4, 4).double())["bn1 + relu"] == (
        "native: x is torch.float64; it takes float32, float16 and bfloat16",
    )
    with use_backend("reference"):
        assert sites(modules.BasicBlock(4, 4))["bn1 + relu"] == (
            "reference: the reference, which fuses nothing, was asked for",
        )
    monkeypatch.setattr(report, "unavailable", lambda backend: [f"{backend} is not here"])
    assert sites(modules.BasicBlock(4, 4))["bn1 + relu"] == ("native: native is not here",)


@pytest.mark.gpu
def test_memory_format_on_cuda():
    block = modules.BasicBlock(4, 4).cuda()
    assert sites(block)["bn1 + relu"] == ("triton: x is not channels_last",)
    assert sites(block.to(memory_format=torch.channels_last))["bn1 + relu"] == ()


def test_table():
    model = fuse(small_resnet())
    model.bn1.register_forward_hook(lambda *args: None)
    model.relu = nn.SiLU()
    model.layer1[0].relu.register_forward_hook(lambda *args: None)
    with use_fusion_level(3):
        lines = str(fusion_report(model)).splitlines()
    assert lines[0] == "8 of 11 sites fused, 8 of them with their convolution in training"
    assert lines[1] == (
        "  bn1 + relu                                ordinary  "
        "the activation is torch.nn.modules.activation.SiLU, not exactly"
    )
    assert lines[2].strip() == "torch.nn.ReLU; the norm has hooks, or a forward of its own"
    assert lines[-1] == "  layer4.1.bn2 + add + relu                 level 3"
    assert max(map(len, lines)) <= 120
    assert str(fusion_report(nn.ReLU())) == "0 of 0 sites fused, 0 of them with their convolution in training"


def test_level_in_training():
    """Of every site: the level its convolution trains at, or what keeps it at level 0."""
    block = modules.Bottleneck(8, 4, groups=2, base_width=64)
    model = nn.Sequential(modules.ConvBNAct2d(3, 8, 1), block, modules.BasicBlock(16, 16))
    model[2].conv2.register_forward_hook(lambda *args: None)
    with use_fusion_level(2):
        found = {site.name: site for site in fusion_report(model).sites}
    assert {name: site.level for name, site in found.items()} == {
        "0.bn + act": 0,
        "1.bn1 + relu": 2,
        "1.bn2 + relu": 0,
        "1.bn3 + add + relu": 2,
        "2.bn1 + relu": 0,
        "2.bn2 + add + relu": 0,
    }
    assert found["0.bn + act"].level_reasons == ("its convolution is neither in a residual block nor in a stem",)
    assert found["1.bn2 + relu"].level_reasons == ("groups is 2; the training kernels take 1",)
    assert found["2.bn1 + relu"].level_reasons == ("the convolution has hooks, or a forward of its own",)
    block.conv1 = nn.Conv2d(8, 8, 1, groups=4, bias=False)  # then no convolution of the block is fused
    with use_fusion_level(3):
        assert {site.level for site in fusion_report(block).sites} == {0}
    with use_fusion_level(0):
        assert fusion_report(block).sites[0].level_reasons == ("level 0 was asked for",)
    block.bn1.register_forward_hook(lambda *args: None)
    assert fusion_report(block).sites[0].level is None


def test_conv_bn_act_reports_what_its_forward_asks():
    module = modules.ConvBNAct2d(3, 4, 3)
    module.bn.register_forward_hook(lambda *args: None)
    assert sites(module)["bn + act"] == tuple(conv_bn_act.why_not_fold(module.conv, module.bn, module.act))


def test_refusal():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        fusion_report("resnet50")
