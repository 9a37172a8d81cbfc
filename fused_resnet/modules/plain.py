"""Plain modules: whether calling one does what its class does and nothing else, and whether it is as it was; what a
plain norm gives to the ops."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _disable_current_modes

from fused_resnet.arguments import ConvSettings
from fused_resnet.ops.backends.extension import extension
from fused_resnet.ops.batch_norm import BatchNorm
from fused_resnet.ops.layout import PLAIN

UNFUSED = "_fused_resnet_unfused"
"""``fused_resnet.unfuse`` gives a norm an attribute of this name to have its site run the ordinary way."""

FROZEN = "_fused_resnet_frozen"
"""``fused_resnet.freeze`` gives a module of its copy an attribute of this name, which runs its forward if it can."""

METHODS = frozenset(
    (
        "forward",
        "_forward_impl",
        "_conv_forward",
        "_check_input_dim",
        "_call_impl",
        "_slow_forward",
        "__call__",
        "_wrapped_call_impl",
    )
)
"""What calling a module runs: another one, in its class or set on the module itself, may do anything."""
FUNCTIONS = operator.attrgetter("conv2d", "batch_norm", "relu", "max_pool2d", "adaptive_avg_pool2d", "linear")
"""Of torch.nn.functional, what the forwards of PyTorch's modules call."""
WRITTEN_FUNCTIONS = FUNCTIONS(F)
"""They, as they were when this was imported."""

PlainNorm = nn.BatchNorm2d | nn.SyncBatchNorm
"""What the fused ops can stand for."""


class Snapshot:
    """What is inside a module; `holds` is False once a part was replaced, hooked, compiled, patched or set otherwise.
    Of what was done to the module itself nothing is known: whoever does not call it asks `is_intercepted`.

    Args:
        module: any.
        tensors: whether its parameters and buffers count too: which they are, where they lie, and what was written to
            them, as far as PyTorch counts that (not through ``.data``). Nobody counts what is written to an inference
            tensor, or knows what a subclass of Tensor means: then nothing holds.
    """

    def __init__(self, module: nn.Module, tensors: bool = False) -> None:
        everything = list(module.modules())
        self._parts = everything[1:]  # without the module, in whose __dict__ this may lie
        self._types = [*map(type, self._parts)]
        self._methods = [found for kind in dict.fromkeys(map(type, everything)) for found in methods_of(kind)]
        own = [part.__dict__ for part in self._parts]
        tables = [table for inner in everything for table in (inner._parameters, inner._buffers)] if tensors else []
        hooks = [hooks for part in self._parts for hooks in hooks_of(part)] + global_hooks()
        self._unchanged = Unchanged([*own, *hooks, *tables, *(inner._modules for inner in everything)])
        self._convs = [part for part in self._parts if type(part) is nn.Conv2d and part._parameters.get("bias") is None]
        marked = [tensor for table in tables for tensor in table.values() if tensor is not None]
        self._marks = Marks(marked) if tensors else None

    def holds(self) -> bool:
        if not self._unchanged.holds() or [*map(type, self._parts)] != self._types:
            return False
        for kind, methods, before in self._methods:
            if methods(kind) != before:
                return False
        if any([conv._parameters.get("bias") is not None for conv in self._convs]):
            return False
        return FUNCTIONS(F) == WRITTEN_FUNCTIONS and (self._marks is None or self._marks.hold())


class Marks:
    """Of tensors, by which one sees that they were moved or written to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._counted = all(type(each) in PLAIN and not each.is_inference() for each in tensors)
        self._matrices = [each for each in tensors if each.dim() > 1]
        self._before = self._now() if self._counted else ()

    def hold(self) -> bool:
        return self._counted and self._now() == self._before

    def hold_for(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the same tensors, and `hold`."""
        same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        return same and self.hold()

    def _now(self) -> tuple[list[Any], ...]:
        return (
            [each._version for each in self._tensors],
            [each.data_ptr() for each in self._tensors],
            [each.stride() for each in self._matrices],
        )


class _Unchanged:
    """Whether dicts still hold the very values that they held, in the same order."""

    def __init__(self, dicts: list[dict[Any, Any]]) -> None:
        self._values = [(each, list(each.values())) for each in dicts]

    def holds(self) -> bool:
        for each, before in self._values:
            if len(each) != len(before) or any(
                now is not then for now, then in zip(each.values(), before, strict=True)
            ):
                return False
        return True


Unchanged = _Unchanged if extension is None else extension.Unchanged


def frozen_forward(module: nn.Module, x: Tensor) -> Tensor | None:
    """The module's forward as ``fused_resnet.freeze`` has it run; None where it runs itself."""
    frozen = None if torch.compiler.is_compiling() else module.__dict__.get(FROZEN)
    return None if frozen is None else frozen(module, x)


