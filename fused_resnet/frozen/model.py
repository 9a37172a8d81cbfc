"""``freeze``: a model as a function of its input alone, every BatchNorm folded into the convolution in front of it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.convert.fuse import fuse
from fused_resnet.frozen.block import FrozenBlock, FrozenConvAct, FrozenStage
from fused_resnet.frozen.ends import (
    FrozenAvgPool,
    FrozenLinear,
    FrozenStem,
    is_stem,
    normalized,
    pixel_scale_and_shift,
)
from fused_resnet.frozen.network import network_chains
from fused_resnet.modules.conv_bn_act import ConvBNAct2d, why_not_fold
from fused_resnet.modules.plain import has_global_hooks, is_intercepted
from fused_resnet.modules.site import Site, sites_of
from fused_resnet.ops.checks import DTYPES, check_bytes, check_image, check_normalize


class FrozenModel(nn.Module):
    """What ``freeze`` returns: ``module`` without gradients, in one dtype and memory format; perhaps a CUDA graph."""

    _like: Tensor

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, normalize: tuple[Sequence[float], Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self._pixels = None if normalize is None else pixel_scale_and_shift(*normalize)
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._chains = network_chains()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, activations and the output; ``.to`` changes it."""
        return self._like.dtype

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The model's output in the frozen dtype. x: (N, C, H, W) of any floating dtype and memory format, on the
        model's device, or uint8 if it was frozen with ``normalize``; with a CUDA graph, of the example's shape
        (ValueError otherwise) and, if one of the two is uint8, of its dtype (TypeError)."""
        self._check(x)
        if self._graph is None:
            x = self._as_module_takes(x)
            out = None if is_intercepted(self.module) else self._chains(self.module, x)
            return self.module(x) if out is None else out
        if (x.dtype == torch.uint8) != (self._graph_input.dtype == torch.uint8):
            raise TypeError(
                f"x must have the dtype the CUDA graph was captured with, {self._graph_input.dtype}; got {x.dtype}"
            )
        if x.shape != self._graph_input.shape:
            raise ValueError(
                f"x must have the shape the CUDA graph was captured with, {tuple(self._graph_input.shape)}; "
                f"got {tuple(x.shape)}"
            )
        self._graph_input.copy_(x)
        self._graph.replay()
        return self._graph_output.clone()

    def _check(self, x: Tensor) -> None:
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            if self._pixels is None:
                raise TypeError("x must be floating point, or the model frozen with normalize; got torch.uint8")
            check_bytes("x", x, len(self._pixels[0]))
        else:
            check_image("x", x)

    def _as_module_takes(self, x: Tensor) -> Tensor:
        """A stem reads images as they lie, and bytes; whatever else comes first gets them as numbers, channels_last."""
        if type(getattr(self.module, "conv1", None)) is FrozenStem:
            return x if x.dtype in (torch.uint8, self.dtype) else x.to(self.dtype)
        if x.dtype == torch.uint8 and self._pixels is not None:
            return normalized(x, *self._pixels, self.dtype)
        return x.to(self.dtype, memory_format=torch.channels_last)

    @torch.inference_mode(False)  # the static input is written to by every later call, wherever that is made
    @torch.no_grad()
    def capture(self, x: Tensor) -> None:
        """Records the kernels of one call as a CUDA graph, which every later call replays."""
        self._graph_input = self._as_module_takes(x).clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles and picks algorithms, which capture forbids
                self.module(self._graph_input)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._graph_output = self.module(self._graph_input)
        self._graph = graph

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenModel:
        before = [buffer.data_ptr() for buffer in self.buffers()]
        super()._apply(fn, recurse)
        if before != [buffer.data_ptr() for buffer in self.buffers()]:
            self._graph = None  # of buffers that are no more
        return self

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in self.__dict__.items() if name != "_chains"}
        return {**own, "_graph": None, "_graph_input": None, "_graph_output": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._chains = network_chains()

    def train(self, mode: bool = True) -> FrozenModel:
        if mode:
            raise RuntimeError("a frozen model has no statistics to train with; train the model it was frozen from")
        return super().train(mode)


def freeze(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> FrozenModel:
    """A copy of ``model`` for inference: BatchNorm folded, weights laid out for the device, one kernel a convolution.

    Equals ``model.eval()`` up to rounding. The model is left as it is. A block that cannot be folded (hooks, another
    kind of norm, batch statistics) stays in the copy and runs the ordinary way; ``fusion_report`` of the result lists
    the norms that are left.

    Args:
        model: torchvision's ResNets, ours, or any module with their blocks inside.
        example_input: (N, C, H, W) on the model's device; it is run once, and chooses layouts. Other sizes work too.
        dtype: float32, float16 or bfloat16 (float64 too, unfused) for weights and activations; the model's if None.
        cuda_graph: capture the whole model as one CUDA graph, for inputs of exactly the example's shape.
        normalize: (mean, std) of each channel. The model then takes images of bytes too, uint8, and computes with
            (x / 255 - mean) / std; in the kernel that reads them, where that is ours.

    Returns:
        A module from (N, C, H, W), any floating dtype, to the model's output in ``dtype``.

    Raises:
        TypeError: model is not an ``nn.Module``, example_input not a floating-point Tensor (with normalize: or uint8),
            or dtype not floating.
        ValueError: example_input is not 4D or not on the model's device, cuda_graph without a CUDA device, or normalize
            not one number for each channel, or an std of 0.
    """
    check_normalize(normalize, example_input)
    if normalize is None or example_input.dtype != torch.uint8:
        check_image("example_input", example_input)
    if dtype not in (None, *DTYPES):
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, or None; got {dtype!r}")
    frozen = fuse(copy.deepcopy(model)).eval().requires_grad_(False)
    like = next((p for p in (*frozen.parameters(), *frozen.buffers()) if p.is_floating_point()), example_input)
    if like.device != example_input.device:
        raise ValueError(f"example_input must be on the model's device, {like.device}; got {example_input.device}")
    if cuda_graph and like.device.type != "cuda":
        raise ValueError(f"cuda_graph must be False for a model on {like.device}; it takes CUDA devices")
    dtype = like.dtype if dtype is None else dtype

    parts = ((name, _fold(module, dtype, normalize)) for name, module in frozen.named_modules())
    folded = {name: part for name, part in parts if part is not None}
    frozen = frozen.to(dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, part in folded.items():
        frozen = _replace(frozen, name, part)
    for name, module in list(frozen.named_modules()):
        if type(module) is nn.Sequential and len(module) > 0 and all(type(child) is FrozenBlock for child in module):
            frozen = _replace(frozen, name, FrozenStage(OrderedDict(module.named_children())))
    result = FrozenModel(frozen, dtype, normalize)
    result.eval()
    result(example_input)
    if cuda_graph:
        result.capture(example_input)
    return result


def _fold(
    module: nn.Module, dtype: torch.dtype, normalize: tuple[Sequence[float], Sequence[float]] | None
) -> nn.Module | dict[str, nn.Module] | None:
    """What takes this module's place, or (for a network) the places of its children; None where it stays as it is."""
    if is_intercepted(module) or has_global_hooks():
        return None
    sites = sites_of(module)
    if len(sites) > 1:
        return _fold_block(module, sites, dtype)
    if isinstance(module, ConvBNAct2d) and sites:
        return _fold_conv(module, sites[0], dtype)
    return (_fold_ends(module, sites[0], dtype, normalize) or None) if sites else None


