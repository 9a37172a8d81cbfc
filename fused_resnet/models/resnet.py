"""Residual networks: torchvision's architectures, arguments, initial weights and state_dict names, on fused passes.

He et al. 2015 (https://arxiv.org/abs/1512.03385). Where plain layers would have to learn a mapping H(x), those of a
residual block learn only how it differs from its input, F(x) := H(x) - x, and a shortcut adds x back:
``out = relu(F(x) + x)``. A block that has nothing to add needs only F(x) = 0, which is why depth stops hurting.

        stem            stage 1      stage 2      stage 3      stage 4      head
    7x7 conv, /2       depth[0]     depth[1]     depth[2]     depth[3]     average pool
    3x3 max pool, /2   blocks       blocks, /2   blocks, /2   blocks, /2   fully connected
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, ParamSpec, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fused_resnet.models.weights import (
    WeightsArgument,
    read_state_dict,
    resolve_weights,
    with_num_classes,
    with_older_arguments,
)
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bottleneck import Bottleneck
from fused_resnet.modules.drop_in import DropIn
from fused_resnet.modules.plain import frozen_forward
from fused_resnet.modules.site import Body, Site
from fused_resnet.modules.stem import conv_norm_act_pool

P = ParamSpec("P")
STEM_CHANNELS = 64
STAGE_PLANES = (64, 128, 256, 512)
STAGE_STRIDES = (1, 2, 2, 2)


class ResNet(DropIn):
    """A residual network for images; drop-in for ``torchvision.models.ResNet``.

    The input is (N, 3, H, W), any floating dtype and either memory format (channels_last is the fast one); the output
    is (N, num_classes), the logits. The same seed gives the same initial weights as torchvision, bit for bit.

    Args:
        block: ``BasicBlock`` or ``Bottleneck``, or a class with their constructor and ``expansion``.
        layers: the number of blocks in each of the four stages.
        num_classes: the number of logits.
        zero_init_residual: start the last norm of every block at weight 0, so that F(x) = 0 and the network starts
            as its shortcuts (Goyal et al. 2017, https://arxiv.org/abs/1706.02677).
        groups: groups of each bottleneck's 3x3 convolution (ResNeXt's cardinality).
        width_per_group: channels of one such group in the first stage.
        replace_stride_with_dilation: for stages 2, 3 and 4, whether to keep the resolution and dilate instead.
        norm_layer: called with a number of channels, gives a norm; ``nn.BatchNorm2d`` if None. Norms other than plain
            batch normalisation work, unfused.

    Raises:
        ValueError: layers has not four entries, or replace_stride_with_dilation has not three; or ``BasicBlock`` was
            asked for groups or widths that only ``Bottleneck`` has.
        NotImplementedError: ``BasicBlock`` was asked to dilate.
    """

    twin: ClassVar = "fused_resnet.models.torchvision:ResNet"
    sites: ClassVar = (Site("conv1", "bn1", "relu", pool="maxpool"),)
    body: ClassVar = Body(("layer1", "layer2", "layer3", "layer4"), "avgpool", "fc")

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        norm_layer = nn.BatchNorm2d if norm_layer is None else norm_layer
        stage_dilates = (False, *_three_flags(replace_stride_with_dilation))
        if len(layers) != len(STAGE_PLANES):
            raise ValueError(f"layers must give the number of blocks of 4 stages; got {layers}")

        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        stages = []
        inplanes, dilation = STEM_CHANNELS, 1
        for planes, depth, stride, dilate in zip(STAGE_PLANES, layers, STAGE_STRIDES, stage_dilates, strict=True):
            first_dilation = dilation
            if dilate:
                stride, dilation = 1, dilation * stride
            shortcut = _projection(block, inplanes, planes, stride, norm_layer)
            blocks = [block(inplanes, planes, stride, shortcut, groups, width_per_group, first_dilation, norm_layer)]
            inplanes = planes * block.expansion
            for _ in range(1, depth):
                blocks.append(block(inplanes, planes, 1, None, groups, width_per_group, dilation, norm_layer))
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)

        self.inplanes, self.dilation = inplanes, dilation
        self.groups, self.base_width = groups, width_per_group
        initialize(self)
        if zero_init_residual:
            zero_last_norms(stages)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:  # which torchvision's users replace
        if torch.jit.is_scripting():  # torch.jit.script compiles this branch alone
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        else:
            out = frozen_forward(self, x)
            if out is not None:
                return out
            x = conv_norm_act_pool(self.conv1, self.bn1, self.relu, self.maxpool, x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        return self.fc(torch.flatten(x, 1))


def initialize(model: nn.Module) -> None:
    """Draws every convolution from He's normal distribution over its outputs; sets every norm to the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def zero_last_norms(stages: Sequence[nn.Sequential]) -> None:
    """Sets the weight of the last norm of every residual block to zero, where it has one: F(x) = 0."""
    for stage in stages:
        for block in stage:
            last_norm = getattr(block, "bn3", getattr(block, "bn2", None))
            weight = getattr(last_norm, "weight", None)
            if weight is not None:
                nn.init.zeros_(weight)


