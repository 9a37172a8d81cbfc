"""``fuse`` and ``unfuse`` on the real torchvision and on our own models: numbers, identity, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import resnet

import fused_resnet
from fused_resnet import models, modules
from fused_resnet.convert import fuse, unfuse
from fused_resnet.models import torchvision as fused_classes
from tests.modules.compare import assert_close, assert_equal, counted, randomize, step

# Rounding of float64, through a network in which the last normalisations divide by the spread of 4 values each.
WHOLE_MODEL_FLOAT64 = 1e-9


def small_resnet(block=resnet.Bottleneck, **settings) -> nn.Module:
    """torchvision's ResNet with one block a stage, but two in the first, and weights worth comparing."""
    torch.manual_seed(5)
    return randomize(resnet.ResNet(block, [2, 1, 1, 1], num_classes=4, **settings))


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, dtype=dtype)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_fused_torchvision_model_trains_and_infers_the_same_in_float64(block):
    plain = small_resnet(block).double()
    fused = fuse(copy.deepcopy(plain))
    x = images(torch.float64)
    for training in (True, False):
        plain.train(training), fused.train(training)
        assert_close(step(fused, fused, x, backend="reference"), step(plain, plain, x), WHOLE_MODEL_FLOAT64)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_fused_torchvision_model_is_as_exact_as_the_plain_one_in_float32(block):
    """Distances to float64, as lengths of vectors: a ReLU with an input near 0 may flip and move single gradients."""
    plain = small_resnet(block)
    fused, exact = fuse(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    x = images()
    actual, expected, truth = step(fused, fused, x), step(plain, plain, x), step(exact, exact, x.double())
    for name, true in truth.items():
        error, plain_error = (torch.dist(result[name].double(), true.double()) for result in (actual, expected))
        assert error <= 2 * plain_error + 1e-3 * true.double().norm(), name


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_fuse_then_unfuse_is_bitwise_the_model_it_was(block):
    plain = small_resnet(block)
    twin = copy.deepcopy(plain)
    before = [(name, type(module)) for name, module in plain.named_modules()]
    unfuse(fuse(plain))
    assert [(name, type(module)) for name, module in plain.named_modules()] == before
    x = images()
    for training in (True, False):
        plain.train(training), twin.train(training)
        assert_equal(step(plain, plain, x), step(twin, twin, x))


def test_nothing_the_model_holds_is_replaced():
    model = small_resnet()

    def held():
        tensors = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
        return [(name, id(thing)) for name, thing in tensors], list(model.state_dict()), model.training

    before = held()
    assert fuse(model) is model
    assert held() == before
    assert type(model) is fused_classes.FusedResNet
    assert unfuse(model) is model
    assert held() == before
    assert type(model) is resnet.ResNet


def test_fused_classes_are_both_torchvisions_and_ours():
    model = fuse(small_resnet(resnet.BasicBlock))
    assert isinstance(model, resnet.ResNet) and isinstance(model, models.ResNet)
    block = model.layer1[0]
    assert isinstance(block, resnet.BasicBlock) and isinstance(block, modules.BasicBlock)
    assert type(type(block)(8, 8)) is fused_classes.FusedBasicBlock  # built as torchvision's class is


def test_ours_are_torchvisions_once_that_is_imported():
    """As isinstance sees them, and torchvision, which zeroes the last norm of each of its own blocks."""
    assert isinstance(models.resnet18(), resnet.ResNet)
    assert isinstance(modules.BasicBlock(8, 8), resnet.BasicBlock)

    class Own(modules.BasicBlock):
        pass

    assert type(Own(8, 8)) is Own
    for block in (modules.BasicBlock, modules.Bottleneck):
        made = resnet.ResNet(block, [1, 1, 1, 1], zero_init_residual=True)
        assert all(module.bn2.weight.any() == (block is modules.Bottleneck) for (module,) in stages_of(made))
        assert block is modules.BasicBlock or not any(module.bn3.weight.any() for (module,) in stages_of(made))


def stages_of(model):
    return model.layer1, model.layer2, model.layer3, model.layer4


def test_ours_without_torchvision_load_beside_it(tmp_path):
    """Pickled by a process that never imported it: the classes differ, the state does not."""
    code = (
        "import sys, torch, fused_resnet; from fused_resnet import models; block = fused_resnet.BasicBlock(3, 3);"
        f"assert type(block) is fused_resnet.BasicBlock; torch.save(block, {str(tmp_path / 'block.pt')!r});"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    block = torch.load(tmp_path / "block.pt", weights_only=False)
    assert isinstance(block, resnet.BasicBlock) and block(images()).shape == images().shape


def test_fused_forward_calls_no_norm():
    model, plain = fuse(small_resnet()), small_resnet()
    with counted(nn.BatchNorm2d.forward) as calls:
        model(images())
        assert calls == []
        plain(images())
        assert calls


def test_optimizer_keeps_training():
    """Plain, fused and unfused steps of one optimizer against plain steps only."""
    model = small_resnet(resnet.BasicBlock).double()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4) for m in (model, twin)]
    for convert in (None, fuse, fuse, unfuse, fuse):
        if convert is not None:
            convert(model)
        x, labels = images(torch.float64), torch.randint(4, (4,))
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(m(x), labels).backward()
            optimizer.step()
    for (name, actual), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        # Each step multiplies the rounding of the one before by about 10.
        assert torch.allclose(actual, expected, rtol=0, atol=1e-7 * max(1, expected.abs().max())), name


