"""Plain modules: whether calling one does what its class does and nothing else; what a plain norm gives to the ops."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from fused_resnet.ops.batch_norm import BatchNorm

UNFUSED = "_fused_resnet_unfused"
"""``fused_resnet.unfuse`` gives a norm an attribute of this name to have its site run the ordinary way."""

PlainNorm = nn.BatchNorm2d | nn.SyncBatchNorm
"""What the fused ops can stand for."""


class Snapshot:
    """What is inside a module; `holds` is False once a part was replaced, hooked, compiled or set otherwise. Of tensors
    nothing is known, nor of what was done to the module itself: whoever does not call it asks `is_intercepted`."""

    def __init__(self, module: nn.Module) -> None:
        everything = list(module.modules())
        self._children = [(inner._modules, tuple(inner._modules.values())) for inner in everything if inner._modules]
        self._parts = everything[1:]  # without the module, in whose __dict__ this may lie
        self._types = [type(part) for part in self._parts]
        self._own = [part.__dict__ for part in self._parts]
        self._hooks = [hooks for part in self._parts for hooks in _hooks_of(part)] + _global_hooks()
        found = [(part, settings) for part in self._parts if (settings := _settings_of(part)) is not None]
        self._settings = [(part, settings, settings(part)) for part, settings in found]

    def holds(self) -> bool:
        if any(self._hooks) or [*map(type, self._parts)] != self._types:
            return False
        for children, before in self._children:
            if tuple(children.values()) != before:
                return False
        for own in self._own:
            if "forward" in own or UNFUSED in own or own.get("_compiled_call_impl") is not None:
                return False
        for part, settings, before in self._settings:
            if settings(part) != before or (type(part) is nn.Conv2d and part._parameters.get("bias") is not None):
                return False
        return True


def is_intercepted(module: nn.Module) -> bool:
    """True if calling this module does more, or other, than its class's forward: hooks, a replaced or compiled one."""
    return any(_hooks_of(module)) or module._compiled_call_impl is not None or "forward" in module.__dict__


def has_global_hooks() -> bool:
    """True if torch.nn.modules.module has hooks that run for every module."""
    return any(_global_hooks())


def weight_of(conv: nn.Conv2d) -> Tensor:
    """``conv.weight``, past ``nn.Module.__getattr__``. FullyShardedDataParallel takes it from the parameters and leaves
    a plain attribute."""
    weight = conv._parameters.get("weight")
    return conv.weight if weight is None else weight


def batch_norm_arguments(norm: PlainNorm) -> BatchNorm:
    """What the norm's forward would give to ``F.batch_norm`` now; counts the batch where it would.

    Batch statistics normalise in training, and in eval when there are no running ones; the running statistics move in
    training when they are tracked; ``momentum=None`` makes them the average over all batches counted. An
    ``nn.SyncBatchNorm`` in training shares the statistics of its batch with the other ranks of its group.
    """
    # Past nn.Module.__getattr__, which costs as much for each tensor as all else here.
    buffers, momentum, training = norm._buffers, norm.momentum, norm.training
    running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    if not training:
        training = running_mean is None and running_var is None
    elif not norm.track_running_stats:
        running_mean = running_var = None
    elif _is_recomputation():
        running_mean = None if running_mean is None else running_mean.clone()
        running_var = None if running_var is None else running_var.clone()
    elif (counted := buffers["num_batches_tracked"]) is not None:
        counted.add_(1)
        if momentum is None:
            momentum = 1.0 / float(counted)
    if momentum is None:
        momentum = 0.0
    group = None if type(norm) is nn.BatchNorm2d else _process_group(norm)
    return BatchNorm(*_affine(norm), running_mean, running_var, training, momentum, norm.eps, group)


def _affine(norm: PlainNorm) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, as `weight_of`."""
    parameters = norm._parameters
    return (parameters["weight"], parameters["bias"]) if "weight" in parameters else (norm.weight, norm.bias)


def vectors_fit(norm: PlainNorm, channels: int, device: torch.device) -> bool:
    """True if the ops take the norm's vectors beside an activation of so many channels on this device."""
    takes = (channels,), device, True
    buffers = norm._buffers
    for vector in (*_affine(norm), buffers["running_mean"], buffers["running_var"]):
        if vector is not None and (vector.shape, vector.device, vector.is_floating_point()) != takes:
            return False
    return True


def _process_group(norm: PlainNorm) -> Any:
    """The ranks that ``nn.SyncBatchNorm.forward`` would share statistics with now; None if with no other."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None  # -1 for a rank outside the group


def _is_recomputation() -> bool:
    """True while autograd is in a backward pass, where ``torch.utils.checkpoint`` runs the forward a second time."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _hooks_of(part: nn.Module) -> list[dict[int, Any]]:
    return [part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks]


def _global_hooks() -> list[dict[int, Any]]:
    return [
        global_hooks._global_forward_hooks,
        global_hooks._global_forward_pre_hooks,
        global_hooks._global_backward_hooks,
        global_hooks._global_backward_pre_hooks,
    ]


def _settings_of(part: nn.Module) -> operator.attrgetter | None:
    """What a user may set on a part."""
    if isinstance(part, nn.Conv2d):
        return operator.attrgetter("stride", "padding", "dilation", "groups", "padding_mode")
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        names = ("training", "momentum", "eps", "track_running_stats", *(["activation"] * hasattr(part, "activation")))
        return operator.attrgetter(*names)
    return None
