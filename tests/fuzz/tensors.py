"""Generated tensors: values, dtypes, and the odd ways in which they may lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

Draw = Callable[[st.SearchStrategy[Any]], Any]
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33])
SMALL = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11])
MOST = 8192
"""Elements of an image."""
DTYPES = st.sampled_from([torch.float32] * 5 + [torch.bfloat16, torch.float16, torch.float64])


class Named(Tensor):
    """A subclass that changes nothing but the type."""


def one_in(draw: Draw, count: int) -> bool:
    return draw(st.integers(0, count - 1)) == count - 1  # 0, which is the simplest, is False


def values(draw: Draw, shape: Sequence[int], kind: str = "any") -> Tensor:
    """float64 of this shape. ``kind``: "any" (some with a mean that is large beside their deviation, constant, or
    not finite), "weights" (all of order one) or "positive"."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    normal = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "positive":
        return normal.abs() + 0.25
    if kind == "weights":
        return normal * 0.5 + 0.1
    of = draw(st.sampled_from(["normal"] * 12 + ["large mean", "small", "large", "constant", "zero", "inf", "nan"]))
    if of in ("inf", "nan") and normal.numel():
        at = torch.randint(normal.numel(), (), generator=generator)
        normal.flatten()[at] = float(of)
    return {
        "large mean": normal + 100,
        "small": normal * 1e-3,
        "large": normal * 30,
        "constant": torch.full_like(normal, 0.75),
        "zero": torch.zeros_like(normal),
    }.get(of, normal + 0.25)


def _offset(tensor: Tensor) -> Tensor:
    """One element into a memory: aligned for its dtype alone."""
    memory = torch.cat([tensor.new_ones(1), tensor.reshape(-1)])
    return memory[1:].view(tensor.shape)


def _cropped(tensor: Tensor) -> Tensor:
    larger = torch.nn.functional.pad(tensor, (1, 2, 2, 1), value=7.0)
    if tensor.shape[0] % 2:
        larger = larger.contiguous(memory_format=torch.channels_last)
    return larger[:, :, 2:-1, 1:-2]


def _some_channels(tensor: Tensor) -> Tensor:
    """Of a channels_last memory with more channels."""
    more = torch.cat([tensor, tensor + 1], 1).contiguous(memory_format=torch.channels_last)
    return more[:, : tensor.shape[1]]


def _conjugate(tensor: Tensor) -> Tensor:
    """The imaginary part of a lazily conjugated number: negated, and every second element of its memory."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return torch._neg_view(-tensor)
    return torch.complex(torch.ones_like(tensor), -tensor).conj().imag


def _odd_strides(tensor: Tensor) -> Tensor:
    """Of sizes 1, whose strides mean nothing."""
    stride = [3 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, stride)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "offset": _offset,
    "negated": lambda t: torch._neg_view(-t),
    "conjugate": _conjugate,
    "expanded": lambda t: t[:1].expand(t.shape) if len(t) else t,
    "odd strides": _odd_strides,
}
IMAGE_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    **VIEWS,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels_last, offset": lambda t: _offset(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sides transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "cropped": _cropped,
    "some channels": _some_channels,
}
WRAPPERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "subclass": lambda t: t.as_subclass(Named),
    "TwoTensor": lambda t: TwoTensor(t.resolve_neg(), t.resolve_neg()),  # which PyTorch takes for what it is not
    "meta": lambda t: t.to("meta"),
}


def wrap(how: str, tensor: Tensor) -> Tensor:
    if how == "inference":
        with torch.inference_mode():
            return tensor.clone()
    return WRAPPERS[how](tensor)


def tensor(
    draw: Draw,
    shape: Sequence[int],
    dtype: torch.dtype,
    kind: str = "any",
    odd: int = 3,
) -> Tensor:
    """A tensor of this shape and dtype; one in ``odd`` does not lie contiguously."""
    made = values(draw, shape, kind).to(dtype)
    if not made.dtype.is_floating_point or (odd > 0 and not one_in(draw, odd)):
        return made
    views = IMAGE_VIEWS if made.dim() == 4 else VIEWS
    return views[draw(st.sampled_from(sorted(views)))](made) if odd else made


def image(draw: Draw, shape: Sequence[int], dtype: torch.dtype, kind: str = "any") -> Tensor:
    """As `tensor`; half of those that do lie in order are channels_last."""
    made = tensor(draw, shape, dtype, kind)
    if made.is_contiguous() and not made.is_neg() and draw(st.booleans()):
        return made.contiguous(memory_format=torch.channels_last)
    return made


def described(value: Any) -> str:
    """What a tensor is, in a few words."""
    if not isinstance(value, Tensor):
        return repr(value)
    if value.layout != torch.strided:
        return f"{value.layout} {value.dtype}{list(value.shape)}"
    kind = "" if type(value) is Tensor else f"{type(value).__name__} "
    place = "" if value.device.type == "cpu" else f" on {value.device}"
    neg = " negated" if not isinstance(value, TwoTensor) and value.is_neg() else ""
    offset = f" from {value.storage_offset()}" if value.storage_offset() else ""
    inference = " inference" if value.is_inference() else ""
    numbers = str(value.dtype).removeprefix("torch.")
    return f"{kind}{numbers}{list(value.shape)} by {list(value.stride())}{offset}{neg}{inference}{place}"