def _torch_save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _torch_save_and_load]
)
def test_copies_stay_fused_and_can_be_unfused(copied):
    model = fuse(small_resnet()).eval()
    twin = copied(model)
    x = images()
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(twin(x), model(x))
    assert type(unfuse(twin)) is resnet.ResNet
    assert type(model) is fused_classes.FusedResNet


def test_hooks_stay_and_fire():
    model = small_resnet(resnet.BasicBlock).double()
    twin, seen, expected = copy.deepcopy(model), [], []
    for name in ("bn1", "layer1.0", "layer2.0.bn2", "layer2.0.downsample.1", "layer3.0.relu", "layer1.1.conv1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
        twin.get_submodule(name).register_forward_hook(lambda *_, name=name: expected.append(name))
    fuse(model)
    x = images(torch.float64)
    assert_close(step(model, model, x), step(twin, twin, x), WHOLE_MODEL_FLOAT64)
    assert sorted(seen) == sorted(expected)
    assert len(expected) == 7  # a block's relu runs twice


def test_fuse_and_unfuse_of_our_own_model():
    ours = randomize(models.ResNet(modules.Bottleneck, (1, 1, 1, 1), num_classes=4))
    plain = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=4)
    plain.load_state_dict(ours.state_dict())
    fused = copy.deepcopy(ours)
    x = images()
    assert type(unfuse(ours)) is fused_classes.ResNet
    for training in (True, False):
        ours.train(training), plain.train(training)
        assert_equal(step(ours, ours, x), step(plain, plain, x))
    assert torch.equal(unfuse(fuse(ours))(x), plain(x))
    ours.load_state_dict(fused.state_dict())
    assert torch.equal(fuse(ours).train()(x), fused(x))


@pytest.mark.parametrize("make", [lambda: modules.ConvBNAct2d(3, 8, 3), lambda: modules.BatchNormAct2d(3)])
def test_unfuse_of_single_modules(make):
    module, x = randomize(make()).eval(), images()
    with torch.no_grad(), counted(nn.BatchNorm2d.forward) as calls:
        fused = module(x)
        assert calls == []
        ordinary = unfuse(module)(x)
        assert len(calls) == 1
        assert torch.allclose(ordinary, fused, rtol=0, atol=1e-5)
        assert torch.equal(fuse(module)(x), fused)
        assert len(calls) == 1


def test_cifar_network_and_its_plain_twin_unfuse():
    for model in (models.cifar_resnet20(), models.CIFARResNet(8, shortcut=False)):
        fused = copy.deepcopy(randomize(model)).double()
        ordinary = unfuse(model.double())
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        assert_close(step(fused, fused, x, backend="reference"), step(ordinary, ordinary, x), WHOLE_MODEL_FLOAT64)


class OwnForward(resnet.BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2


def test_subclasses_and_replaced_forwards_are_left_alone():
    model = small_resnet(OwnForward)
    twin = copy.deepcopy(model)
    fuse(model)
    assert type(model) is fused_classes.FusedResNet
    assert type(model.layer1[0]) is OwnForward
    block = resnet.BasicBlock(8, 8)
    block.forward = lambda x: x - 1
    assert type(fuse(block)) is resnet.BasicBlock
    x = images()
    expected = twin.eval()(x)
    assert torch.allclose(model.eval()(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_wrappers_are_looked_into():
    model = small_resnet(resnet.BasicBlock)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images()
    torch._dynamo.reset()
    compiled(x)
    assert fuse(compiled) is compiled
    assert type(model) is fused_classes.FusedResNet
    twin = copy.deepcopy(model)
    assert_close({"output": compiled(x)}, {"output": twin(x)}, 1e-4)
    assert type(fuse(nn.DataParallel(small_resnet())).module) is fused_classes.FusedResNet


def test_a_backbone_inside_another_model():
    """torchvision's detectors take the stages out of a ResNet: the blocks are still its blocks."""
    backbone = torchvision.models._utils.IntermediateLayerGetter(small_resnet(), {"layer4": "out"}).double()
    twin = copy.deepcopy(backbone)
    fuse(backbone)
    assert type(backbone.layer4[0]) is fused_classes.FUSED_CLASS[resnet.Bottleneck]
    x = images(torch.float64)
    actual = step(backbone, lambda x: backbone(x)["out"], x)
    assert_close(actual, step(twin, lambda x: twin(x)["out"], x), WHOLE_MODEL_FLOAT64)


@pytest.mark.parametrize("convert", [fuse, unfuse])
def test_refusals(convert):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got dict"):
        convert({"model": nn.ReLU()})
    with pytest.raises(TypeError, match=r"model must be .* before torch.jit"):
        convert(torch.jit.script(nn.ReLU()))


def test_a_model_with_nothing_to_fuse_is_returned_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    before = copy.deepcopy(model.__dict__)
    assert fused_resnet.unfuse(fused_resnet.fuse(model)) is model
    assert model.__dict__.keys() == before.keys()
    assert [type(module) for module in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_a_forward_that_a_script_wrote_is_noticed(monkeypatch):
    """Whose globals have no package, as those of ``__main__``."""
    written = {"__package__": None}
    exec("def forward(self, x):\n    return x + 1", written)
    monkeypatch.setattr(resnet.BasicBlock, "forward", written["forward"])
    block, x = resnet.BasicBlock(3, 3), images()
    with pytest.warns(UserWarning, match="no block that can be fused"):
        fuse(block)
    assert torch.equal(block(x), x + 1)
