"""What a block becomes when its BatchNorms are constants: convolutions with an epilogue, and nothing else.

``fused_resnet.freeze`` makes these. They have no parameters: their buffers are the folded weights, so ``state_dict``
and ``.to`` work, and training does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fused_resnet.arguments import ConvSettings
from fused_resnet.frozen.chains import Chains, weights_changed
from fused_resnet.modules.plain import has_global_hooks, is_intercepted
from fused_resnet.ops.backends.native.chain import Block, NativeChain
from fused_resnet.ops.backends.native.conv import NativeConv, why_not_native
from fused_resnet.ops.backends.onednn import pack_conv_weight, packed_conv_act, why_not_packed
from fused_resnet.ops.conv_bn_act import fold
from fused_resnet.ops.route.choose import function_for
from fused_resnet.ops.route.listeners import runs_unseen
from fused_resnet.ops.route.request import AUTO, requested_backend

PACKED_SIZES = 4  # of the input: a weight packed for one size is packed again at every call of another, 4x slower


class FrozenConvAct(nn.Module):
    """``act(conv2d(x, weight) + bias + residual)``: an ``nn.Conv2d`` with an ``nn.BatchNorm2d`` folded into it.

    One kernel: oneDNN's with the weights packed for it on the CPU, ours by ``ops.conv_bn_act`` elsewhere. Folded in
    float64 and rounded once.

    Args:
        conv: without bias, zero padding.
        norm: with running statistics.
        relu: whether a ReLU follows.
        dtype: of the weight and of x. The bias is float32, whatever the dtype (float64 beside that), for the kernels
            that add it in float32.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, relu: bool, dtype: torch.dtype) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale, shift = fold(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, torch.float64)
        weight = (conv.weight.detach().double() * scale.detach()[:, None, None, None]).to(dtype)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", shift.detach().to(self._bias_dtype()))
        padding = [int(pixels) for pixels in conv.padding]
        self.settings = ConvSettings.of(conv.stride, padding, conv.dilation, conv.groups)
        self.relu = relu
        self._forget()

    def _forget(self) -> None:
        """What was made or decided for the weight as it was."""
        weights_changed()
        self._packed: dict[torch.Size, tuple[Tensor, Tensor]] = {}
        self._native: tuple[NativeConv | None] | None = None

    def _bias_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """x: (N, C, H, W), channels_last for speed; residual: of the result's shape and dtype, or None, and with
        ``overwrite`` its memory may become the result's."""
        if runs_unseen(x) and (native := self.native_for(x)) is not None:
            return native(x, residual, overwrite)
        if torch.compiler.is_compiling() or requested_backend() != AUTO or why_not_packed(x):
            arguments = (x, self.weight, None, self.bias, residual, self.settings, self.relu)
            return function_for("conv_bn_act", arguments)(*arguments)
        packed = self._packed.get(x.shape)
        if packed is None:
            if x.shape[1] != (channels := self.weight.shape[1] * self.settings.groups):
                raise ValueError(f"x must have {channels} channels; got shape {tuple(x.shape)}")
            if len(self._packed) == PACKED_SIZES:
                self._packed.pop(next(iter(self._packed)), None)
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

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenConvAct:
        self._forget()
        bias = self.bias
        super()._apply(fn, recurse)
        self.bias = bias.to(self.bias.device, self._bias_dtype())  # not rounded with the weight
        return self

    def __getstate__(self) -> dict[str, Any]:
        # neither copied nor pickled, made again when needed
        return {**self.__dict__, "_packed": {}, "_native": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        outputs, inputs, *kernel_size = self.weight.shape
        settings = ", ".join(f"{name}={value}" for name, value in self.settings._asdict().items())
        channels = inputs * self.settings.groups
        return f"{channels}, {outputs}, kernel_size={tuple(kernel_size)}, {settings}, relu={self.relu}"


class FrozenBlock(nn.Module):
    """``relu(F(x) + shortcut(x))`` as one kernel per convolution; the last adds the shortcut in its epilogue.

    Args:
        convs: F, in order.
        downsample: the shortcut, where x and F(x) differ in shape; x itself if None.
        shortcut: False for a plain block, relu(H(x)).
    """

    def __init__(self, convs: Sequence[FrozenConvAct], downsample: nn.Module | None, shortcut: bool = True) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.downsample = downsample
        self.shortcut = shortcut

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """``overwrite``: nobody reads x afterwards, so the result may take its memory."""
        *convs, last = self.convs
        out = x
        for conv in convs:
            out = conv(out)
        if not self.shortcut:
            return last(out)
        if self.downsample is None:
            return last(out, x, overwrite)
        shortcut = self.downsample(x)
        private = type(self.downsample) is FrozenConvAct and not (is_watched(self.downsample) or is_watched(last))
        return last(out, shortcut, overwrite=private)

    def is_watched(self) -> bool:
        return has_global_hooks() or is_intercepted(self) or any(map(is_intercepted, self.convs))

    def native_for(self, x: Tensor) -> Block | None:
        """All convolutions as our own C++; None if one of them cannot take x."""
        convs = [*self.convs, *([] if self.downsample is None else [self.downsample])]
        natives = [conv.native_for(x) if type(conv) is FrozenConvAct else None for conv in convs]
        found = [native for native in natives if native is not None]
        if len(found) < len(convs):
            return None
        return Block(found, None if self.downsample is None else found.pop(), self.shortcut)


class FrozenStage(nn.Sequential):
    """Frozen blocks in a row. What one hands to the next is nobody else's, unless a hook may have kept it.

    On the CPU all of them are one call of C++ where that can be.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._chains = Chains(_chain)

    def forward(self, x: Tensor) -> Tensor:
        if (out := self._chains(self, x)) is not None:
            return out
        overwrite = False
        for block in self:
            private = not cast(FrozenBlock, block).is_watched()
            x = block(x, overwrite and private)
            overwrite = private
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_chains"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._chains = Chains(_chain)


def _chain(stage: FrozenStage, x: Tensor) -> NativeChain | None:
    blocks = [cast(FrozenBlock, block).native_for(x) for block in stage]
    natives = [block for block in blocks if block is not None]
    return NativeChain(natives, x) if len(natives) == len(blocks) else None


def is_watched(module: nn.Module) -> bool:
    """True if a hook may keep what goes into this module or comes out of it."""
    return is_intercepted(module) or has_global_hooks()
