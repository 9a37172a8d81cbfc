"""What the public ops accept. Every refusal names the argument, what it got and what it takes.

These stand above every backend, so that a kernel never sees a tensor it would read past the end of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

ACTIVATIONS = ("relu", None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WrongValue(ValueError, RuntimeError):
    """Sizes, devices or numbers that do not fit; a RuntimeError too, as PyTorch's own ops raise."""


class WrongType(TypeError, RuntimeError):
    """Another type or dtype than an op takes; a RuntimeError too, as PyTorch's own ops raise."""


def check_activation(activation: str | None) -> bool:
    """True for "relu", False for None."""
    if not (activation is None or isinstance(activation, str)):
        raise WrongType(f"activation must be 'relu' or None; got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise WrongValue(f"activation must be 'relu' or None; got {activation!r}")
    return activation == "relu"


def check_image(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise WrongType(f"{name} must be a Tensor; got {type(x).__name__}")
    if x.dim() != 4:
        raise WrongValue(f"{name} must have 4 dimensions (N, C, H, W); got {x.dim()}, shape {tuple(x.shape)}")
    _check_numbers(name, x)
    if x.shape[1] == 0:
        raise WrongValue(f"{name} must have at least one channel; got shape {tuple(x.shape)}")


def check_bytes(name: str, x: Tensor, channels: int) -> None:
    """Images of bytes: (N, channels, H, W), uint8."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise WrongValue(f"{name} must be (N, {channels}, H, W); got shape {tuple(x.shape)}")


def check_channel_vector(name: str, vector: Tensor | None, x: Tensor, channels: int) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor):
        raise WrongType(f"{name} must be a Tensor or None; got {type(vector).__name__}")
    if vector.dim() != 1 or vector.shape[0] != channels:
        raise WrongValue(f"{name} must have shape ({channels},), one value per channel; got {tuple(vector.shape)}")
    _check_numbers(name, vector)
    _check_same_device(name, vector, x)


def check_residual(name: str, residual: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise WrongType(f"{name} must be a Tensor or None; got {type(residual).__name__}")
    if tuple(residual.shape) != tuple(shape):
        raise WrongValue(f"{name} must have the output's shape {tuple(shape)}; got {tuple(residual.shape)}")
    _check_numbers(name, residual)
    _check_same_device(name, residual, x)


def check_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    channels: int,
    suffix: str = "",
) -> None:
    check_channel_vector("weight" + suffix, weight, x, channels)
    check_channel_vector("bias" + suffix, bias, x, channels)
    check_channel_vector("running_mean" + suffix, running_mean, x, channels)
    check_channel_vector("running_var" + suffix, running_var, x, channels)
    if not isinstance(training, bool):
        raise WrongType(f"training{suffix} must be a bool; got {type(training).__name__}")
    if (running_mean is None) != (running_var is None):
        raise WrongValue(f"running_mean{suffix} and running_var{suffix} must both be given, or both be None")
    if not training and running_mean is None:
        raise WrongValue(f"running_mean{suffix} and running_var{suffix} must be given when training is False; got None")
    check_number("momentum" + suffix, momentum)
    check_number("eps" + suffix, eps)
    if not eps >= 0:  # nor NaN
        raise WrongValue(f"eps{suffix} must be >= 0; got {eps}")
    if training and eps == 0:
        raise WrongValue(f"eps{suffix} must be positive when training is True; got {eps}")


def check_process_group(name: str, group: object) -> None:
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    raise WrongType(f"{name} must be a torch.distributed.ProcessGroup or None; got {type(group).__name__}")


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WrongType(f"{name} must be a float; got {type(value).__name__}")


def check_several_values_per_channel(x: Tensor) -> None:
    """nn.BatchNorm2d's ValueError: one value has no variance."""
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise WrongValue(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def check_pair(name: str, value: int | Sequence[int], minimum: int) -> list[int]:
    """An int or two of them, as [vertical, horizontal]."""
    pair = [value, value] if isinstance(value, int) else list(value) if isinstance(value, (tuple, list)) else None
    if pair is None or len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
        raise WrongType(f"{name} must be an int or two ints; got {value!r}")
    if min(pair) < minimum:
        raise WrongValue(f"{name} must be >= {minimum}; got {value!r}")
    return pair


def check_conv_weight(x: Tensor, conv_weight: Tensor, groups: int) -> None:
    if not isinstance(conv_weight, Tensor):
        raise WrongType(f"conv_weight must be a Tensor; got {type(conv_weight).__name__}")
    if conv_weight.dim() != 4:
        raise WrongValue(
            f"conv_weight must have 4 dimensions (out_channels, in_channels / groups, kernel height, kernel width); "
            f"got shape {tuple(conv_weight.shape)}"
        )
    if conv_weight.numel() == 0:
        raise WrongValue(f"conv_weight must not be empty; got shape {tuple(conv_weight.shape)}")
    _check_numbers("conv_weight", conv_weight)
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise WrongType(f"groups must be an int; got {type(groups).__name__}")
    if groups < 1 or conv_weight.shape[0] % groups:
        raise WrongValue(f"groups must be >= 1 and divide the {conv_weight.shape[0]} output channels; got {groups}")
    if conv_weight.shape[1] * groups != x.shape[1]:
        raise WrongValue(
            f"x must have {conv_weight.shape[1] * groups} channels for conv_weight of shape "
            f"{tuple(conv_weight.shape)} and groups={groups}; got {x.shape[1]}"
        )
    _check_same_device("conv_weight", conv_weight, x)


def _check_numbers(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise WrongType(f"{name} must have dtype float64, float32, float16 or bfloat16; got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise WrongType(f"{name} must be a strided (dense) Tensor; got layout {tensor.layout}")


def _check_same_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise WrongValue(f"{name} must be on x's device, {x.device}; got {tensor.device}")


def check_same_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise WrongType(f"{name} must have x's dtype, {dtype}; got {tensor.dtype}")


def check_normalize(normalize: object, images: object) -> None:
    """Refuses what is not (mean, std) with a number for each channel of the images, no std of 0."""
    if normalize is None:
        return
    if not isinstance(normalize, (tuple, list)) or len(normalize) != 2:
        raise WrongType(f"normalize must be (mean, std), each a number for every channel, or None; got {normalize!r}")
    for name, vector in zip(("mean", "std"), normalize, strict=True):
        for number in vector:
            check_number(f"normalize's {name}", number)
    if 0 in normalize[1]:
        raise WrongValue(f"normalize's std must not be 0; got {normalize[1]!r}")
    channels = len(normalize[0])
    if len(normalize[1]) != channels:
        raise WrongValue(f"normalize's mean and std must be of the same length; got {channels} and {len(normalize[1])}")
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        check_bytes("example_input", images, channels)
