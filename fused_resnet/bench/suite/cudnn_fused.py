"""ATen's fused cuDNN ops, which nothing in PyTorch uses by itself: convolution, bias, (add,) ReLU as one call.

The norms are folded into the convolutions by PyTorch's own ``fuse_conv_bn_eval``, as a user who knows these ops would.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fused_resnet.bench.suite.conditions import cuda_only, inference_only, network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import module_in, prepared_inference
from fused_resnet.bench.suite.subjects import is_residual_block
from fused_resnet.bench.suite.task import Prepared


def cudnn_fused_contenders() -> list[Contender]:
    """One, channels_last."""
    return [network_contender("ATen's fused cuDNN ops", _prepare, inference_only, cuda_only, _has_blocks)]


def fold(module: nn.Module) -> nn.Module:
    """A network or block in eval mode whose residual blocks (and the stem in front of them) call the fused ops; in
    place. Blocks of torchvision's, timm's and this package's layout; what they have besides is refused.

    Raises:
        ValueError: a block with anything but plain convolutions, BatchNorm and ReLU.
    """
    for block in module.modules():
        if is_residual_block(block):
            block.forward = functools.partial(_block, _convolutions(block), _shortcut(block))
    children = dict(module.named_children())
    conv, norm = children.get("conv1"), children.get("bn1")
    act = next((name for name in ("relu", "act1") if isinstance(children.get(name), nn.ReLU)), None)
    if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and act is not None:
        module.conv1, module.bn1 = _ConvRelu(fuse_conv_bn_eval(conv, norm)), nn.Identity()
        setattr(module, act, nn.Identity())
    return module


def _prepare(task: NetworkTask) -> Prepared:
    module = module_in(task, fold(task.copy()), torch.channels_last)
    return prepared_inference(task, module, task.inputs_as(task.dtype, torch.channels_last))


def _has_blocks(task: NetworkTask) -> list[str]:
    module = task.network.without_memory(task.path)
    return (
        [] if any(map(is_residual_block, module.modules())) else ["it is put into residual blocks, and there is none"]
    )


class _ConvRelu(nn.Module):
    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return conv_relu(self.conv, x)


def conv_relu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """relu(conv(x))."""
    return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *_settings(conv))


def conv_add_relu(conv: nn.Conv2d, x: Tensor, z: Tensor) -> Tensor:
    """relu(conv(x) + z). cuDNN gives wrong numbers where z is x (pytorch#62926): such a z is copied."""
    if z.data_ptr() == x.data_ptr():
        z = z.clone()
    return torch.cudnn_convolution_add_relu(x, conv.weight, z, 1.0, conv.bias, *_settings(conv))


def _settings(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _block(convs: nn.ModuleList, shortcut: nn.Module | None, x: Tensor) -> Tensor:
    out = x
    for conv in convs[:-1]:
        out = conv_relu(conv, out)  # type: ignore[arg-type]
    return conv_add_relu(convs[-1], out, x if shortcut is None else shortcut(x))  # type: ignore[arg-type]


def _convolutions(block: nn.Module) -> nn.ModuleList:
    """The convolutions of F(x) with their norms in them; also given to the block, so that they move and change dtype
    with it, in place of its own."""
    children = dict(block.named_children())
    folded = nn.ModuleList()
    for index in (1, 2, 3):
        conv, norm = children.pop(f"conv{index}", None), children.pop(f"bn{index}", None)
        if conv is None:
            continue
        folded.append(fuse_conv_bn_eval(*_plain(block, conv, norm)))
        delattr(block, f"conv{index}")
        delattr(block, f"bn{index}")
    children.pop("downsample", None)
    for name, child in children.items():
        if not isinstance(child, (nn.ReLU, nn.Identity)):
            raise ValueError(f"{type(block).__name__} has a {name} ({type(child).__name__}), which no fused op does")
    block.folded = folded
    return folded


def _shortcut(block: nn.Module) -> nn.Module | None:
    downsample = getattr(block, "downsample", None)
    if isinstance(downsample, nn.Sequential) and len(downsample) == 2:
        block.downsample = fuse_conv_bn_eval(*_plain(block, *downsample))
    return block.downsample  # type: ignore[return-value]


def _plain(block: nn.Module, conv: Any, norm: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    act = getattr(norm, "act", None)  # of timm's BatchNormAct2d
    if type(conv) is not nn.Conv2d or not isinstance(norm, nn.BatchNorm2d) or act is not None:
        raise ValueError(f"{type(block).__name__} has {type(conv).__name__} and {type(norm).__name__}, not plain ones")
    return conv, norm
