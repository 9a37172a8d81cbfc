"""Generated modules, ours beside PyTorch's own with the same parameters and buffers, and calls of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet

from fused_resnet import BasicBlock, BatchNormAct2d, Bottleneck, ConvBNAct2d, fuse
from tests.fuzz import settings as generated
from tests.fuzz.call import Call, Tensors
from tests.fuzz.functions import MIXED
from tests.fuzz.tensors import DTYPES, SMALL, Draw, image, one_in, tensor

Make = Callable[[], nn.Module]


def installed(make: Make, tensors: Tensors, train: bool) -> nn.Module:
    """A new module with these parameters and buffers, by their names."""
    module = make().train(train)
    for name, value in tensors.items():
        owner, _, of = name.rpartition(".")
        part = module.get_submodule(owner)
        if of in part._buffers:
            part._buffers[of] = value
        elif of in part._parameters and value is not None:
            del part._parameters[of]
            setattr(part, of, value)  # as functional_call and FSDP do
            part._parameters[of] = part.__dict__.pop(of)
    return module


def state(draw: Draw, make: Make, dtype: torch.dtype) -> tuple[Tensors, tuple[str, ...], tuple[str, ...]]:
    """Tensors for a module's parameters and buffers, and the names of either."""
    module, tensors = make(), Tensors()
    half = dtype in generated.HALF and draw(st.booleans())
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(draw(st.sampled_from([0, 3])))
    for name, old in [*module.named_parameters(), *module.named_buffers()]:
        if not old.is_floating_point():
            tensors[name] = old.clone()
            continue
        of = torch.float32 if half and old.dim() == 1 else dtype
        kind = "positive" if name.endswith("running_var") else "weights"
        odd = 10 if isinstance(old, nn.Parameter) else 0
        made = tensor(draw, old.shape, of, kind, odd)
        if old.dim() == 4 and made.is_contiguous() and draw(st.booleans()):
            made = made.contiguous(memory_format=torch.channels_last)
        tensors[name] = made
    parameters = tuple(name for name, _ in module.named_parameters())
    return tensors, parameters, tuple(name for name, _ in module.named_buffers())


def norm_arguments(draw: Draw) -> dict[str, Any]:
    return {
        "eps": draw(st.sampled_from([1e-5, 1e-5, 1e-3, 0.5, 0.0])),
        "momentum": draw(st.sampled_from([0.1, 0.1, None, 0.0, 1.0, 0.37])),
        "affine": not one_in(draw, 5),
        "track_running_stats": not one_in(draw, 5),
    }


def vary(draw: Draw) -> tuple[dict[str, Any], Callable[[nn.Module], nn.Module]]:
    """What a user sets on norms of a module: each part may have another mode."""
    settings = norm_arguments(draw) if one_in(draw, 3) else {}
    still = draw(st.integers(0, 3)) if one_in(draw, 4) else None

    def change(module: nn.Module) -> nn.Module:
        norms = [(owner, name) for owner in module.modules() for name, norm in owner.named_children()
                 if isinstance(norm, nn.BatchNorm2d)]  # fmt: skip
        for owner, name in norms if settings else []:
            setattr(owner, name, nn.BatchNorm2d(getattr(owner, name).num_features, **settings))
        if still is not None and norms:
            owner, name = norms[still % len(norms)]
            getattr(owner, name).__dict__["still"] = True
        return module

    return {"norm": settings, "still": still}, change


