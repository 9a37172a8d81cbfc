"""Which code runs an op: the backends, what each cannot do and why, and how a user asks for one.

A backend is a module that exports functions named as in ``ops/reference/``:

========== ============================================== =====================================
name       module                                         where
========== ============================================== =====================================
cuda       ``fused_resnet.ops.backends.cuda`` over ``_C.cuda``     CUDA, channels_last
triton     ``fused_resnet.kernels``                       CUDA, channels_last
native     ``fused_resnet.ops.backends.native`` over ``_C``        CPU, channels_last and contiguous
separate   ``fused_resnet.ops.backends.separate``                  everywhere, for convolutions
reference  ``fused_resnet.ops.reference``                 everywhere, float64 too
========== ============================================== =====================================

The automatic choice is the first of these with no reason against it, but for convolutions that Triton is expected to
do faster (``ops/route/preference.py``); ``reference`` never has one. An explicit request
(``use_backend``, or ``FUSED_RESNET_BACKEND`` in the environment) runs there or raises with every reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.layout import is_channels_last_once_dense
from fused_resnet.ops.route import measured_plan
from fused_resnet.ops.route.preference import ranking
from fused_resnet.ops.route.reasons import (
    FUSED_DTYPES,
    MODULES,
    argument_names,
    module,
    reasons_against,
    unavailable,
    why_not_device,
)
from fused_resnet.ops.schemas import SCHEMAS, library

ENVIRONMENT_VARIABLE = "FUSED_RESNET_BACKEND"
AUTO = "auto"
MOST_REMEMBERED = 64
MOST_CONVOLUTIONS = 4096

_trains_natively: dict[tuple[Any, ...], bool] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this op on these tensors; the message lists every reason."""


def why_not(backend: str, op: str, *args: Any) -> list[str]:
    """The reasons why ``backend`` cannot run ``op`` on these arguments; an empty list means that it can.

    One that cannot run in this process at all says only that.

    Args:
        backend: "cuda", "triton", "native", "separate" or "reference".
        op: a name in ``ops/schemas.py``, such as "bn_apply".
        args: the op's arguments in the order of its schema.
    """
    _known(backend)
    if op not in tuple(SCHEMAS):
        raise ValueError(f"op must be one of {', '.join(SCHEMAS)}; got {op!r}")
    names = argument_names(op)
    if len(args) != len(names):
        raise TypeError(f"args must be those of {op}, ({', '.join(names)}); got {len(args)} of them")
    return list(reasons_against(backend, op, args))


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """``with use_backend(name):`` runs every op inside on this backend ("auto" for the automatic choice).

    For the whole process, not only this thread: autograd runs backward in threads of its own.

    Raises:
        ValueError: there is no backend of this name.
        BackendError: it cannot run in this process; inside the ``with``, an op raises it for tensors it cannot take.
    """
    if name != AUTO:
        _known(name)
        if reasons := unavailable(name):
            raise BackendError(_refusal(name, "any op", reasons))
    return _using(name)


@contextlib.contextmanager
def _using(name: str) -> Iterator[None]:
    global _requested
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def requested_backend() -> str:
    """The backend asked for by ``use_backend``, else by the environment when this was imported, else "auto"."""
    return _requested


def empty_cache() -> None:
    """Gives the memory that the CPU kernels keep of freed outputs, 1 GiB at most, back to the system."""
    if not unavailable("native"):
        module("native").empty_cache()


def has_fused_backend(x: Tensor) -> bool:
    """True if a bn op on x has a body of its own here; else PyTorch's own batch_norm, add and relu are faster.

    An explicitly requested backend, the reference included, always has; inside ``torch.func`` and forward-mode
    differentiation, and for subclasses of Tensor (DTensor), which take PyTorch's own ops only, none has.
    """
    if is_transformed() or not (type(x) in (Tensor, Parameter) or torch.compiler.is_compiling()):
        return False
    if _requested != AUTO:
        return True
    if x.dtype not in FUSED_DTYPES or x.numel() == 0:
        return False
    if x.device.type == "cuda":
        return (_works("cuda", x.device) or _works("triton", x.device)) and is_channels_last_once_dense(x)
    return x.device.type == "cpu" and _works("native", x.device)


