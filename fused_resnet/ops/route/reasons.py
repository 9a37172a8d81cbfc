"""What each backend cannot do and why, as lists of reasons; an empty list means that it can."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_resnet.arguments import ConvSettings, Norm, PoolSettings
from fused_resnet.ops.layout import conv_memory_format, is_channels_last_once_dense
from fused_resnet.ops.reference import mask_shape
from fused_resnet.ops.route.packing import argument_names

MODULES = {
    "cuda": "fused_resnet.ops.backends.cuda",
    "triton": "fused_resnet.kernels",
    "native": "fused_resnet.ops.backends.native",
    "separate": "fused_resnet.ops.separate",
    "reference": "fused_resnet.ops.reference",
}
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reasons_against(backend: str, op: str, args: tuple[Any, ...]) -> list[str]:
    """The reasons why ``backend`` cannot run ``op`` on these arguments."""
    return unavailable(backend) or _CHECKS[backend](op, args)


@functools.cache
def unavailable(backend: str) -> list[str]:
    """The reasons why ``backend`` cannot run anything in this process. Asks no GPU anything."""
    if backend == "cuda":
        return _native_unavailable() or module("cuda").why_unavailable()
    if backend == "triton":
        return _triton_unavailable()
    if backend == "native":
        return _native_unavailable()
    return []


@functools.cache
def module(name: str) -> ModuleType:
    """The module of a backend."""
    return importlib.import_module(MODULES[name])


def _triton_unavailable() -> list[str]:
    try:
        kernels = importlib.import_module(MODULES["triton"])
    except ImportError as error:
        return [f"triton cannot be imported ({error})"]
    if kernels.INTERPRETED or torch.cuda.is_available():
        return []
    return ["no CUDA device is usable, and TRITON_INTERPRET=1 was not set before triton was imported"]


def why_not_device(backend: str, device: torch.device) -> list[str]:
    """The reasons why ``backend`` cannot run anything on this device; of a CUDA device, after a first kernel there."""
    if reasons := unavailable(backend):
        return reasons
    if backend == "cuda":
        return module("cuda").why_not_device(device)
    if backend != "triton":
        return []
    interpreted = module("triton").INTERPRETED
    if device.type != ("cpu" if interpreted else "cuda"):
        return [f"x is on {device}; it takes CUDA tensors (CPU tensors under TRITON_INTERPRET=1)"]
    return [] if interpreted else list(_first_triton_kernel_fails(device))


@functools.cache
def _first_triton_kernel_fails(device: torch.device) -> tuple[str, ...]:
    """Triton builds its launcher with a C compiler, which a machine with a GPU need not have."""
    try:
        x, vector = torch.zeros(1, 8, 1, 1, device=device), torch.zeros(8, device=device)
        module("triton").bn_apply(x, Norm(vector, vector), None, True)
    except Exception as error:  # whatever it is, it is the reason
        return (f"a first kernel could not be compiled and launched on {device} ({error})",)
    return ()


def _native_unavailable() -> list[str]:
    try:
        importlib.import_module("fused_resnet._C")
    except ImportError as error:
        return [f"the compiled extension fused_resnet._C is not there ({error})"]
    return []


_PLACE_OF_X = {
    "bn_grad_stats": 1,
    "bn_grad_apply": 1,
    "bn_grad_stats_mask": 1,
    "bn_grad_apply_mask": 1,
    "bn_grad_coefficients": 2,  # a vector
    "bn_pool_grad_stats": 2,
    "bn_pool_grad_apply": 2,
    "conv_grad_input": 4,
    "conv_grad_weight": 3,
}
_VECTORS = ("mean", "invstd", "weight", "bias", "running_mean", "running_var", "sum_dz", "sum_dz_xhat")
_WITH_MASK = ("bn_grad_stats_mask", "bn_grad_apply_mask")
_TRAINING = ("conv_stats", "conv_grad_input", "conv_grad_weight")


def _why_not_cuda(op: str, args: tuple[Any, ...]) -> list[str]:
    backend = module("cuda")
    if not hasattr(backend, op):
        return [f"it has no {op}"]
    x: Tensor = args[_PLACE_OF_X.get(op, 0)]
    reasons = backend.why_not_device(x.device)
    if x.numel() == 0:
        reasons.append("x is empty")
    if op == "stem":
        return reasons + backend.why_not_stem(*args)
    if x.dtype not in FUSED_DTYPES:
        reasons.append(f"x is {x.dtype}; it takes float32, float16 and bfloat16")
    if not is_channels_last_once_dense(x):
        reasons.append("x is not channels_last")
    if op == "conv_bn_act":
        return reasons + _conv_mismatches(op, args, backend.why_not_conv)
    if op == "bn_stats_apply" and not reasons and not backend.fits_on_chip(x):
        reasons.append(f"x, {tuple(x.shape)} {x.dtype}, does not fit in the shared memory of {x.device}")
    return reasons + _mismatches(x, args, _which_are_vectors(op), args[2] if op in _WITH_MASK else None)


def _why_not_triton(op: str, args: tuple[Any, ...]) -> list[str]:
    if not hasattr(module("triton"), op):
        return [f"it has no {op}"]
    x: Tensor = args[_PLACE_OF_X.get(op, 0)]
    reasons = []
    if x.dtype not in FUSED_DTYPES:
        reasons.append(f"x is {x.dtype}; it takes float32, float16 and bfloat16")
    reasons += why_not_device("triton", x.device)
    if x.numel() == 0:
        reasons.append("x is empty")
    if op == "bn_grad_coefficients":
        return reasons + _mismatches(x, args, _which_are_vectors(op))
    if not is_channels_last_once_dense(x):
        reasons.append("x is not channels_last")
    if op == "conv_bn_act" or op in _TRAINING:
        return reasons + _conv_mismatches(op, args, module("triton").why_not_conv)
    if "pool" in op:
        return reasons + _pool_mismatches(op, args)
    return reasons + _mismatches(x, args, _which_are_vectors(op))


def _why_not_native(op: str, args: tuple[Any, ...]) -> list[str]:
    if op == "conv_bn_act":
        return ["it has no single convolution for inference; that is oneDNN's, which the separate backend calls"]
    if op == "bn_grad_coefficients" or "pool" in op:
        return ["it has neither passes over vectors nor pooling"]
    if not hasattr(module("native"), op):
        return [f"it has no {op}"]
    x: Tensor = args[_PLACE_OF_X.get(op, 0)]
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device}; it takes CPU tensors")
    if x.dtype not in FUSED_DTYPES:
        reasons.append(f"x is {x.dtype}; it takes float32, float16 and bfloat16")
    if x.numel() == 0:
        reasons.append("x is empty")
    if op in _TRAINING:
        return reasons or _conv_mismatches(op, args, module("native").why_not_conv) + _beyond_level_2(op, args)
    return reasons + _mismatches(x, args, _which_are_vectors(op))


def _beyond_level_2(op: str, args: tuple[Any, ...]) -> list[str]:
    """What of the gradients of a convolution the native backend has not: the norms around them."""
    named = dict(zip(argument_names(op), args, strict=True))
    reasons = []
    if named.get("coefficients") is not None:
        reasons.append("coefficients are given; it takes the gradient of the convolution's output (level 2)")
    if op == "conv_grad_input" and named["mean"] is not None:
        reasons.append("a norm in front is given; its backward is passes of their own (level 2)")
    return reasons


@functools.cache
def _which_are_vectors(op: str) -> tuple[bool, ...]:
    return tuple(name.rstrip("2") in _VECTORS for name in argument_names(op))


def _mismatches(x: Tensor, args: tuple[Any, ...], vectors: tuple[bool, ...], mask: Tensor | None = None) -> list[str]:
    """What the public functions have refused already; an op called by itself must not read past the end either. Tensors
    among the ``args`` that are not ``vectors`` of x's channels must have x's shape."""
    shape, device = x.shape, x.device
    channels = shape[-3 if x.dim() == 4 else 0 :][:1]
    reasons = [
        f"a tensor is {tuple(tensor.shape)} on {tensor.device} beside x, {tuple(shape)} on {device}"
        for tensor, vector in zip(args, vectors, strict=True)
        if isinstance(tensor, Tensor)
        and tensor is not mask
        and (tensor.shape != (channels if vector else shape) or tensor.device != device)
    ]
    if mask is not None:
        expected = mask_shape(tuple(x.shape))
        if tuple(mask.shape) != expected or mask.dtype != torch.uint8 or mask.device != device:
            found = f"{tuple(mask.shape)} {mask.dtype} on {mask.device}"
            reasons.append(f"mask is {found}; it takes {expected} torch.uint8 on {device}")
    return reasons


def _pool_mismatches(op: str, args: tuple[Any, ...]) -> list[str]:
    """Of a pass with pooling: what ``_mismatches`` says of the vectors, the window, and the sizes of its outputs."""
    place = _PLACE_OF_X.get(op, 0)
    x, settings = args[place], PoolSettings.of(*args[-3:])
    kernel_size, _, padding = settings
    reasons = _mismatches(x, args[place:-3], _which_are_vectors(op)[place:-3])
    if any(2 * padding[i] > kernel_size[i] for i in (0, 1)) or kernel_size[0] * kernel_size[1] > 256:
        reasons.append(
            f"the window is {[*kernel_size]}, padded by {[*padding]}; it takes 256 pixels, half of a side padded"
        )
    size = settings.output_size(x.shape)
    if min(size) < 1:
        reasons.append(f"the output would be {size[0]} x {size[1]}; it takes at least one pixel")
    pooled = (*x.shape[:2], *size)
    for tensor in args[:place]:
        if tuple(tensor.shape) != pooled or tensor.device != x.device:
            reasons.append(f"a tensor is {tuple(tensor.shape)} on {tensor.device}; it takes {pooled} on {x.device}")
    return reasons


def _conv_mismatches(op: str, args: tuple[Any, ...], why_not_conv: Callable[..., list[str]]) -> list[str]:
    """What a backend's convolutions cannot take, beyond what holds for every op on x. ``why_not_conv``: what this
    backend alone cannot, of x, weight and settings that fit together."""
    named = dict(zip(argument_names(op), args, strict=True))
    x, conv_weight = named["x"], named["conv_weight"]
    settings = ConvSettings.of(*(named[name] for name in ConvSettings._fields))
    if x.dim() != 4 or conv_weight.dim() != 4:
        return [f"x is {tuple(x.shape)} and conv_weight {tuple(conv_weight.shape)}; it takes 4 dimensions each"]
    filters, size, training = conv_weight.shape[0], settings.output_size(x.shape, conv_weight.shape), op in _TRAINING
    reasons = []
    if settings.groups != 1:
        reasons.append(f"groups is {settings.groups}; it takes 1")
    elif conv_weight.shape[1] != x.shape[1]:
        found = f"{tuple(conv_weight.shape)}, takes {conv_weight.shape[1]} channels"
        reasons.append(f"conv_weight, {found}; x has {x.shape[1]}")
    if conv_weight.numel() == 0:
        reasons.append("conv_weight is empty")
    if conv_weight.dtype != x.dtype:
        reasons.append(f"conv_weight is {conv_weight.dtype}; it takes x's dtype, {x.dtype}")
    if conv_weight.device != x.device:
        reasons.append(f"conv_weight is on {conv_weight.device}; it takes x's device, {x.device}")
    if min(size) < 1:
        reasons.append(f"the output would be {size[0]} x {size[1]}; it takes at least one pixel")
    reasons = reasons or list(why_not_conv(x, conv_weight, settings))
    output = (x.shape[0], filters, *size)
    expected = {"dz": output, "y": output, "coefficients": (4, filters)}
    expected |= {"residual": tuple(x.shape) if training else output}
    expected |= dict.fromkeys(("running_mean", "running_var", "scale", "shift"), (filters,))
    expected |= dict.fromkeys(("mean", "invstd", "weight", "bias"), (x.shape[1],))
    for name, shape in expected.items():
        tensor = named.get(name)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != x.device):
            reasons.append(f"{name} is {tuple(tensor.shape)} on {tensor.device}; it takes {shape} on {x.device}")
        if training and name in ("dz", "y", "residual") and tensor is not None and tensor.dtype != x.dtype:
            reasons.append(f"{name} is {tensor.dtype}; it takes x's dtype, {x.dtype}")
    if not training and size != (1, 1) and filters > 1 and conv_memory_format(x, conv_weight) != torch.channels_last:
        reasons.append("conv2d's output would not be channels_last, as neither x nor conv_weight clearly lies so")
    return reasons


def _why_not_separate(op: str, args: tuple[Any, ...]) -> list[str]:
    return [] if op == "conv_bn_act" else ["it is a convolution and one pass of bn_apply, and has nothing else"]


_CHECKS: dict[str, Callable[[str, tuple[Any, ...]], list[str]]] = {
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
    "native": _why_not_native,
    "separate": _why_not_separate,
    "reference": lambda op, args: [],
}