def _three_flags(replace_stride_with_dilation: Sequence[bool] | None) -> Sequence[bool]:
    if replace_stride_with_dilation is None:
        return (False, False, False)
    if len(replace_stride_with_dilation) != 3:
        raise ValueError(
            "replace_stride_with_dilation must be None or 3 booleans, for stages 2, 3 and 4; "
            f"got {replace_stride_with_dilation}"
        )
    return replace_stride_with_dilation


def _projection(
    block: type[BasicBlock] | type[Bottleneck],
    inplanes: int,
    planes: int,
    stride: int,
    norm_layer: Callable[..., nn.Module],
) -> nn.Module | None:
    """The shortcut of a stage's first block (the paper's option B): None where F(x) and x have one shape already."""
    outplanes = planes * block.expansion
    if stride == 1 and inplanes == outplanes:
        return None
    return nn.Sequential(
        nn.Conv2d(inplanes, outplanes, kernel_size=1, stride=stride, bias=False),
        norm_layer(outplanes),
    )


class ResNetOptions(TypedDict, total=False):
    """Arguments of `ResNet` that every builder takes as well, by name."""

    num_classes: int
    zero_init_residual: bool
    groups: int
    width_per_group: int
    replace_stride_with_dilation: Sequence[bool] | None
    norm_layer: Callable[..., nn.Module] | None


WHAT_A_BUILDER_TAKES = """

The model takes images (N, 3, H, W) of any floating dtype, in either memory format (channels_last is the fast one), and
gives logits (N, num_classes). Names in its state_dict are torchvision's.

Args:
    weights: None for He's random weights; torchvision's, by member or name ("IMAGENET1K_V2", "DEFAULT"); the path of a
        checkpoint, which is read without running code from it; or a state_dict.
    progress: show a progress bar while torchvision downloads weights.
    num_classes: the number of logits. torchvision's weights take the number that they were trained for.
    zero_init_residual: start the last norm of every block at weight 0, so that each block starts as its shortcut.
    groups, width_per_group: groups of each bottleneck's 3x3 convolution, and channels of one group in the first stage.
    replace_stride_with_dilation: three booleans for stages 2, 3 and 4: keep the resolution and dilate instead.
    norm_layer: called with a number of channels, gives a norm; ``nn.BatchNorm2d`` if None.

Raises:
    ValueError: weights are of another architecture, or num_classes not theirs; or an argument contradicts the
        architecture.
    FileNotFoundError, ImportError: there is no such checkpoint; torchvision's weights without torchvision.
"""
FIXED_BY_ARCHITECTURE = {
    "resnext50_32x4d": {"groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"groups": 32, "width_per_group": 8},
    "resnext101_64x4d": {"groups": 64, "width_per_group": 4},
    "wide_resnet50_2": {"width_per_group": 128},
    "wide_resnet101_2": {"width_per_group": 128},
}


class _Signature(inspect.Signature):
    """A builder's, which says torchvision's enum of weights once torchvision is imported: where that looks for it."""

    architecture = ""

    @property
    def parameters(self) -> MappingProxyType[str, inspect.Parameter]:
        parameters = super().parameters
        theirs = sys.modules.get("torchvision.models.resnet")
        if theirs is None:
            return parameters
        enum = inspect.signature(getattr(theirs, self.architecture)).parameters["weights"].annotation
        weights = parameters["weights"].replace(annotation=enum | WeightsArgument)
        return MappingProxyType({**parameters, "weights": weights})


def _says_what_it_takes(builder: Callable[P, ResNet]) -> Callable[P, ResNet]:
    """The builder, with every argument and its default in its signature and docstring, for ``help``; it takes what
    torchvision's took in older days as well."""

    @functools.wraps(builder)
    def build(*positional: Any, **arguments: Any) -> ResNet:
        if positional or "pretrained" in arguments:
            arguments = with_older_arguments(builder.__name__, positional, arguments)
        return builder(**arguments)  # type: ignore[call-arg]

    own = [one for one in inspect.signature(builder).parameters.values() if one.kind is inspect.Parameter.KEYWORD_ONLY]
    fixed = FIXED_BY_ARCHITECTURE.get(builder.__name__, {})
    options = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=fixed.get(name, parameter.default))
        for name, parameter in inspect.signature(ResNet).parameters.items()
        if name in ResNetOptions.__annotations__
    ]
    signature = _Signature([*own, *options], return_annotation=ResNet)
    signature.architecture = builder.__name__
    build.__signature__ = signature  # type: ignore[attr-defined]
    build.__doc__ = f"{inspect.getdoc(builder)}{WHAT_A_BUILDER_TAKES}"
    return build