def runs_in_cuda(op: str, args: tuple[Any, ...]) -> bool:
    """True if the CUDA C++ kernels run ``op`` on these arguments, automatically or asked for."""
    if torch.compiler.is_compiling() or _requested not in (AUTO, "cuda"):
        return False
    return not reasons_against("cuda", op, args)


def passes_for(x: Tensor, *others: Tensor) -> Any:
    """Whose functions run the passes over x, and over others of its shape, that the caller has checked: the ops of
    PyTorch's dispatcher, which choose for every call; or a backend itself, where that is the choice and nobody listens
    at the dispatcher. The way through it and the choice would cost as much again as all else that Python does for a
    launch. (Profilers then see the kernels, and not the ops.)"""
    usual = "cuda" if _cuda_takes(x) else "native" if _native_takes(x) else None
    if usual is None or is_listened_to() or any(map(_is_batched, others)):
        return torch.ops.fused_resnet
    if measured_plan.other_backend_for_passes(x, usual):
        return torch.ops.fused_resnet
    return module("cuda") if usual == "cuda" else _NATIVE_PASSES


def is_native(x: Tensor) -> bool:
    """True if the convolutions that train on the device of x are the CPU's C++, automatically or asked for; Triton's
    interpreter comes first."""
    if _counting_native or _requested == "native":
        return True
    return _requested == AUTO and not x.is_cuda and bool(why_not_device("triton", x.device))


