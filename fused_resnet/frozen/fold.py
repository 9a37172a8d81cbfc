"""A convolution and the batch norm behind it as one convolution with a bias; a linear layer as such a convolution.

These are no modules and hold no parameters: they are made of a module's tensors as those were, and made anew when
somebody has written to one (``frozen/kept.py``).
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from fused_resnet.arguments import ConvSettings
from fused_resnet.modules.plain import Marks, settings_of
from fused_resnet.ops.backends.native.conv import NativeConv, takes_dtype, why_not_native
from fused_resnet.ops.backends.onednn import pack_conv_weight, packed_conv_act, why_not_packed
from fused_resnet.ops.conv_bn_act import fold
from fused_resnet.ops.route.choose import function_for
from fused_resnet.ops.route.context import is_listened_to, requested_backend, runs_unseen
from fused_resnet.ops.route.request import AUTO

PACKED_SIZES = 4  # of the input: a weight packed for one size is packed again at every call of another, 4x slower


class FoldedConv:
    """``act(conv2d(x, weight) + bias + residual)``: an ``nn.Conv2d`` with an ``nn.BatchNorm2d`` folded into it.

    One kernel: our C++ or oneDNN's with the weights packed for it on the CPU, ours by ``ops.conv_bn_act`` elsewhere.
    Folded in float64 and rounded once.

    Args:
        conv: without bias, zero padding.
        norm: with running statistics.
        relu: whether a ReLU follows.
        dtype: of the weight and of x. The bias is float32, whatever the dtype (float64 beside that), for the kernels
            that add it in float32.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool, dtype: torch.dtype) -> None:
        self._marks = Marks(_tensors(conv, norm))
        self._made_of = _settings(conv, norm), relu, dtype
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            scale, shift = fold(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, torch.float64)
            weight = (conv.weight.double() * scale[:, None, None, None]).to(dtype)
            self.weight = weight.contiguous(memory_format=torch.channels_last)
            self.bias = shift.to(torch.float64 if dtype == torch.float64 else torch.float32)
        self.settings = settings_of(conv)
        self.relu = relu
        self._packed: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._native: tuple[NativeConv | None] | None = None

    def stands_for(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool, dtype: torch.dtype) -> bool:
        """True if making it again of these would give the same."""
        return self._made_of == (_settings(conv, norm), relu, dtype) and self._marks.hold_for(_tensors(conv, norm))

    def __call__(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """x: (N, C, H, W) of the weight's dtype, channels_last for speed; residual: of the result's shape and dtype, or
        None, and with ``overwrite`` its memory may become the result's."""
        if runs_unseen(x) and (native := self.native_for(x)) is not None:
            return native(x, residual, overwrite)
        if requested_backend() != AUTO or is_listened_to() or why_not_packed(x):
            arguments = (x, self.weight, None, self.bias, residual, self.settings, self.relu)
            return function_for("conv_bn_act", arguments)(*arguments)
        packed = self._packed.get(x.shape)
        if packed is None:
            if len(self._packed) >= PACKED_SIZES:
                self._packed.clear()
            weight = pack_conv_weight(self.weight, list(x.shape), self.settings)
            packed = self._packed[x.shape] = (weight, self.bias.to(self.weight.dtype))  # oneDNN takes one dtype
        weight, bias = packed
        return packed_conv_act(x, weight, bias, residual, self.settings, self.relu, overwrite)

    def native_for(self, x: Tensor) -> NativeConv | None:
        """Our own C++ for this weight, if it can take x."""
        if x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return None
        if self._native is None:
            refused = why_not_native(x, self.weight, self.settings)
            self._native = (None if refused else NativeConv(self.weight, self.bias, self.settings, self.relu),)
        return self._native[0]


class FoldedLinear:
    """``F.linear(x, weight, bias)`` with the weight laid out for our own C++ where that runs: a convolution of one
    pixel."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        self._marks = Marks(_tensors(linear))
        self._dtype = dtype
        self.weight = linear.weight.detach().to(dtype, copy=True)  # laid out later, when it may be another
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype, copy=True)
        self._native: NativeConv | None = None

    def stands_for(self, linear: nn.Linear, dtype: torch.dtype) -> bool:
        """As `FoldedConv.stands_for`."""
        return self._dtype == dtype and self._marks.hold_for(_tensors(linear))

    def __call__(self, x: Tensor) -> Tensor:
        """x: (N, in_features) of the weight's dtype."""
        if runs_unseen(x) and takes_dtype(x.dtype):
            return self.native()(x[:, :, None, None])[:, :, 0, 0]
        return nn.functional.linear(x, self.weight, self.bias)

    def native(self) -> NativeConv:
        """Our own C++ for this weight."""
        if self._native is None:
            bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
            self._native = NativeConv(self.weight[:, :, None, None], bias, ConvSettings(), relu=False)
        return self._native


def folded_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool, dtype: torch.dtype) -> FoldedConv:
    """A `FoldedConv` of them; the last one, if nothing that it was made of has changed."""
    known = _kept.get(conv)
    if not isinstance(known, FoldedConv) or not known.stands_for(conv, norm, relu, dtype):
        known = _kept[conv] = FoldedConv(conv, norm, relu, dtype)
    return known


def folded_linear(linear: nn.Linear, dtype: torch.dtype) -> FoldedLinear:
    """As `folded_conv`."""
    known = _kept.get(linear)
    if not isinstance(known, FoldedLinear) or not known.stands_for(linear, dtype):
        known = _kept[linear] = FoldedLinear(linear, dtype)
    return known


_kept: weakref.WeakKeyDictionary[nn.Module, FoldedConv | FoldedLinear] = weakref.WeakKeyDictionary()


def _tensors(*modules: nn.Module) -> list[Tensor]:
    found = [t for module in modules for table in (module._parameters, module._buffers) for t in table.values()]
    return [tensor for tensor in found if tensor is not None]


def _settings(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[object, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups, norm.eps
