"""What is compared with what: one network with the same weights, as plain PyTorch runs it and as this package does.

Plain PyTorch is measured in both memory formats, and is the better of the two whenever one number speaks for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import models
from fused_resnet.bench.timer import Timing
from fused_resnet.training.loop import autocast, start_run

MEMORY_FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
PLAIN = "plain"
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
    try:
        from torchvision.models import get_model
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision built for another torch
        return fused_resnet.unfuse(copy.deepcopy(model)), "fused_resnet.unfuse"
    twin = get_model(name, weights=None, num_classes=num_classes)
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
    frozen = fused_resnet.freeze(
        _placed(model, images, "channels_last").eval(),
        images.contiguous(memory_format=torch.channels_last),
        dtype=autocast_dtype,
        cuda_graph=images.is_cuda,
    )
    contenders = {
        f"{PLAIN} {memory_format}": _forward(
            _placed(plain, images, memory_format), images, memory_format, autocast_dtype
        )
        for memory_format in MEMORY_FORMATS
    }
    contenders[FUSED] = _forward(_placed(model, images, "channels_last"), images, "channels_last", autocast_dtype)
    contenders[FROZEN] = _forward(frozen, images, "channels_last", None)
    return contenders


def training_contenders(
    model: nn.Module,
    plain: nn.Module,
    images: Tensor,
    labels: Tensor,
    fused_formats: tuple[str, ...],
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Callable[[], Tensor]]:
    """Functions that run one training step on copies (forward, backward, SGD: `Run.step`) and give the loss.

    They are plain NCHW, plain channels_last, and fused in each of ``fused_formats``, such as "fused channels_last".
    Other arguments as in `inference_contenders`; ``labels`` is (N,) of int64.
    """
    pairs = [(PLAIN, plain, memory_format) for memory_format in MEMORY_FORMATS]
    pairs += [(FUSED, model, memory_format) for memory_format in fused_formats]
    return {
        f"{name} {memory_format}": _training_step(network, images, labels, memory_format, autocast_dtype)
        for name, network, memory_format in pairs
    }


def faster_format(name: str, timings: dict[str, Timing]) -> str:
    """The memory format in which the contender, measured as "<name> <memory format>" in each, has the lower median."""
    return min(MEMORY_FORMATS, key=lambda memory_format: timings[f"{name} {memory_format}"].median)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, as a fraction of the largest absolute value expected."""
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def _placed(model: nn.Module, images: Tensor, memory_format: str) -> nn.Module:
    placed = copy.deepcopy(model).to(images.device)
    return placed.to(memory_format=MEMORY_FORMATS[memory_format])  # type: ignore[call-overload]


def _forward(
    model: nn.Module, images: Tensor, memory_format: str, autocast_dtype: torch.dtype | None
) -> Callable[[], Tensor]:
    model.eval()
    images = images.contiguous(memory_format=MEMORY_FORMATS[memory_format])

    def forward() -> Tensor:
        with torch.inference_mode(), autocast(images, autocast_dtype):
            return model(images)

    return forward


def _training_step(
    model: nn.Module, images: Tensor, labels: Tensor, memory_format: str, autocast_dtype: torch.dtype | None
) -> Callable[[], Tensor]:
    run = start_run(
        _placed(model, images, memory_format),
        memory_format=MEMORY_FORMATS[memory_format],
        autocast_dtype=autocast_dtype,
    )
    images = images.contiguous(memory_format=run.memory_format)
    return lambda: run.step(images, labels)
