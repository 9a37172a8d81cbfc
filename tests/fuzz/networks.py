"""Generated networks: torchvision's, small, fused or frozen, beside the same as it was."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet

from fused_resnet import freeze, fuse, unfuse
from tests.fuzz import settings as generated
from tests.fuzz.call import Call, Surroundings, Tensors
from tests.fuzz.functions import MIXED
from tests.fuzz.modules import in_mode, installed, state, vary
from tests.fuzz.tensors import Draw, image, one_in

WIDTHS = st.sampled_from([16, 17, 24, 32])
FROZEN_DTYPES = st.sampled_from([torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64])


def network(block: type[nn.Module], width: int, classes: int, blocks: tuple[int, int]) -> resnet.ResNet:
    """torchvision's ResNet of two stages, ``width`` and twice as many channels; the other two are empty."""
    with torch.device("meta"):
        made = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    made.conv1, made.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    made.inplanes = width
    made.layer2, made.layer3, made.layer4 = nn.Sequential(), nn.Sequential(), nn.Sequential()
    made.layer1 = made._make_layer(block, width // block.expansion, blocks[0])
    if blocks[1]:
        made.layer2 = made._make_layer(block, 2 * width // block.expansion, blocks[1], stride=2)
    made.fc = nn.Linear(made.inplanes, classes)
    return made


def architecture(draw: Draw) -> dict[str, Any]:
    block = draw(st.sampled_from([resnet.BasicBlock, resnet.BasicBlock, resnet.Bottleneck]))
    width = 4 * draw(st.sampled_from([4, 5, 8])) if block is resnet.Bottleneck else draw(WIDTHS)
    return {"block": block, "width": width, "classes": draw(st.sampled_from([1, 5, 10])),
            "blocks": draw(st.sampled_from([(1, 1), (2, 0), (1, 2), (1, 0)]))}  # fmt: skip


def images(draw: Draw, dtype: torch.dtype) -> Tensor:
    size = [draw(st.sampled_from([1, 8, 17, 21, 32])) for _ in range(2)]
    count = 0 if one_in(draw, 15) else draw(st.integers(1, 3))
    return image(draw, (count, 3, *size), dtype, "weights" if one_in(draw, 3) else "any")


@st.composite
def fused_calls(draw: Draw) -> Call:
    settings, varied = architecture(draw), vary(draw)
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.bfloat16, torch.float64]))
    memory, back = draw(st.sampled_from(["default", "efficient"])), one_in(draw, 10)
    tensors, parameters, buffers = state(draw, lambda: varied[1](network(**settings)), dtype)
    train, x = draw(st.booleans()), images(draw, dtype)
    both: Tensors = {"x": x, **tensors}
    names = ("x", *parameters)
    generated.odd_dtype(draw, both, ("x",))
    generated.misplace(draw, both, ("x",))

    def run(given: Tensors, ours: bool) -> Tensor:
        def make() -> nn.Module:
            made = fuse(varied[1](network(**settings)), memory=memory) if ours else varied[1](network(**settings))
            return unfuse(made) if ours and back else made

        own = {name: given[name] for name in tensors}
        if (
            not ours or back
        ):  # for a channels_last x, PyTorch's backward reads a norm's weight as if it lay contiguously
            own |= {name: own[name].contiguous() for name in parameters if own[name].dim() == 1}
        return in_mode(installed(make, own, train))(given["x"])

    return Call(
        "fuse",
        lambda given: run(given, True),
        lambda given: run(given, False),
        both,
        written=buffers,
        wanted=generated.wanted(draw, both, names),
        settings={**settings, "train": train, "memory": memory, "unfuse": back, **varied[0]},
        surroundings=generated.surroundings(draw, named=False),
        terms=max(1, x.numel() // 3),
        taps=300,
        extends=MIXED,
    )


@st.composite
def frozen_calls(draw: Draw) -> Call:
    settings, varied = architecture(draw), vary(draw)
    tensors, parameters, buffers = state(draw, lambda: varied[1](network(**settings)), torch.float32)
    dtype, x, example = draw(FROZEN_DTYPES), images(draw, torch.float32), images(draw, torch.float32)
    written = draw(st.sampled_from([None, None, None, *parameters, *buffers]))
    example = torch.zeros(1, 3, 33, 32) if 0 in example.shape or not example.isfinite().all() else example

    def run(given: Tensors, ours: bool) -> Tensor:
        own = {name: given[name].detach().clone() for name in tensors}
        own |= {name: nn.Parameter(own[name]) for name in parameters}
        made = installed(lambda: varied[1](network(**settings)), own, False)
        wide = own["conv1.weight"].dtype
        if ours:
            made = freeze(made, example, dtype=dtype)
            made(given["x"])
        elif wide != torch.float64:
            made = made.to(dtype)
        if written is not None:
            root = made.module if ours else made
            with torch.no_grad():
                target = root.get_parameter(written) if written in parameters else root.get_buffer(written)
                target.add_(1)
        return made(given["x"] if ours or wide == torch.float64 else given["x"].to(dtype))

    return Call(
        "freeze",
        lambda given: run(given, True),
        lambda given: run(given, False),
        {"x": x, **tensors},
        settings={**settings, "dtype": dtype, "written": written, "example": tuple(example.shape), **varied[0]},
        surroundings=Surroundings(
            grad=draw(st.sampled_from(["no_grad", "no_grad", "inference_mode"])), threads=draw(st.sampled_from([1, 2]))
        ),
        taps=300,
    )


CALLS = st.one_of(fused_calls(), frozen_calls())