def _resnet(
    architecture: str,
    block: type[BasicBlock] | type[Bottleneck],
    layers: Sequence[int],
    weights: WeightsArgument,
    progress: bool,
    options: ResNetOptions,
) -> ResNet:
    source = resolve_weights(architecture, weights)
    arguments = with_num_classes(source, {**options})
    for name, value in FIXED_BY_ARCHITECTURE.get(architecture, {}).items():
        if arguments.setdefault(name, value) != value:
            raise ValueError(f"{name} must be {value} for this architecture; got {arguments[name]}")
    model = ResNet(block, layers, **arguments)
    if source is not None:
        model.load_state_dict(read_state_dict(source, progress))
    return model


@_says_what_it_takes
def resnet18(*, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-18: two convolutions a block. 11.7 million parameters. https://arxiv.org/abs/1512.03385"""
    return _resnet("resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, options)


@_says_what_it_takes
def resnet34(*, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-34: two convolutions a block. 21.8 million parameters. https://arxiv.org/abs/1512.03385"""
    return _resnet("resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, options)


@_says_what_it_takes
def resnet50(*, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-50 v1.5. 25.6 million parameters. https://arxiv.org/abs/1512.03385

    v1.5: the stride of a bottleneck is in its 3x3 convolution (https://arxiv.org/abs/1706.02677), not in the paper's
    first 1x1."""
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, options)


@_says_what_it_takes
def resnet101(*, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-101 v1.5. 44.5 million parameters. https://arxiv.org/abs/1512.03385"""
    return _resnet("resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, options)


@_says_what_it_takes
def resnet152(*, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]) -> ResNet:
    """ResNet-152 v1.5. 60.2 million parameters. https://arxiv.org/abs/1512.03385"""
    return _resnet("resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, options)


@_says_what_it_takes
def resnext50_32x4d(
    *, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]
) -> ResNet:
    """ResNeXt-50: 32 groups of 4 channels in each 3x3. 25.0 million parameters. https://arxiv.org/abs/1611.05431"""
    return _resnet("resnext50_32x4d", Bottleneck, (3, 4, 6, 3), weights, progress, options)


@_says_what_it_takes
def resnext101_32x8d(
    *, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]
) -> ResNet:
    """ResNeXt-101: 32 groups of 8 channels in each 3x3. 88.8 million parameters. https://arxiv.org/abs/1611.05431"""
    return _resnet("resnext101_32x8d", Bottleneck, (3, 4, 23, 3), weights, progress, options)


@_says_what_it_takes
def resnext101_64x4d(
    *, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]
) -> ResNet:
    """ResNeXt-101: 64 groups of 4 channels in each 3x3. 83.5 million parameters. https://arxiv.org/abs/1611.05431"""
    return _resnet("resnext101_64x4d", Bottleneck, (3, 4, 23, 3), weights, progress, options)


@_says_what_it_takes
def wide_resnet50_2(
    *, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]
) -> ResNet:
    """ResNet-50 with twice the channels in each 3x3. 68.9 million parameters. https://arxiv.org/abs/1605.07146"""
    return _resnet("wide_resnet50_2", Bottleneck, (3, 4, 6, 3), weights, progress, options)


@_says_what_it_takes
def wide_resnet101_2(
    *, weights: WeightsArgument = None, progress: bool = True, **options: Unpack[ResNetOptions]
) -> ResNet:
    """ResNet-101 with twice the channels in each 3x3. 126.9 million parameters. https://arxiv.org/abs/1605.07146"""
    return _resnet("wide_resnet101_2", Bottleneck, (3, 4, 23, 3), weights, progress, options)
