"""What ``weights=`` of a model builder takes, and how it is read.

===================================== ===========================================================================
weights                               read from
===================================== ===========================================================================
``ResNet50_Weights.IMAGENET1K_V2``    torchvision's download, kept in torch's hub folder; sets ``num_classes`` too
``"IMAGENET1K_V2"``, ``"DEFAULT"``,   the same, named within the builder's own enum or in full
``"ResNet50_Weights.IMAGENET1K_V2"``
``"checkpoint.pth"``, a ``Path``      ``torch.load(path, map_location="cpu", weights_only=True)``
a state_dict                          itself
===================================== ===========================================================================

A file or mapping may be a bare state_dict, or one wrapped as training scripts save it: under the key "state_dict",
"model" or "model_state_dict", with "module." (DistributedDataParallel) or "_orig_mod." (torch.compile) before
every name. A string that looks like a name (such as "IMAGENET1K_V1") is a name; a file called that needs a ``Path``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias

import torch

WeightsArgument: TypeAlias = Enum | str | os.PathLike[str] | Mapping[str, Any] | None
WeightsSource: TypeAlias = Enum | Path | Mapping[str, Any] | None

WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_ENUM_NAME = re.compile(r"(\w+_\w*Weights\.)?[A-Z][A-Z0-9_]*")


def resolve_weights(architecture: str, weights: WeightsArgument) -> WeightsSource:
    """What ``weights`` stands for: a member of torchvision's enum, the path of a file that is there, or a mapping.

    Nothing is read or downloaded yet, so mistakes surface before a model is built.

    Args:
        architecture: torchvision's name of the builder, such as "resnet50".
        weights: see the head of this file; None gives None.

    Raises:
        ValueError: an enum member of another architecture, or a name that is not in this architecture's enum.
        FileNotFoundError: there is no such file.
        ImportError: the weights are torchvision's and torchvision cannot be imported.
        TypeError: weights is none of these things.
    """
    if weights is None or isinstance(weights, Mapping):
        return weights
    if isinstance(weights, Enum):
        return _own_member(architecture, weights)
    if isinstance(weights, str) and _ENUM_NAME.fullmatch(weights):
        return _named_member(architecture, weights)
    if isinstance(weights, (str, os.PathLike)):
        return _existing_file(weights)
    raise TypeError(
        "weights must be a torchvision weights enum member or its name, the path of a checkpoint, a state_dict or "
        f"None; got {type(weights).__name__}"
    )


def with_older_arguments(architecture: str, positional: tuple[Any, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    """All of them by name: ``weights`` and ``progress`` may be given by their place, or ``pretrained``, as torchvision
    still takes them; it warns of both.

    Raises:
        TypeError: more than two by their place, or one twice.
    """
    names = ("weights", "progress")[: len(positional)]
    if len(positional) > 2 or any(name in arguments for name in names) or {"weights", "pretrained"} <= {*arguments}:
        raise TypeError(f"{architecture} takes weights and progress, each once, and the rest by name")
    arguments = {**dict(zip(names, positional, strict=True)), **arguments}
    if names:
        warnings.warn(f"give {architecture} its {' and '.join(names)} by name", FutureWarning, stacklevel=3)
    for name in [
        name for name in ("pretrained", *names) if isinstance(arguments.get(name), bool) and name != "progress"
    ]:
        weights = "IMAGENET1K_V1" if arguments.pop(name) else None
        warnings.warn(f"instead of {name}, give {architecture} weights={weights!r}", FutureWarning, stacklevel=3)
        arguments["weights"] = weights
    return arguments


def with_num_classes(source: WeightsSource, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments with the ``num_classes`` that torchvision's weights were trained for.

    Raises:
        ValueError: ``kwargs`` asks for another number. To fine-tune, load first and then replace ``model.fc``.
    """
    if not isinstance(source, Enum):
        return dict(kwargs)
    trained = len(source.value.meta["categories"])
    asked = kwargs.get("num_classes", trained)
    if asked != trained:
        raise ValueError(
            f"num_classes must be {trained} for weights={source!r}; got {asked}. "
            "To fine-tune, build with these weights first and then replace model.fc"
        )
    return {**kwargs, "num_classes": trained}


def read_state_dict(source: Enum | Path | Mapping[str, Any], progress: bool = True) -> Mapping[str, Any]:
    """The state_dict of a resolved source, on the CPU (a mapping's tensors stay where they are).

    Args:
        source: what ``resolve_weights`` gave.
        progress: show a progress bar while torchvision downloads.

    Raises:
        TypeError: the file holds something that is not a mapping.
        pickle.UnpicklingError: the file holds more than tensors and plain containers (``weights_only=True``).
    """
    if isinstance(source, Enum):
        return source.get_state_dict(progress=progress, check_hash=True, map_location="cpu", weights_only=True)  # type: ignore[attr-defined]
    if isinstance(source, Path):
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, Mapping):
            raise TypeError(f"weights={str(source)!r} must hold a state_dict; it holds a {type(checkpoint).__name__}")
        source = checkpoint
    return _unwrapped(source)


def _unwrapped(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in WRAPPER_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    while prefix := _shared_prefix(checkpoint):
        checkpoint = _without_prefix(checkpoint, prefix)
    return checkpoint


def _shared_prefix(state_dict: Mapping[str, Any]) -> str | None:
    """The wrapper's prefix that every name begins with."""
    for prefix in WRAPPER_PREFIXES:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            return prefix
    return None


def _without_prefix(state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """A new state_dict; the modules' version numbers (``_metadata``), which load_state_dict reads, come along."""
    stripped = OrderedDict((name.removeprefix(prefix), tensor) for name, tensor in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        stripped._metadata = {  # type: ignore[attr-defined]
            f"{name}.".removeprefix(prefix).removesuffix("."): version
            for name, version in versions.items()
            if f"{name}.".startswith(prefix)
        }
    return stripped


def _own_member(architecture: str, member: Enum) -> Enum:
    own = _torchvision_weights(architecture)
    if not isinstance(member, own):
        raise ValueError(f"weights of {architecture} must be a member of {own.__name__}; got {member!r}")
    return member


def _named_member(architecture: str, name: str) -> Enum:
    own = _torchvision_weights(architecture)
    enum_name, _, member_name = name.rpartition(".")
    if enum_name not in ("", own.__name__):
        raise ValueError(f"weights of {architecture} must be a member of {own.__name__}; got {name!r}")
    if member_name not in own.__members__:
        raise ValueError(f"weights of {architecture} must be one of {', '.join(own.__members__)}; got {name!r}")
    return own[member_name]


def _existing_file(path: str | os.PathLike[str]) -> Path:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"weights={os.fspath(path)!r} is neither a file nor the name of torchvision weights (such as 'DEFAULT')"
        )
    return Path(path)


def _torchvision_weights(architecture: str) -> type[Enum]:
    try:
        from torchvision.models import get_model_weights
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators do not fit this torch
        raise ImportError(
            f"these weights of {architecture} come through torchvision, which cannot be imported here ({error}); "
            "install the torchvision that pairs with this torch, or give weights= a path or a state_dict"
        ) from error
    return get_model_weights(architecture)
