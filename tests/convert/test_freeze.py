"""freeze: the model's eval outputs in any dtype, from a copy that nothing done to the model or the copy disturbs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fused_resnet
from fused_resnet.convert import fuse, fusion_report, unfuse
from fused_resnet.frozen import freeze
from fused_resnet.frozen.model import FrozenModel
from fused_resnet.models import cifar_plain20, cifar_resnet20
from fused_resnet.modules import BasicBlock, ConvBNAct2d
from tests.accuracy import assert_at_most_twice
from tests.modules.compare import randomize

HALF = (torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("one_thread")


def batch_norms(frozen: FrozenModel) -> list[str]:
    """Those that are not folded."""
    return [norm for site in fusion_report(frozen).sites if not site.folded for norm in site.norms]


class NormalisedInGroups(nn.Module):
    """A block of its own kind, between two of ours; the second of which has no BatchNorm either."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNAct2d(3, 8, 5, stride=2)
        self.ours = BasicBlock(8, 8)
        self.groups = BasicBlock(8, 8, norm_layer=lambda channels: nn.GroupNorm(2, channels))
        self.norm = nn.BatchNorm2d(8)
        self.head = ConvBNAct2d(8, 10, 1, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.groups(self.ours(self.stem(x))))).mean((2, 3))


def pooled_shortcut() -> BasicBlock:
    """ResNet-D's shortcut: its convolution takes no stride."""
    shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8))
    return BasicBlock(3, 8, stride=2, downsample=shortcut)


def shortcut_without_norm() -> BasicBlock:
    return BasicBlock(3, 8, stride=2, downsample=nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 8, 1)))


def fused_module_as_shortcut() -> BasicBlock:
    return BasicBlock(3, 8, stride=2, downsample=ConvBNAct2d(3, 8, 1, stride=2, activation=None))