def in_mode(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if part.__dict__.get("still"):
            part.eval()
    return module


def module_call(
    draw: Draw,
    name: str,
    ours: Make,
    theirs: Make,
    inputs: Tensors,
    settings: dict[str, Any],
    dtype: torch.dtype,
    call: Callable[[nn.Module, Tensors], Tensor] | None = None,
    taps: int = 99,
) -> Call:
    """``ours`` and ``theirs`` have parameters and buffers of the same names."""
    tensors, parameters, buffers = state(draw, theirs, dtype)
    train = draw(st.booleans())
    both = {**inputs, **tensors}
    names = (*inputs, *parameters)
    generated.odd_dtype(draw, both, tuple(inputs))
    generated.misplace(draw, both, names)
    call = call or (lambda module, given: module(*[given[key] for key in inputs]))

    def run(make: Make, given: Tensors) -> Tensor:
        module = in_mode(installed(make, {key: given[key] for key in tensors}, train))
        assert call is not None
        return call(module, given)

    x = next(iter(inputs.values()))
    return Call(
        name,
        lambda given: run(ours, given),
        lambda given: run(theirs, given),
        both,
        written=buffers,
        wanted=generated.wanted(draw, both, names),
        settings={**settings, "train": train},
        surroundings=generated.surroundings(draw, named=False),
        terms=max(1, x.numel() // max(x.shape[1], 1)) if x.dim() == 4 else 1,
        taps=taps,
        extends=MIXED,
    )


@st.composite
def norm_calls(draw: Draw) -> Call:
    shape, dtype = generated.shape(draw), draw(DTYPES)
    arguments = {"num_features": max(shape[1], 1), **norm_arguments(draw)}
    activation = draw(st.sampled_from(["relu", "relu", None]))
    inputs: Tensors = {"x": image(draw, shape, dtype)}
    if one_in(draw, 20) and 0 not in shape:
        inputs["x"] = draw(
            st.sampled_from([inputs["x"][0], inputs["x"][:, :, 0], inputs["x"][:, :1], inputs["x"][None]])
        )
    elif draw(st.booleans()):
        inputs["residual"] = image(draw, shape, draw(DTYPES) if one_in(draw, 8) else dtype)

    def plain(module: nn.Module, given: Tensors) -> Tensor:
        if isinstance(module, BatchNormAct2d):
            return module(*[given[name] for name in inputs])
        out = module(given["x"])
        out = (out + given["residual"]).to(out.dtype) if "residual" in inputs else out
        return out if activation is None else F.relu(out)

    return module_call(
        draw,
        "BatchNormAct2d",
        lambda: BatchNormAct2d(**arguments, activation=activation),
        lambda: nn.BatchNorm2d(**arguments),
        inputs,
        {**arguments, "activation": activation},
        dtype,
        plain,
        taps=1,
    )


class PlainConvBNAct(nn.Module):
    """What ``ConvBNAct2d``'s docstring says it equals."""

    def __init__(self, arguments: dict[str, Any], norm: dict[str, Any], relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(**arguments, bias=False)
        self.bn = nn.BatchNorm2d(arguments["out_channels"], **norm)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.bn(self.conv(x))
        out = out if residual is None else out + residual.to(out.dtype)
        return F.relu(out) if self.relu else out


@st.composite
def conv_calls(draw: Draw) -> Call:
    shape, dtype = generated.shape(draw, draw(SMALL)), draw(DTYPES)
    moves, weight = generated.conv(draw, dtype, shape)
    groups = moves["groups"]
    arguments = {"in_channels": weight.shape[1] * groups or groups, "out_channels": len(weight),
                 "kernel_size": tuple(weight.shape[2:]), **moves}  # fmt: skip
    norm = {"eps": draw(st.sampled_from([1e-5, 0.1])), "momentum": draw(st.sampled_from([0.1, None, 0.5]))}
    activation, varied = draw(st.sampled_from(["relu", "relu", None])), vary(draw)
    inputs: Tensors = {"x": image(draw, shape, dtype)}
    if draw(st.booleans()):
        with torch.no_grad():
            size = nn.functional.conv2d(torch.zeros(1, 1, *shape[2:]), torch.zeros(1, 1, *weight.shape[2:]), None,
                                        moves["stride"], moves["padding"], moves["dilation"]).shape[2:] \
                if min(fits(shape, weight, moves)) > 0 and min(shape[2:]) > 0 else (1, 1)  # fmt: skip
        inputs["residual"] = image(draw, (shape[0], len(weight), *size), draw(DTYPES) if one_in(draw, 8) else dtype)
    return module_call(
        draw,
        "ConvBNAct2d",
        lambda: varied[1](ConvBNAct2d(**arguments, **norm, activation=activation)),
        lambda: varied[1](PlainConvBNAct(arguments, norm, activation is not None)),
        inputs,
        {**arguments, **norm, "activation": activation, **varied[0]},
        dtype,
        taps=max(1, weight[:1].numel()),
    )


def fits(shape: tuple[int, ...], weight: Tensor, moves: dict[str, Any]) -> list[int]:
    return [shape[i + 2] + 2 * moves["padding"][i] - moves["dilation"][i] * (weight.shape[i + 2] - 1) for i in (0, 1)]


@st.composite
def block_calls(draw: Draw) -> Call:
    kind = draw(st.sampled_from(["BasicBlock", "Bottleneck"]))
    ours, theirs = {"BasicBlock": (BasicBlock, resnet.BasicBlock), "Bottleneck": (Bottleneck, resnet.Bottleneck)}[kind]
    dtype, planes, stride = draw(DTYPES), draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 1, 2]))
    ends = planes * theirs.expansion
    inplanes = ends if stride == 1 and draw(st.booleans()) else draw(SMALL)
    inplanes = inplanes if stride == 1 else inplanes + generated.FEWEST_CHANNELS
    shape = generated.shape(draw, inplanes if not one_in(draw, 12) else inplanes + 1)
    varied = vary(draw)
    fused, memory = draw(st.booleans()), draw(st.sampled_from(["default", "efficient"]))
    wide = kind == "Bottleneck" and one_in(draw, 3)
    more = {"groups": 2, "base_width": 64} if wide else {}

    def make(cls: type[nn.Module]) -> nn.Module:
        downsample = None
        if stride != 1 or inplanes != ends:
            downsample = nn.Sequential(nn.Conv2d(inplanes, ends, 1, stride, bias=False), nn.BatchNorm2d(ends))
        return varied[1](cls(inplanes, planes, stride, downsample, **more))

    return module_call(
        draw,
        kind,
        lambda: fuse(make(theirs), memory=memory) if fused else make(ours),
        lambda: make(theirs),
        {"x": image(draw, shape, dtype)},
        {
            "inplanes": inplanes,
            "planes": planes,
            "stride": stride,
            **more,
            "fuse": fused,
            "memory": memory,
            **varied[0],
        },
        dtype,
    )


CALLS = st.one_of(norm_calls(), conv_calls(), block_calls())
