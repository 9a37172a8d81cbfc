"""The networks that can be measured, by name: torchvision's, timm's, this package's, the user's own."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet import models
from fused_resnet.bench.suite.torchvision_ops import import_or_none

LAST_NORM = (0.1, 0.3)
"""Weights of the last norm of a residual block: F(x) is small beside x, as it is in trained networks. With weights
near 1 a deep network amplifies rounding until a gradient in bfloat16 says nothing, and no mistake is seen in it."""
TORCHVISION, TIMM, USER, UNFUSED = "torchvision", "timm", "user", "fused_resnet.unfuse"


def builder_names() -> list[str]:
    """The names of this package's torchvision builders."""
    return [name for name in models.__all__ if name.startswith(("resne", "wide_resne"))]


def build(name: str, num_classes: int = 1000) -> nn.Module:
    """One of this package's networks, by the name of its builder."""
    if name not in builder_names():
        raise ValueError(f"name must be one of {', '.join(builder_names())}; got {name!r}")
    return getattr(models, name)(num_classes=num_classes)


@dataclass(frozen=True)
class Subject:
    """A network that was found.

    Attributes:
        name: what it was asked for as.
        source: whose code its plain PyTorch form is: "torchvision", "timm", "fused_resnet.unfuse" (torchvision's
            networks where that is not installed) or "user".
    """

    name: str
    source: str

    def build(self) -> nn.Module:
        """The plain PyTorch network, in eval mode, on the device of ``torch.device`` as a context, the CPU else.

        The same weights every time; none are downloaded. Norms get random weights and biases: fresh ones are the
        identity, or zero, and hide mistakes. What is random in training (dropout, layers left out) is switched off,
        so that results can be compared."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._make()
            if not isinstance(model, nn.Module):
                raise TypeError(f"{self.name} must give a torch.nn.Module; got {type(model).__name__}")
            _draw_norms(model)
        _switch_randomness_off(model)
        return fused_resnet.unfuse(model).eval()

    def without_memory(self, path: str = "") -> nn.Module:
        """The network, or the module at a path in it, on the meta device."""
        with torch.device("meta"):
            return self.build().get_submodule(path)

    def _make(self) -> Any:
        if self.source == USER:
            return _callable(self.name)()
        if self.source == TIMM:
            return importlib.import_module("timm").create_model(self.name.removeprefix("timm:"), pretrained=False)
        if self.source == TORCHVISION:
            return importlib.import_module("torchvision.models").get_model(self.name, weights=None)
        return getattr(models, self.name)()


def find_subject(name: str) -> Subject:
    """The network of this name: torchvision's, this package's where that is missing, "timm:NAME", "module:callable"."""
    library = import_or_none("torchvision.models")
    known = [*builder_names(), *([] if library is None else library.list_models(module=library))]
    if name.startswith("timm:"):
        if (timm := import_or_none("timm")) is None:
            raise ValueError(f"a model named {name!r} needs timm, which cannot be imported here")
        known = [f"timm:{model}" for model in timm.list_models()]
        if name in known:
            return Subject(name, TIMM)
    elif ":" in name:
        _callable(name)
        return Subject(name, USER)
    elif name in known:
        return Subject(name, UNFUSED if library is None else TORCHVISION)
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=4)
    told = f"; close to it are {', '.join(close)}" if close else ""
    told += "" if library is not None else "; torchvision cannot be imported here"
    raise ValueError(f'no model is named {name!r}{told}. timm\'s are "timm:NAME", your own "package.module:callable"')


def _callable(name: str) -> Any:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"the model {name!r} is not there: {error}") from error
    if not callable(found):
        raise ValueError(f"the model {name!r} must be a callable; got {type(found).__name__}")
    return found


def is_residual_block(module: nn.Module) -> bool:
    """Whether it has the children of a residual block: torchvision's, timm's, this package's and their like."""
    children = dict(module.named_children())
    names = ("conv1", "bn1", "conv2", "bn2")
    return all(name in children for name in names) and not any(name.startswith("layer") for name in children)


def settle_statistics(model: nn.Module, images: Tensor) -> None:
    """Sets every BatchNorm's running statistics to those of ``images``, by one training forward.

    A fresh network has running statistics of 0 and 1, with which activations grow from block to block; no trained
    network is like that. The model's mode and momenta are left as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta, was_training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


def _draw_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    for block in filter(is_residual_block, model.modules()):
        weight = getattr(getattr(block, "bn3", block.bn2), "weight", None)
        if isinstance(weight, nn.Parameter):
            nn.init.uniform_(weight, *LAST_NORM)


def _switch_randomness_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
        for name in ("drop_prob", "drop_rate", "dropout"):  # timm's DropPath; networks that call F.dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