def _fold_conv(module: nn.Module, site: Site, dtype: torch.dtype) -> FrozenConvAct | None:
    conv, norm, act = (getattr(module, name) for name in (site.conv, site.norm, site.act))
    return None if why_not_fold(conv, norm, act) else FrozenConvAct(conv, norm, act is not None, dtype)


def _fold_block(block: nn.Module, sites: Sequence[Site], dtype: torch.dtype) -> FrozenBlock | None:
    """The block as convolutions, all of them or none; a shortcut that is no convolution and norm stays as it is."""
    convs = [_fold_conv(block, site, dtype) for site in sites]
    shortcut = sites[-1].residual
    downsample = None if shortcut is None else getattr(block, shortcut)
    if type(downsample) is nn.Sequential and len(downsample) == 2 and not is_intercepted(downsample):
        conv, norm = downsample
        if why_not_fold(conv, norm, None):
            return None
        downsample = FrozenConvAct(conv, norm, False, dtype)  # type: ignore[arg-type]
    folded = [conv for conv in convs if conv is not None]
    return FrozenBlock(folded, downsample, shortcut is not None) if len(folded) == len(convs) else None


def _fold_ends(
    network: nn.Module, site: Site, dtype: torch.dtype, normalize: tuple[Sequence[float], Sequence[float]] | None
) -> dict[str, nn.Module]:
    """What takes the places of a network's first and last layers."""
    ends: dict[str, nn.Module] = {}
    if (conv := _fold_conv(network, site, dtype)) is not None:
        ends = {site.conv: conv, site.norm: nn.Identity(), site.act: nn.Identity()}
        pool: Any = None if site.pool is None else getattr(network, site.pool)
        if site.pool is not None and is_stem(conv, pool) and not is_intercepted(pool):
            ends |= {site.conv: FrozenStem(conv, pool, normalize), site.pool: nn.Identity()}
    average = getattr(network, "avgpool", None)
    if type(average) is nn.AdaptiveAvgPool2d and average.output_size in (1, (1, 1)) and not is_intercepted(average):
        ends["avgpool"] = FrozenAvgPool()
    linear = getattr(network, "fc", None)
    if type(linear) is nn.Linear and not is_intercepted(linear):
        ends["fc"] = FrozenLinear(linear)
    return ends


def _replace(model: nn.Module, name: str, part: nn.Module | dict[str, nn.Module]) -> nn.Module:
    """``model`` with the module of this name, or children of it, replaced."""
    if isinstance(part, dict):
        for child, replacement in part.items():
            setattr(model.get_submodule(name), child, replacement)
        return model
    if not name:
        return part
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
    return model
