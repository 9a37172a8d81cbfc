"""``fuse`` and ``unfuse``: which forward a module runs. Nothing that a module holds is made, moved or copied."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TypeVar

import torch
from torch import nn

from fused_resnet.convert.sites import fusion_sites
from fused_resnet.modules.basic_block import BasicBlock
from fused_resnet.modules.bottleneck import Bottleneck
from fused_resnet.modules.plain import METHODS, UNFUSED, has_own_methods
from fused_resnet.modules.whole_block import MEMORY, WHOLE
from fused_resnet.ops.residual_block import check_memory

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, memory: str = "default") -> Model:
    """Has the residual blocks in ``model`` run BatchNorm, residual add and ReLU as one pass; in place, exactly undone
    by ``unfuse``.

    Every module whose class is exactly torchvision's ``BasicBlock``, ``Bottleneck`` or ``ResNet`` gets our forward.
    Parameters, buffers, hooks, names, ``state_dict`` and optimizers stay valid, and the outputs are the same up to
    rounding. This package's own modules are fused from the start; after ``unfuse`` they are so again. Everything else
    is left as it is, wrappers (DistributedDataParallel, torch.compile) are looked into, and ``fusion_report`` says what
    was done. Call it before ``fully_shard``, which changes classes too. A second call changes nothing.

    Args:
        model: any module; itself or its descendants are changed.
        memory: what a residual block in training keeps for its backward. "default": what is fastest here. "efficient":
            its input, its result and the outputs of all its convolutions but the last, which is computed again; about
            half of what PyTorch keeps, for one more convolution a block in backward (``ops.residual_block``).

    Returns:
        The model it was given.

    Raises:
        ValueError: for another ``memory``.
        TypeError: model is not an ``nn.Module``, or a ``torch.jit.ScriptModule``, whose code is already fixed.
    """
    _check(model)
    check_memory(memory)
    fused_class = torchvision_classes()
    for module in model.modules():
        if type(module) in fused_class and has_own_methods(type(module)) and METHODS.isdisjoint(module.__dict__):
            module.__class__ = fused_class[type(module)]
        module.__dict__.pop(UNFUSED, None)
        module.__dict__.pop(MEMORY, None)
        if isinstance(module, (BasicBlock, Bottleneck)) and memory != "default":
            module.__dict__[MEMORY] = memory
    if not any(fusion_sites(module) for module in model.modules()):
        warnings.warn(
            f"{type(model).__name__} contains no block that can be fused; fusion_report says why", stacklevel=2
        )
    return model


def unfuse(model: Model) -> Model:
    """Has every module in ``model`` run the ordinary way, one PyTorch module after the other: undoes ``fuse``.

    torchvision's modules get their own class back. This package's modules keep theirs and call their children one by
    one. Either way the outputs are, bit for bit, those of the plain PyTorch modules.

    Arguments, result and errors are those of ``fuse``.
    """
    _check(model)
    plain_class = {fused: plain for plain, fused in torchvision_classes().items()}
    for module in model.modules():
        if type(module) in plain_class:
            module.__class__ = plain_class[type(module)]
        module.__dict__.pop(MEMORY, None)
        module.__dict__.pop(WHOLE, None)
        for site in fusion_sites(module):
            for norm in site.norms:
                module.get_submodule(norm).__dict__[UNFUSED] = True
    return model


def torchvision_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """torchvision's classes and those that take their place; empty while torchvision's are not imported."""
    if "torchvision.models.resnet" not in sys.modules:
        return {}
    return importlib.import_module("fused_resnet.models.torchvision").FUSED_CLASS


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a torch.nn.Module before torch.jit.script or trace; got a ScriptModule")
