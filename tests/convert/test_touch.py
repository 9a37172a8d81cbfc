"""Whatever is done to a model after ``fuse`` or ``freeze``: the answer is the plain model's after the same was done.

Every way to change a module, at every place of a network where there is such a module, in eval fused and frozen and in
training: a product, not a list of cases.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models import resnet

import fused_resnet
from fused_resnet import freeze, fuse
from tests.modules.compare import randomize

Undo = Callable[[], object] | None


pytestmark = pytest.mark.usefixtures("one_thread")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def on_instance(name: str) -> Callable[[nn.Module], None]:
    """Another method of the module itself."""

    def change(module: nn.Module) -> None:
        before = getattr(module, name)
        setattr(module, name, types.MethodType(lambda self, *args: before(*args) * 1.5, module))

    return change


def on_class(name: str) -> Callable[[nn.Module], Undo]:
    """Another method of the class in which the module's method stands."""

    def change(module: nn.Module) -> Undo:
        plain = PLAIN_CLASS.get(type(module), type(module))
        owner = next(cls for cls in plain.__mro__ if name in vars(cls))
        before = vars(owner)[name]
        setattr(owner, name, lambda self, *args: before(self, *args) * 1.5)
        return lambda: setattr(owner, name, before)

    return change


def replaced(name: str) -> Callable[[nn.Module], Undo]:
    """Another function of torch.nn.functional."""

    def change(module: nn.Module) -> Undo:
        before = getattr(F, name)
        setattr(F, name, lambda *args, **kwargs: before(*args, **kwargs) * 1.25)
        return lambda: setattr(F, name, before)

    return change


def hooked(register: str, hook: Callable) -> Callable[[nn.Module], Undo]:
    return lambda module: getattr(module, register)(hook).remove


def scaled(name: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        with torch.no_grad():
            getattr(module, name).mul_(1.5)

    return change


def assigned(name: str) -> Callable[[nn.Module], None]:
    """Another tensor in the place of one."""

    def change(module: nn.Module) -> None:
        before = getattr(module, name)
        after = before.detach() * 1.5
        setattr(module, name, nn.Parameter(after) if isinstance(before, nn.Parameter) else after)

    return change


def moved(name: str) -> Callable[[nn.Module], None]:
    """Another storage behind one."""

    def change(module: nn.Module) -> None:
        tensor = getattr(module, name)
        tensor.data = tensor.detach() * 1.5

    return change


def zeroed_state(module: nn.Module) -> None:
    """As broadcast, moving averages and weight synchronisation write."""
    for tensor in module.state_dict().values():
        tensor.zero_() if tensor.is_floating_point() else None


def loaded(assign: bool) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        state = {
            name: tensor * 1.25 if tensor.is_floating_point() else tensor
            for name, tensor in module.state_dict().items()
        }
        module.load_state_dict(state, strict=False, assign=assign)

    return change


def parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Doubled())


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


def without_statistics(module: nn.Module) -> None:
    module.running_mean = module.running_var = None


def set_to(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, name, value)


def another(child: str) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, child, nn.Sequential(getattr(module, child), Doubled()))