def is_intercepted(module: nn.Module) -> bool:
    """True if calling this module does more, or other, than its class's forward as it was written: hooks, a method that
    was replaced, in the module or in its class, or a compiled one."""
    if any(hooks_of(module)) or module._compiled_call_impl is not None:
        return True
    own = module.__dict__
    if torch.compiler.is_compiling():  # which traces what the methods are now
        return "forward" in own or "_conv_forward" in own
    return not own.keys().isdisjoint(METHODS) or not has_own_methods(type(module))


def has_own_methods(kind: type[nn.Module]) -> bool:
    """True if a module of this class is called by the methods that stand in the file of the class, or of its bases."""
    found = _own_methods.get(kind)
    if found is None:
        found = methods_of(kind)
        if not all(_is_own(cls, name) for cls, _, _ in found for name in METHODS):
            return False
        _own_methods[kind] = found
    return all(methods(cls) == before for cls, methods, before in found)


def is_patched() -> bool:
    """True if somebody has put a function of their own in the place of one that PyTorch's modules call."""
    return not torch.compiler.is_compiling() and FUNCTIONS(F) != WRITTEN_FUNCTIONS


def methods_of(kind: type[nn.Module]) -> list[tuple[type, operator.attrgetter, Any]]:
    """What calling a module of this class runs, or would run but for a class in front: each class, how to ask it for
    its methods, and what it answers now."""
    classes = [kind] + [
        cls for cls in kind.__mro__[1:] if cls is not nn.Module and vars(cls).get("forward") not in (None, kind.forward)
    ]
    getters = [(cls, operator.attrgetter(*[name for name in sorted(METHODS) if hasattr(cls, name)])) for cls in classes]
    return [(cls, methods, methods(cls)) for cls, methods in getters]


def _is_own(kind: type, name: str) -> bool:
    cls = next((cls for cls in kind.__mro__ if name in vars(cls)), None)
    if cls is None:
        return True
    home, written_in = sys.modules.get(cls.__module__), getattr(vars(cls)[name], "__globals__", None)
    return home is not None and (written_in is vars(home) or _is_ours(written_in))


def _is_ours(written_in: dict[str, Any] | None) -> bool:
    """True of what stands in this package: `modules/torchvision.py` writes methods for classes of other files."""
    package = (written_in or {}).get("__package__") or ""  # None in a script
    return package.partition(".")[0] == "fused_resnet"


_own_methods: dict[type[nn.Module], list[tuple[type, operator.attrgetter, Any]]] = {}


def has_global_hooks() -> bool:
    """True if torch.nn.modules.module has hooks that run for every module."""
    return any(global_hooks())


def weight_of(conv: nn.Conv2d) -> Tensor:
    """``conv.weight``, past ``nn.Module.__getattr__``. FullyShardedDataParallel takes it from the parameters and leaves
    a plain attribute."""
    weight = conv._parameters.get("weight")
    return conv.weight if weight is None else weight


def settings_of(conv: nn.Conv2d) -> ConvSettings:
    """How the convolution moves. What was set on it afterwards may be a number for both directions."""
    return ConvSettings(pair(conv.stride), pair(conv.padding), pair(conv.dilation), conv.groups)


def pair(value: Any) -> tuple[int, int]:
    """Vertical and horizontal, from one number or two."""
    vertical, horizontal = (value, value) if isinstance(value, int) else value
    return int(vertical), int(horizontal)


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
        with _disable_current_modes():  # selective checkpointing counts the ops of a forward
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
    """True if the ops take the norm's vectors beside an activation of so many channels on this device. Not to be
    compiled."""
    if not norm.eps > 0:  # which F.batch_norm refuses
        return False
    takes = True, (channels,), device, True, False
    buffers = norm._buffers
    for vector in (*_affine(norm), buffers["running_mean"], buffers["running_var"]):
        if vector is None:
            continue
        if (type(vector) in PLAIN, vector.shape, vector.device, vector.is_floating_point(), vector.is_neg()) != takes:
            return False
    return True


def _process_group(norm: PlainNorm) -> Any:
    """The ranks that ``nn.SyncBatchNorm.forward`` would share statistics with now; None if with no other."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None  # -1 for a rank outside the group


def _is_recomputation() -> bool:
    """True inside a forward that autograd's backward runs a second time: by ``torch.utils.checkpoint``, or by any
    ``autograd.Function``'s backward. Not inside a hook that happens to run a forward of its own."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        function = frame.f_code
        if function is _FUNCTION:
            return True
        if function.co_name == "unpack_hook" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        if function is _ENGINE:
            return False
        frame = frame.f_back
    return False


_ENGINE = torch.autograd.graph._engine_run_backward.__code__
_FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__


def has_memory(tensor: Tensor) -> bool:
    """False of a tensor whose storage was freed, as sharding and offloading do: PyTorch refuses to compute with it."""
    return tensor.data_ptr() != 0 or tensor.numel() == 0


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def hooks_of(part: nn.Module) -> list[dict[int, Any]]:
    return [part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks]


def global_hooks() -> list[dict[int, Any]]:
    return [
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    ]
