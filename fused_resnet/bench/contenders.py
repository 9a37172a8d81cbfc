"""What is compared with what: one network with the same weights, as plain PyTorch runs it and as this package does.

Plain PyTorch is measured in both memory formats, and is the better of the two whenever one number speaks for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import models
from fused_resnet.bench.suite.torchvision_ops import torchvision_models
from fused_resnet.bench.timer import Timing
from fused_resnet.training.loop import autocast, start_run

PLAIN = "plain"
PLAIN_FORMATS = {"plain NCHW": torch.contiguous_format, "plain channels_last": torch.channels_last}
FUSED = "fused"
FROZEN = "frozen"


def builder_names() -> list[str]:
    """The names of this package's torchvision builders."""
    return [name for name in models.__all__ if name.startswith(("resne", "wide_resne"))]


def build(name: str, num_classes: int = 1000) -> nn.Module:
    """One of this package's networks, by the name of its builder.

    Raises:
        ValueError: there is no builder of this name.
    """
    if name not in builder_names():
        raise ValueError(f"name must be one of {', '.join(builder_names())}; got {name!r}")
    return getattr(models, name)(num_classes=num_classes)


def plain_twin(model: nn.Module, name: str, num_classes: int = 1000) -> tuple[nn.Module, str]:
    """(the plain PyTorch network with the weights of ``model``, where its code comes from).

    The code is torchvision's where torchvision can be imported, else this package's after ``unfuse``, which runs the
    same operations.
    """
    torchvision = torchvision_models()
    if torchvision is None:
        return fused_resnet.unfuse(copy.deepcopy(model)), "fused_resnet.unfuse"
    twin = torchvision.get_model(name, weights=None, num_classes=num_classes)
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training), "torchvision"


def settle_statistics(model: nn.Module, images: Tensor) -> None:
    """Sets every BatchNorm's running statistics to those of ``images``, by one training forward.

    A fresh network has running statistics of 0 and 1, with which activations grow from block to block; no trained
    network is like that. The model's mode and momenta are left as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


def inference_contenders(
    model: nn.Module, plain: nn.Module, images: Tensor, autocast_dtype: torch.dtype | None = None
) -> dict[str, Callable[[], Tensor]]:
    """Functions that give the logits of ``images``: plain NCHW, plain channels_last, fused, frozen.

    Args:
        model: this package's network; ``plain`` its twin with the same weights. Neither is changed.
        images: (N, 3, H, W) in float32 on the device to run on.
        autocast_dtype: plain and fused run under autocast to it, and freeze packs its weights in it.
    """
    channels_last = images.contiguous(memory_format=torch.channels_last)
    fused = _placed(model, images, torch.channels_last).eval()
    frozen = fused_resnet.freeze(fused, channels_last, dtype=autocast_dtype, cuda_graph=images.is_cuda)
    contenders = {
        name: _forward(
            _placed(plain, images, memory_format), images.contiguous(memory_format=memory_format), autocast_dtype
        )
        for name, memory_format in PLAIN_FORMATS.items()
    }
    return contenders | {
        FUSED: _forward(fused, channels_last, autocast_dtype),
        FROZEN: _forward(frozen, channels_last, None),
    }


def training_contenders(
    model: nn.Module, plain: nn.Module, images: Tensor, labels: Tensor, autocast_dtype: torch.dtype | None = None
) -> dict[str, Callable[[], Tensor]]:
    """Functions that run one training step on copies (forward, backward, SGD: `Run.step`) and give the loss.

    They are plain NCHW, plain channels_last and fused. Arguments as in `inference_contenders`; ``labels`` is (N,) of
    int64.
    """
    contenders = {
        name: _training_step(plain, images, labels, memory_format, autocast_dtype)
        for name, memory_format in PLAIN_FORMATS.items()
    }
    contenders[FUSED] = _training_step(model, images, labels, torch.channels_last, autocast_dtype)
    return contenders


def faster_plain(timings: Mapping[str, Timing]) -> str:
    """The name of the plain contender with the lower median."""
    return min(PLAIN_FORMATS, key=lambda name: timings[name].median)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, as a fraction of the largest absolute value expected."""
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def _placed(model: nn.Module, images: Tensor, memory_format: torch.memory_format) -> nn.Module:
    placed = copy.deepcopy(model).to(images.device)
    return placed.to(memory_format=memory_format)  # type: ignore[call-overload]


def _forward(model: nn.Module, images: Tensor, autocast_dtype: torch.dtype | None) -> Callable[[], Tensor]:
    model.eval()

    def forward() -> Tensor:
        with torch.inference_mode(), autocast(images, autocast_dtype):
            return model(images)

    return forward


def _training_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    memory_format: torch.memory_format,
    autocast_dtype: torch.dtype | None,
) -> Callable[[], Tensor]:
    run = start_run(_placed(model, images, memory_format), memory_format=memory_format, autocast_dtype=autocast_dtype)
    images = images.contiguous(memory_format=memory_format)
    return lambda: run.step(images, labels)
