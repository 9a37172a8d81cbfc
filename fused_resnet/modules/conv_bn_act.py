"""Convolution, BatchNorm, residual add and ReLU as one module: one kernel at inference."""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from fused_resnet.modules.bn_act import is_image, norm_act, why_not_fuse
from fused_resnet.modules.plain import frozen_forward, has_memory, is_intercepted, settings_of, vectors_fit
from fused_resnet.modules.site import Site
from fused_resnet.ops.autocast import autocast_dtype
from fused_resnet.ops.checks import check_activation
from fused_resnet.ops.conv_bn_act import conv_bn_act


class ConvBNAct2d(nn.Module):
    """``relu(bn(conv(x)) + residual)``; its children are ``conv``, ``bn`` and ``act``, plain PyTorch modules.

    In training, the convolution and then one pass for the rest; the same in eval where gradients are wanted. In eval
    without gradients (``torch.no_grad()``, or nothing that requires them), one kernel on CUDA, the running statistics
    folded into its epilogue; on the CPU oneDNN's convolution and one pass (``freeze`` makes it one call there too).
    Equivalent PyTorch, also the way it runs where a child is not plain (hooks, another class)::

        act(bn(conv(x)) + residual)

    x is (N, in_channels, H, W), any floating dtype and memory format (channels_last is the fast one); the result is
    (N, out_channels, H', W').

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: as ``nn.Conv2d``.
        padding: as ``nn.Conv2d``, numbers only; None for ``dilation * (kernel_size - 1) / 2``, which at stride 1 keeps
            height and width.
        eps, momentum: as ``nn.BatchNorm2d``.
        activation: "relu", or None for no activation.
        device, dtype: of the parameters and buffers.

    Raises:
        ValueError: for another ``activation``; padding is None and a kernel size is even; and ``nn.Conv2d``'s own.
    """

    sites: ClassVar = (Site("conv", "bn", "act"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "relu",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        relu = check_activation(activation)
        if padding is None:
            padding = _padding_that_keeps_size(kernel_size, dilation)
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.act = nn.ReLU(inplace=True) if relu else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(conv(x)) + residual)``; residual, of the result's shape, is added in its dtype."""
        if torch.jit.is_scripting():  # torch.jit.script compiles this branch alone
            out = self.bn(self.conv(x))
            if residual is not None:
                out += residual
            return out if self.act is None else self.act(out)
        else:
            out = frozen_forward(self, x) if residual is None else None
            if out is not None:
                return out
            conv, bn = self.conv, self.bn
            if not is_image(x) or bn.training or why_not_fold(conv, bn, self.act):
                return norm_act(bn, self.act, conv(x), residual)
            if residual is not None:
                residual = residual.to(autocast_dtype(x) or x.dtype)
            settings = settings_of(conv)
            return conv_bn_act(
                x,
                conv.weight,
                bn.weight,
                bn.bias,
                cast(Tensor, bn.running_mean),
                cast(Tensor, bn.running_var),
                residual,
                stride=settings.stride,
                padding=settings.padding,
                dilation=settings.dilation,
                groups=settings.groups,
                eps=bn.eps,
                activation=None if self.act is None else "relu",
            )


def why_not_fold(conv: nn.Module, norm: nn.Module, act: nn.Module | None) -> list[str]:
    """The reasons why ``act(norm(conv(x)))`` cannot be one kernel at inference; an empty list means that it can."""
    reasons = why_not_fuse(norm, act)
    if not reasons and (norm.running_mean is None or norm.running_var is None):
        reasons.append("the norm has no running statistics")
    return reasons + why_not_plain_conv(conv)


def why_not_constant(conv: nn.Module, norm: nn.Module, act: nn.Module | None) -> list[str]:
    """The reasons why the norm cannot be folded into the convolution's weight once for many calls (``freeze``)."""
    if reasons := why_not_fold(conv, norm, act):
        return reasons
    weight = conv._parameters.get("weight")
    if weight is None or weight.dim() != 4 or not weight.is_floating_point() or weight.numel() == 0:
        return ["the convolution's weight is no parameter of four dimensions and floating point"]
    if norm.training:
        return ["the norm is in training"]
    tensors = (weight, *norm._parameters.values(), *norm._buffers.values())
    if not all(tensor is None or has_memory(tensor) for tensor in tensors):
        return ["the storage of a weight was freed"]
    if not vectors_fit(cast(nn.BatchNorm2d, norm), len(weight), weight.device):
        return ["the norm's vectors do not fit the convolution"]
    return []


def why_not_plain_conv(conv: nn.Module) -> list[str]:
    """The reasons why calling ``conv`` is not just ``F.conv2d`` of its weight; an empty list means that it is."""
    if type(conv) is not nn.Conv2d:
        return [f"the convolution is {type(conv).__module__}.{type(conv).__qualname__}, not torch.nn.Conv2d"]
    reasons = []
    if is_intercepted(conv):
        reasons.append("the convolution has hooks, or a forward of its own")
    if conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        reasons.append("the convolution has a bias, or padding other than numbers of zeros")
    return reasons


def _padding_that_keeps_size(
    kernel_size: int | tuple[int, int], dilation: int | tuple[int, int]
) -> int | tuple[int, int]:
    sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    steps = (dilation, dilation) if isinstance(dilation, int) else dilation
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"padding must be given where a kernel size is even; got kernel_size={kernel_size}")
    return steps[0] * (sizes[0] - 1) // 2, steps[1] * (sizes[1] - 1) // 2