# How to make each, and how many BatchNorms are left in the frozen copy.
MODELS = {
    "resnet18": (lambda: fused_resnet.resnet18(num_classes=10), 0),
    "resnet50": (lambda: fused_resnet.resnet50(num_classes=10), 0),
    "resnext50_32x4d": (lambda: fused_resnet.resnext50_32x4d(num_classes=10), 0),
    "cifar_resnet20": (cifar_resnet20, 0),
    "cifar_plain20": (cifar_plain20, 0),
    "torchvision's resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 0),
    "torchvision's resnet18, fused": (lambda: fuse(torchvision.models.resnet18(num_classes=10)), 0),
    "ours, unfused": (lambda: unfuse(cifar_resnet20()), 0),
    "another kind of norm inside": (NormalisedInGroups, 3),
    "ConvBNAct2d": (lambda: ConvBNAct2d(3, 8, 3), 0),
    "ConvBNAct2d with groups, no activation": (lambda: ConvBNAct2d(3, 9, 3, groups=3, activation=None), 0),
    "pooled shortcut": (pooled_shortcut, 1),
    "shortcut without a norm": (shortcut_without_norm, 0),
    "shortcut that is a module": (fused_module_as_shortcut, 0),
    "inside a container": (lambda: nn.Sequential(nn.Sequential(BasicBlock(3, 3)), nn.AdaptiveAvgPool2d(1)), 0),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(MODELS[name][0]()).eval()


def assert_accurate(actual: Tensor, model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """At most twice the error of the plain model in this dtype, both against float64 and in channels_last, where
    oneDNN's convolutions of float32 err twice as much as in NCHW."""
    plain = unfuse(copy.deepcopy(model)).eval()
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        plain = plain.to(dtype).to(memory_format=torch.channels_last)
        baseline = plain(x.to(dtype).contiguous(memory_format=torch.channels_last))
    assert_at_most_twice(actual, baseline, exact)


@pytest.mark.parametrize("name", MODELS)
def test_accuracy_in_every_dtype(name):
    model = make(name)
    x = torch.randn(2, 3, 32, 32)
    for dtype in (torch.float32, *HALF):
        frozen = freeze(model, x, dtype=dtype)
        out = frozen(x)
        assert out.dtype == (dtype if frozen.is_whole else x.dtype) and not out.requires_grad
        assert_accurate(out.to(dtype), model, x, dtype)
        assert len(batch_norms(frozen)) == MODELS[name][1]
    if frozen.is_whole and not name.startswith(("shortcut", "pooled")):  # which is called as it is
        exact = unfuse(copy.deepcopy(model)).double()(x.double())
        torch.testing.assert_close(freeze(model, x, dtype=torch.float64)(x.double()), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "torchvision's resnet18", "resnext50_32x4d"])
def test_other_sizes_batches_and_memory_formats_after_freezing(name):
    model = make(name)
    frozen = freeze(model, torch.randn(2, 3, 32, 32))
    for shape in ((1, 3, 32, 32), (5, 3, 32, 32), (2, 3, 45, 33), (3, 3, 17, 64), (2, 3, 32, 32), (1, 3, 1, 1)):
        x = torch.randn(shape)
        assert_accurate(frozen(x), model, x, torch.float32)
        torch.testing.assert_close(frozen(x.contiguous(memory_format=torch.channels_last)), frozen(x), rtol=0, atol=0)
        assert_accurate(frozen(x.half()), model, x.half().float(), torch.float32)
    assert frozen(torch.randn(0, 3, 32, 32)).shape == (0, model(torch.randn(1, 3, 32, 32)).shape[1])


def test_the_model_is_left_as_it_is():
    for training in (True, False):
        model = randomize(torchvision.models.resnet18(num_classes=10)).train(training)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        classes = [type(module) for module in model.modules()]
        parameters = list(model.parameters())
        frozen = freeze(model, torch.randn(2, 3, 32, 32), dtype=torch.bfloat16)
        frozen(torch.randn(2, 3, 32, 32))
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(tensor.dtype == state[name].dtype for name, tensor in model.state_dict().items())
        assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert [type(module) for module in model.modules()] == classes
        assert all(module.training == training for module in model.modules())


def test_the_frozen_copy_does_not_change_with_the_model():
    model, x = make("cifar_resnet20"), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    before = frozen(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(frozen(x), before)


HOOKED = ["conv1", "layer1.0", "layer1.0.conv2", "layer2.0.bn1", "layer2.0.downsample", "layer2.0.downsample.1", "relu"]


@pytest.mark.parametrize("name", HOOKED)
def test_what_has_hooks_runs_the_ordinary_way(name):
    """The hook of the copy is called as often as the model's would be, and sees what it would see."""
    model, x = make("resnet18"), torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    frozen = freeze(model, x)
    seen.clear()
    out = frozen(x)
    actual = list(seen)
    seen.clear()
    with torch.no_grad():
        expected_out = model(x)
    assert len(actual) == len(seen) == 1
    torch.testing.assert_close(actual[0], seen[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-5)
    assert len(batch_norms(frozen)) <= 3


def test_a_hook_may_replace_a_value():
    model, x = make("resnet18"), torch.randn(2, 3, 32, 32)
    model.layer1[0].bn1.register_forward_hook(lambda module, args, out: out * 0)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_features_seen_by_hooks_on_frozen_modules_do_not_change_later():
    """Whichever module is watched, alone or with all others: what goes in and comes out is not written to again."""
    model, x = make("resnet18"), torch.randn(2, 3, 32, 32)
    frozen = freeze(model, x)
    expected = frozen(x)
    kinds = (nn.Conv2d, nn.Sequential, fused_resnet.BasicBlock, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    parts = [(name, part) for name, part in frozen.named_modules() if isinstance(part, kinds)]
    assert len(parts) == 20 + 4 + 3 + 8 + 1 + 1
    seen: list[tuple[Tensor, Tensor]] = []

    def keep_output(module, args, out):
        seen.append((out, out.clone()))

    def keep_input(module, args):
        seen.extend((value, value.clone()) for value in args if isinstance(value, Tensor))

    def check(name: str) -> None:
        torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
        assert seen and all(torch.equal(now, then) for now, then in seen), name
        seen.clear()

    for name, part in parts:
        for register, hook in (
            (part.register_forward_hook, keep_output),
            (part.register_forward_pre_hook, keep_input),
        ):
            handle = register(hook)
            check(name)
            handle.remove()
    handles = [part.register_forward_hook(keep_output) for _, part in parts]
    check("all of them")
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        module, images = frozen.module, x.contiguous(memory_format=torch.channels_last)
        features = [images]
        for part in (module.conv1, module.bn1, module.maxpool, *module.layer1, module.layer2):
            features.append(part(features[-1]))
            seen.append((features[-1], features[-1].clone()))
    assert all(torch.equal(now, then) for now, then in seen)
    assert torch.equal(images, x)


def test_batch_statistics_cannot_be_folded():
    model = fused_resnet.resnet18(num_classes=10, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    x = torch.randn(4, 3, 32, 32)
    frozen = freeze(model, x)
    assert len(batch_norms(frozen)) == 20
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_block_used_twice():
    block = randomize(BasicBlock(3, 3)).eval()
    model, x = nn.Sequential(block, nn.Conv2d(3, 3, 1), block), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(freeze(model, x)(x), model(x), rtol=1e-5, atol=1e-5)


def test_copies_and_files():
    model, x = make("cifar_resnet20"), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    expected = frozen(x)
    assert torch.equal(copy.deepcopy(frozen)(x), expected)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, FrozenModel) and not loaded.training
    assert torch.equal(loaded(x), expected)


def test_state_dict_round_trip():
    x = torch.randn(2, 3, 16, 16)
    frozen, other = freeze(make("cifar_resnet20"), x), freeze(randomize(cifar_resnet20()), x)
    expected = frozen(x)
    assert not torch.equal(other(x), expected)
    state = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    other.load_state_dict({name: tensor * 0 for name, tensor in state.items()}, assign=True)
    assert (other(x) == 0).all()


def test_dtype_after_freezing():
    model, x = make("cifar_resnet20"), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    assert frozen.dtype == torch.float32
    frozen.to(torch.bfloat16)
    assert frozen.dtype == frozen(x).dtype == torch.bfloat16
    assert_accurate(frozen(x), model, x, torch.bfloat16)
    twin = freeze(model, x).double()
    torch.testing.assert_close(twin(x), model(x).double(), rtol=1e-4, atol=1e-5)
    assert frozen.float().dtype == torch.float32


def test_half_precision_model_stays_in_it():
    model, x = make("cifar_resnet20").bfloat16(), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    assert frozen(x).dtype == torch.bfloat16
    assert_accurate(frozen(x), model, x.bfloat16().float(), torch.bfloat16)


def test_folding_is_done_once_in_float64():
    """Tiny variances and large scales, in half precision: folding in it would give infinities."""
    conv = ConvBNAct2d(3, 4, 3).eval()
    conv.bn.running_var.fill_(1e-6)
    conv.bn.weight.data.fill_(3e-3)
    conv.conv.weight.data.mul_(1e-2)
    x = torch.randn(1, 3, 8, 8)
    for dtype in HALF:
        assert_accurate(freeze(conv, x, dtype=dtype)(x), conv, x, dtype)


def test_no_gradients_and_no_training():
    frozen = freeze(make("cifar_resnet20"), torch.randn(1, 3, 16, 16))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen(torch.randn(1, 3, 16, 16, requires_grad=True)).requires_grad
    assert frozen.eval() is frozen
    around = nn.Sequential(nn.BatchNorm2d(3), frozen, nn.Dropout()).eval()
    with pytest.warns(UserWarning, match="a frozen model stays in eval"):
        around.train()
    assert [module.training for module in around] == [True, False, True]
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("name", ["cifar_resnet20", "another kind of norm inside"])
def test_compiled(name):
    model, x = make(name), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for images in (x, torch.randn(3, 3, 20, 12)):
        torch.testing.assert_close(compiled(images), frozen(images), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_exported():
    model, x = make("cifar_resnet20"), torch.randn(2, 3, 16, 16)
    frozen = freeze(model, x)
    exported = torch.export.export(frozen, (x,)).module()
    torch.testing.assert_close(exported(x), frozen(x), rtol=1e-4, atol=1e-5)