ANY = {
    "forward hook": hooked("register_forward_hook", lambda module, args, out: out * 0.5),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda module, args: tuple(arg * 0.5 for arg in args)),
    "forward of its own": on_instance("forward"),
    "forward of its class": on_class("forward"),
    "state zeroed in place": zeroed_state,
    "state loaded": loaded(assign=False),
    "state assigned": loaded(assign=True),
    "float64 and back": lambda module: module.double().float() and None,
    "channels_last": lambda module: module.to(memory_format=torch.channels_last) and None,
}
WEIGHTS = {
    "weight written": scaled("weight"),
    "weight assigned": assigned("weight"),
    "weight moved": moved("weight"),
    "weight parametrized": parametrized,
    "weight pruned": pruned,
}
WAYS = {
    nn.Conv2d: {
        **ANY,
        **WEIGHTS,
        "_conv_forward of its own": on_instance("_conv_forward"),
        "_conv_forward of its class": on_class("_conv_forward"),
        "padding": set_to("padding", (2, 2)),
        "stride, one number": set_to("stride", 2),
        "dilation, one number": set_to("dilation", 1),
        "bias": lambda module: setattr(module, "bias", nn.Parameter(torch.ones(module.out_channels))),
        "conv2d replaced": replaced("conv2d"),
    },
    nn.BatchNorm2d: {
        **ANY,
        **WEIGHTS,
        "running_mean written": scaled("running_mean"),
        "running_var assigned": assigned("running_var"),
        "bias moved": moved("bias"),
        "eps": set_to("eps", 0.5),
        "momentum": set_to("momentum", 0.9),
        "training": lambda module: module.train(not module.training) and None,
        "statistics gone": without_statistics,
        "batch_norm replaced": replaced("batch_norm"),
    },
    nn.ReLU: {**ANY, "relu replaced": replaced("relu")},
    nn.MaxPool2d: {**ANY, "stride": set_to("stride", 1), "max_pool2d replaced": replaced("max_pool2d")},
    nn.AdaptiveAvgPool2d: ANY,
    nn.Linear: {**ANY, **WEIGHTS, "bias written": scaled("bias"), "linear replaced": replaced("linear")},
    nn.Sequential: {**ANY, "another block": lambda module: module.append(Doubled()) and None},
    resnet.BasicBlock: {**ANY, "another convolution": another("conv2"), "no shortcut": set_to("downsample", None)},
    resnet.ResNet: {**ANY, "_forward_impl of its own": on_instance("_forward_impl"), "another stem": another("conv1"),
                    "_forward_impl of its class": on_class("_forward_impl"), "another head": another("fc")},
}  # fmt: skip
PLACES = {
    nn.Conv2d: ("conv1", "layer1.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"),
    nn.BatchNorm2d: ("bn1", "layer1.0.bn1", "layer1.1.bn2", "layer2.0.downsample.1"),
    nn.ReLU: ("relu", "layer2.0.relu"),
    nn.MaxPool2d: ("maxpool",),
    nn.AdaptiveAvgPool2d: ("avgpool",),
    nn.Linear: ("fc",),
    nn.Sequential: ("layer1", "layer2.0.downsample"),
    resnet.BasicBlock: ("layer1.0", "layer2.0"),
    resnet.ResNet: ("",),
}
CASES = [(way, place, kind) for kind in PLACES for place in PLACES[kind] for way in WAYS[kind]]
PLAIN_CLASS: dict[type, type] = {}
"""torchvision's or PyTorch's class, by the one in its place."""


def name_of(value: str | type) -> str:
    return value if isinstance(value, str) else value.__name__


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """torchvision's, of two stages; the other two are empty."""
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], num_classes=5)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(128, 5)
    for module in freeze(model, torch.zeros(1, 3, 32, 32)).modules():
        for kind in PLACES:
            if isinstance(module, kind):
                PLAIN_CLASS[type(module)] = kind
    return randomize(model)


def answers(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    out = model(x)
    if not training:
        return [out]
    return [out, *torch.autograd.grad(out.square().sum(), x), *[buffer.clone() for buffer in model.buffers()]]


def check(network: nn.Module, make: Callable, training: bool, way: str, place: str, kind: type) -> None:
    x = torch.randn(2, 3, 32, 32, requires_grad=training)
    plain = copy.deepcopy(network).train(training).requires_grad_(training)
    made = make(copy.deepcopy(plain), x)
    with torch.set_grad_enabled(training):
        for model in (plain, made):
            answers(model, x, training)  # so that everything that is kept has been made
        found = []
        for model in (plain, made):
            root = model.module if isinstance(model, fused_resnet.frozen.FrozenModel) else model
            undo = WAYS[kind][way](root.get_submodule(place))
            try:
                found.append([tensor.detach().clone() for tensor in answers(model, x, training)])
            except Exception as error:  # what PyTorch refuses, we refuse
                found.append([type(error)])
            if callable(undo):
                undo()
    expected, actual = found
    if isinstance(expected[0], type):
        assert actual == expected
        return
    for theirs, ours in zip(expected, actual, strict=True):
        scale = theirs.double().abs().max().item() + 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4 * scale)


@pytest.mark.parametrize(
    ("way", "place", "kind"), CASES, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_frozen(network: nn.Module, way: str, place: str, kind: type):
    check(network, lambda model, x: freeze(model, x), False, way, place, kind)


@pytest.mark.parametrize(
    ("way", "place", "kind"), CASES, ids=lambda value: value if isinstance(value, str) else value.__name__
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_fused(network: nn.Module, training: bool, way: str, place: str, kind: type):
    check(network, lambda model, x: fuse(model), training, way, place, kind)