def trains_natively(
    x: Tensor,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """True if this convolution and its gradients in training are the CPU's C++ (``is_native``). Remembered: a block
    asks at every forward and backward."""
    if not is_native(x):
        return False
    if _counting_native:
        return groups == 1 and x.dtype == torch.float32
    weight = (type(conv_weight), conv_weight.shape, conv_weight.dtype, conv_weight.device)
    image = (type(x), x.shape, x.dtype, x.device, is_channels_last_once_dense(x))
    key = (image, weight, tuple(stride), tuple(padding), tuple(dilation), groups, _requested)
    takes = _trains_natively.get(key)
    if takes is None:
        settings = (list(stride), list(padding), list(dilation), groups)
        forward = (x, conv_weight, None, None, None, None, None, None, 0.0, 0.0, *settings, True)
        takes = not reasons_against("native", "conv_stats", forward)
        if len(_trains_natively) >= MOST_CONVOLUTIONS:
            _trains_natively.clear()
        _trains_natively[key] = takes
    return takes


def convolutions_for(
    x: Tensor,
    conv_weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *others: Tensor,
) -> Any:
    """Whose functions run a convolution of a training step, that the caller has checked: as ``passes_for``."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, Parameter) or is_listened_to():
        return torch.ops.fused_resnet
    if any(map(_is_batched, others)):
        return torch.ops.fused_resnet
    natively = trains_natively(x, conv_weight, stride, padding, dilation, groups)
    return module("native") if natively else torch.ops.fused_resnet


class _NativePasses:
    """The native backend's own, and the dispatcher's of those that it has not."""

    def __getattr__(self, op: str) -> Any:
        native = module("native")
        return getattr(native, op) if hasattr(native, op) else getattr(torch.ops.fused_resnet, op)


_NATIVE_PASSES = _NativePasses()


def remembered(memory: dict[Any, Any], op: str, x: Tensor, residual: Tensor | None, args: tuple[Any, ...]) -> Any:
    """The function that runs ``op`` on these arguments, as `choose` says the first time for an x and a residual like
    these; ``memory`` belongs to a caller whose other arguments are always alike. The op of the dispatcher, which
    chooses for every call, where somebody listens there."""
    if torch.compiler.is_compiling() or is_listened_to():
        return getattr(torch.ops.fused_resnet, op)
    like = None if residual is None else (residual.shape, residual.device)
    key = (x.shape, x.stride(), x.dtype, x.device, like, _requested)
    function = memory.get(key)
    if function is None:
        if len(memory) >= MOST_REMEMBERED:
            memory.clear()
        function = memory[key] = getattr(choose(op, args), op)
    return function


def is_listened_to() -> bool:
    """True if something between here and the kernels wants to see every op: a dispatch mode, tracing, functorch."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None or is_transformed()


def runs_unseen(x: Tensor) -> bool:
    """True if C++ may run on the memory of x, past PyTorch's dispatcher: a plain CPU tensor that is not empty, nobody
    that listens at the dispatcher, and no backend asked for."""
    if torch.compiler.is_compiling() or _requested != AUTO or is_listened_to():
        return False
    return type(x) in (Tensor, Parameter) and x.device.type == "cpu" and x.numel() > 0


def _is_batched(tensor: Tensor) -> bool:
    """True of the gradients of ``torch.autograd.grad(is_grads_batched=True)`` and of ``vmap``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def keeps_masks(x: Tensor) -> bool:
    """True if a ReLU behind a residual keeps one bit of each element of x for backward, instead of its output."""
    return _cuda_takes(x) or (_keeping_masks and not torch.compiler.is_compiling())


def _cuda_takes(x: Tensor) -> bool:
    """True if the cuda backend runs passes over x, automatically or asked for."""
    if torch.compiler.is_compiling() or _requested not in (AUTO, "cuda"):
        return False
    device = x.device
    if device.type != cuda_launch.device_type() or why_not_device("cuda", device):
        return False
    takes = x.dtype in FUSED_DTYPES and type(x) in (Tensor, Parameter) and is_channels_last_once_dense(x)
    return takes and x.numel() > 0


def _native_takes(x: Tensor) -> bool:
    """True if the native backend runs passes over x, automatically or asked for; Triton's interpreter comes first."""
    if torch.compiler.is_compiling() or _requested not in (AUTO, "native"):
        return False
    if _requested == AUTO and _works("triton", x.device):
        return False
    takes = x.device.type == "cpu" and x.dtype in FUSED_DTYPES and type(x) in (Tensor, Parameter)
    return takes and x.numel() > 0 and _works("native", x.device)


@contextlib.contextmanager
def keeping_masks() -> Iterator[None]:
    """Masks are kept on every backend: for counting what that moves, where there is no GPU."""
    global _keeping_masks
    before, _keeping_masks = _keeping_masks, True
    try:
        yield
    finally:
        _keeping_masks = before


@contextlib.contextmanager
def counting_native() -> Iterator[None]:
    """Training runs in the passes of the CPU's C++, whatever runs them: for counting what that moves."""
    global _counting_native
    before, _counting_native = _counting_native, True
    try:
        yield
    finally:
        _counting_native = before


def takes_one_launch(x: Tensor) -> bool:
    """True if the statistics of x and what is made of them are one launch, ``bn_stats_apply``."""
    return _cuda_takes(x) and module("cuda").fits_on_chip(x)


def is_transformed() -> bool:
    """True inside ``torch.func.grad``, ``vmap`` and their like, and inside ``forward_ad.dual_level``."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def choose(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The module that runs ``op`` on these arguments."""
    name = requested_backend()
    if name != AUTO:
        if reasons := reasons_against(name, op, args):
            raise BackendError(_refusal(name, op, reasons))
        return module(name)
    return choose_automatically(op, args)


def choose_automatically(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The first module that can run ``op`` on these arguments, whatever was asked for."""
    for name in ranking(op, args):
        if not reasons_against(name, op, args):
            return module(name)
    raise AssertionError("the reference refuses nothing")


@torch.compiler.assume_constant_result
def _works(backend: str, device: torch.device) -> bool:
    return not why_not_device(backend, device)


def _known(name: str, what: str = "backend") -> str:
    if name not in (AUTO, *MODULES):
        raise ValueError(f"{what} must be one of {', '.join([AUTO, *MODULES])}; got {name!r}")
    return name


def _refusal(backend: str, op: str, reasons: list[str]) -> str:
    return f"backend {backend!r} cannot run {op}: " + "; ".join(reasons)


# One for the process, not for the thread: autograd runs backward in threads of its own.
_keeping_masks = False
_counting_native = False
_requested: str = _known(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)


def _register(op: str) -> None:
    def body(*args: Any) -> Any:
        return getattr(choose(op, args), op)(*args)

    library.impl(op, body, "CompositeExplicitAutograd")


for _op in SCHEMAS:
    _register(_op)
