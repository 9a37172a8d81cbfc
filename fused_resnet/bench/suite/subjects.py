"""The networks that can be measured, by name: torchvision's, timm's, this package's, the user's own."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fused_resnet
from fused_resnet import models
from fused_resnet.bench.contenders import builder_names
from fused_resnet.bench.suite.torchvision_ops import timm, torchvision_models

LAST_NORM = (0.1, 0.3)
"""Weights of the last norm of a residual block: F(x) is small beside x, as it is in trained networks. With weights
near 1 a deep network amplifies rounding until a gradient in bfloat16 says nothing, and no mistake is seen in it."""
TIMM = "timm:"
SEED = 0
ONE_OUTPUT = {"aux_logits": False, "init_weights": True}
TWO_OUTPUTS = ("googlenet", "inception_v3")
"""They give more than the logits in training unless they are asked not to."""


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
        so that results can be compared.

        Raises:
            TypeError: the user's callable gives something else than a module.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self._make()
            if not isinstance(model, nn.Module):
                raise TypeError(f"{self.name} must give a torch.nn.Module; got {type(model).__name__}")
            _draw_norms(model)
        _without_randomness(model)
        return fused_resnet.unfuse(model).eval()

    def without_memory(self, path: str = "") -> nn.Module:
        """The network, or the module at a path in it, on the meta device."""
        with torch.device("meta"):
            return self.build().get_submodule(path)

    def _make(self) -> Any:
        if self.source == "user":
            return _callable(self.name)()
        if self.source == "timm":
            library = timm()
            assert library is not None
            return library.create_model(self.name.removeprefix(TIMM), pretrained=False)
        if self.source == "torchvision":
            library = torchvision_models()
            assert library is not None
            return library.get_model(self.name, weights=None, **(ONE_OUTPUT if self.name in TWO_OUTPUTS else {}))
        return getattr(models, self.name)()


def find_subject(name: str) -> Subject:
    """The network of this name.

    Args:
        name: of one of torchvision's classification models, or of timm's ("timm:resnet50", or without the prefix
            where torchvision has no such model); or "package.module:callable", which is called without arguments and
            gives a module from (N, 3, S, S) to (N, classes).

    Raises:
        ValueError: nothing has this name; the message says what comes close, and which library is not installed.
    """
    if name.startswith(TIMM):
        return _of_timm(name)
    if ":" in name:
        _callable(name)
        return Subject(name, "user")
    library = torchvision_models()
    if library is not None and name in library.list_models(module=library):
        return Subject(name, "torchvision")
    if name in builder_names():
        return Subject(name, "fused_resnet.unfuse")
    of_timm = timm()
    if of_timm is not None and of_timm.is_model(name):
        return Subject(name, "timm")
    known = [*([] if library is None else library.list_models(module=library)), *builder_names()]
    missing = [title for title, found in (("torchvision", library), ("timm", of_timm)) if found is None]
    raise ValueError(_unknown(name, known + ([] if of_timm is None else of_timm.list_models()), missing))


def _of_timm(name: str) -> Subject:
    library = timm()
    if library is None:
        raise ValueError(f"a model named {name!r} needs timm, which cannot be imported here")
    if not library.is_model(name.removeprefix(TIMM)):
        raise ValueError(_unknown(name, [TIMM + model for model in library.list_models()], []))
    return Subject(name, "timm")


def _unknown(name: str, known: list[str], missing: list[str]) -> str:
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=4, cutoff=0.6)
    message = f"no model is named {name!r}"
    if close:
        message += f"; close to it are {', '.join(close)}"
    if missing:
        message += f"; {' and '.join(missing)} cannot be imported here"
    return message + '. A model of your own is "package.module:callable"'


def is_residual_block(module: nn.Module) -> bool:
    """Whether it has the children of a residual block: torchvision's, timm's, this package's and their like."""
    children = dict(module.named_children())
    names = ("conv1", "bn1", "conv2", "bn2")
    return all(name in children for name in names) and not any(name.startswith("layer") for name in children)


def _callable(name: str) -> Any:
    path, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(f"the model {name!r} is not there: {path!r} cannot be imported ({error})") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=4)
            hint = f"; close to it are {', '.join(close)}" if close else ""
            raise ValueError(f"the model {name!r} is not there: {path!r} has no {attribute!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"the model {name!r} must be a callable; got {type(found).__name__}")
    return found


def _draw_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    for module in model.modules():
        if is_residual_block(module):
            children = dict(module.named_children())
            weight = getattr(children.get("bn3", children["bn2"]), "weight", None)
            if isinstance(weight, nn.Parameter):
                nn.init.uniform_(weight, *LAST_NORM)


def _without_randomness(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0  # type: ignore[assignment]
        for name in ("drop_prob", "drop_rate", "dropout"):  # timm's DropPath; networks that call F.dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
