"""Generated settings: of norms, convolutions and what is set around a call."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from tests.fuzz.call import Surroundings
from tests.fuzz.tensors import DTYPES, MOST, SIZES, SMALL, Draw, Tensor, image, one_in, tensor, values, wrap

FEWEST_CHANNELS = 16
"""Of a convolution of one pixel with a stride: oneDNN's gradient of its weight writes past the end of its memory where
there are fewer (``ops/reference/conv.py``), in plain PyTorch too."""
HALF = (torch.bfloat16, torch.float16)


def surroundings(draw: Draw, named: bool = True) -> Surroundings:
    """``named``: whether a backend or a level may be asked for."""
    simple = Surroundings(threads=draw(st.sampled_from([1, 1, 2])), fewest=draw(st.sampled_from([0, 0, 0, 1 << 15])))
    if not one_in(draw, 3):
        return simple
    return Surroundings(
        grad=draw(st.sampled_from(["enabled", "enabled", "no_grad", "inference_mode"])),
        autocast=draw(st.sampled_from([None, None, torch.bfloat16, torch.float16])),
        default_dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16])),
        backend=draw(st.sampled_from(["auto", "auto", "native", "reference", "separate"])) if named else "auto",
        level=draw(st.sampled_from([None, None, 0, 1, 2, 3])) if named else None,
        threads=simple.threads,
        fewest=simple.fewest,
    )


def shape(draw: Draw, channels: int | None = None) -> tuple[int, int, int, int]:
    """(N, C, H, W); one in 12 of size 0 somewhere."""
    sizes = [draw(SMALL), draw(SIZES) if channels is None else channels, draw(SIZES), draw(SIZES)]
    sizes[0] = min(sizes[0], 5)
    while math.prod(sizes) > MOST:
        largest = max((0, 2, 3), key=lambda i: sizes[i])
        sizes[largest] = -(-sizes[largest] // 2)
    if one_in(draw, 12):
        sizes[draw(st.sampled_from([0, 2, 3] if channels else [0, 1, 2, 3]))] = 0
    return (sizes[0], sizes[1], sizes[2], sizes[3])


def vectors(draw: Draw, channels: int, dtype: torch.dtype, tracked: bool | None = None) -> dict[str, Tensor | None]:
    """weight, bias and running statistics, each perhaps None; of a half-precision x often float32, as under autocast;
    rarely of any other dtype."""
    if dtype in HALF and draw(st.booleans()):
        dtype = torch.float32
    mixed = one_in(draw, 10)
    odd = 12 if channels else 0
    found: dict[str, Tensor | None] = {}
    for name, kind in (("weight", "weights"), ("bias", "weights"), ("running_mean", "weights"),
                       ("running_var", "positive")):  # fmt: skip
        of = draw(DTYPES) if mixed else dtype
        given = not one_in(draw, 6) if "running" not in name else tracked
        if given is None:
            given = found["running_mean"] is not None if name == "running_var" else not one_in(draw, 6)
        found[name] = tensor(draw, (channels,), of, kind, odd if "running" not in name else 0) if given else None
    return found


def norm_settings(draw: Draw) -> dict[str, Any]:
    return {
        "training": draw(st.booleans()),
        "momentum": draw(st.sampled_from([0.1, 0.1, 0.0, 1.0, 0.37])),
        "eps": draw(st.sampled_from([1e-5, 1e-5, 1e-3, 0.5, 0.0])),
    }


def conv(draw: Draw, dtype: torch.dtype, images: tuple[int, ...]) -> tuple[dict[str, Any], Tensor]:
    """Settings of a convolution and its weight for images of this shape; fits, but for one in 12."""
    channels = images[1]
    groups = draw(st.sampled_from([1, 1, 1, *[g for g in (2, 4, 8, channels) if g and channels % g == 0]])) or 1
    kernel = draw(st.sampled_from([(3, 3)] * 4 + [(1, 1)] * 3 + [(7, 7), (3, 1), (2, 5), (1, 3)]))
    settings = {
        "stride": draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (1, 3)])),
        "padding": draw(st.sampled_from([(k // 2 for k in kernel), (0, 0), (1, 1), (2, 0), (3, 3)])),
        "dilation": draw(st.sampled_from([(1, 1)] * 4 + [(2, 2), (1, 2)])),
        "groups": groups,
    }
    settings["padding"] = tuple(settings["padding"])
    if kernel == (1, 1) and channels // groups < FEWEST_CHANNELS:
        settings["stride"] = (1, 1)
    if groups > 1:  # with a dilation and bfloat16, oneDNN's gradient of the weight is what lay in its memory before
        settings["dilation"] = (1, 1)
    per_group = (
        draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17])) if groups == 1 else draw(st.sampled_from([1, 2, 4, 8]))
    )
    filters, inner = per_group * groups, channels // groups
    if one_in(draw, 12):
        inner += draw(st.sampled_from([-1, 1, 2]))
    weight = values(draw, (filters, max(inner, 0), *kernel), "weights").to(dtype)
    if draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif one_in(draw, 8) and weight.numel():
        weight = tensor(draw, weight.shape, dtype, "weights", odd=1)
    return settings, weight


def misplace(draw: Draw, tensors: dict[str, Any], names: tuple[str, ...]) -> None:
    """One time in six, something odd about one of the tensors: its type, device, or that it is an inference tensor;
    rarely all of them on the meta device."""
    given = [name for name in names if isinstance(tensors.get(name), Tensor)]
    if not given or not one_in(draw, 6):
        return
    how = draw(
        st.sampled_from(["Parameter", "subclass", "TwoTensor", "inference", "meta", "all meta", "all TwoTensor"])
    )
    if how.startswith("all "):
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                tensors[name] = wrap(how.removeprefix("all "), value)
        return
    name = draw(st.sampled_from(given))
    if how != "inference" or "bias" not in name:  # which only ours keeps for backward, where PyTorch refuses it then
        tensors[name] = wrap(how, tensors[name])


def odd_dtype(draw: Draw, tensors: dict[str, Any], names: tuple[str, ...]) -> None:
    """One time in 25, one of the tensors is no floating-point number."""
    given = [name for name in names if isinstance(tensors.get(name), Tensor)]
    if given and one_in(draw, 25):
        name = draw(st.sampled_from(given))
        dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]))
        tensors[name] = tensors[name].to(dtype)


def wanted(draw: Draw, tensors: dict[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that require a gradient: often all, else some."""
    able = [name for name in names if isinstance(tensors.get(name), Tensor) and tensors[name].is_floating_point()]
    able = [name for name in able if not tensors[name].is_inference()]
    if not one_in(draw, 3):
        return tuple(able)
    return tuple(name for name in able if draw(st.booleans()))


__all__ = [
    "conv",
    "image",
    "misplace",
    "norm_settings",
    "odd_dtype",
    "shape",
    "surroundings",
    "vectors",
    "wanted",
]
