"""Which code runs an op: the backends, what each cannot do and why, and how a user asks for one.

A backend is a module that exports functions named as in ``ops/reference.py``:

========== ============================================== =====================================
name       module                                         where
========== ============================================== =====================================
triton     ``fused_resnet.kernels``                       CUDA, channels_last
native     ``fused_resnet.ops.native`` over ``_C``        CPU, channels_last and contiguous
separate   ``fused_resnet.ops.separate``                  everywhere, for convolutions
reference  ``fused_resnet.ops.reference``                 everywhere, float64 too
========== ============================================== =====================================

The automatic choice is the first of these with no reason against it; ``reference`` never has one. An explicit request
(``use_backend``, or ``FUSED_RESNET_BACKEND`` in the environment) runs there or raises with every reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_resnet.ops.layout import is_channels_last_once_dense
from fused_resnet.ops.schemas import SCHEMAS, conv_output_size, library

ENVIRONMENT_VARIABLE = "FUSED_RESNET_BACKEND"
AUTO = "auto"
MODULES = {
    "triton": "fused_resnet.kernels",
    "native": "fused_resnet.ops.native",
    "separate": "fused_resnet.ops.separate",
    "reference": "fused_resnet.ops.reference",
}
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this op on these tensors; the message lists every reason."""


def why_not(backend: str, op: str, *args: Any) -> list[str]:
    """The reasons why ``backend`` cannot run ``op`` on these arguments; an empty list means that it can.

    One that cannot run in this process at all says only that.

    Args:
        backend: "triton", "native", "separate" or "reference".
        op: a name in ``ops/schemas.py``, such as "bn_apply".
        args: the op's arguments in the order of its schema.
    """
    _known(backend)
    if op not in tuple(SCHEMAS):
        raise ValueError(f"op must be one of {', '.join(SCHEMAS)}; got {op!r}")
    names = _argument_names(op)
    if len(args) != len(names):
        raise TypeError(f"args must be those of {op}, ({', '.join(names)}); got {len(args)} of them")
    return list(_reasons(backend, op, args))


@functools.cache
def _argument_names(op: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in getattr(torch.ops.fused_resnet, op).default._schema.arguments)


@functools.cache
def unavailable(backend: str) -> list[str]:
    """The reasons why ``backend`` cannot run anything in this process."""
    if backend == "triton":
        return _triton_unavailable()
    if backend == "native":
        return _native_unavailable()
    return []


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
        _module("native").empty_cache()


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
        return _usable("triton") and is_channels_last_once_dense(x)
    return x.device.type == "cpu" and _usable("native")


def is_transformed() -> bool:
    """True inside ``torch.func.grad``, ``vmap`` and their like, and inside ``forward_ad.dual_level``."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def choose(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The module that runs ``op`` on these arguments."""
    name = requested_backend()
    if name != AUTO:
        if reasons := _reasons(name, op, args):
            raise BackendError(_refusal(name, op, reasons))
        return _module(name)
    return choose_automatically(op, args)


def choose_automatically(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The first module that can run ``op`` on these arguments, whatever was asked for."""
    for name in MODULES:
        if not _reasons(name, op, args):
            return _module(name)
    raise AssertionError("the reference refuses nothing")


def _reasons(backend: str, op: str, args: tuple[Any, ...]) -> list[str]:
    return unavailable(backend) or _CHECKS[backend](op, args)


@torch.compiler.assume_constant_result
def _usable(backend: str) -> bool:
    return not unavailable(backend)


def _known(name: str, what: str = "backend") -> str:
    if name not in (AUTO, *MODULES):
        raise ValueError(f"{what} must be one of {', '.join([AUTO, *MODULES])}; got {name!r}")
    return name


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])


def _refusal(backend: str, op: str, reasons: list[str]) -> str:
    return f"backend {backend!r} cannot run {op}: " + "; ".join(reasons)


def _triton_unavailable() -> list[str]:
    try:
        kernels = importlib.import_module(MODULES["triton"])
    except ImportError as error:
        return [f"triton cannot be imported ({error})"]
    if kernels.INTERPRETED:
        return []
    if torch.cuda.is_available():
        return _first_kernel_fails(kernels)
    return ["no CUDA device is usable, and TRITON_INTERPRET=1 was not set before triton was imported"]


def _first_kernel_fails(kernels: ModuleType) -> list[str]:
    """Triton builds its launcher with a C compiler, which a machine with a GPU need not have."""
    x, vector = torch.zeros(1, 8, 1, 1, device="cuda"), torch.zeros(8, device="cuda")
    try:
        kernels.bn_apply(x, vector, vector, None, None, None, True)
    except Exception as error:  # whatever it is, it is the reason
        return [f"a first kernel could not be compiled and launched ({error})"]
    return []


def _native_unavailable() -> list[str]:
    try:
        importlib.import_module("fused_resnet._C")
    except ImportError as error:
        return [f"the compiled extension fused_resnet._C is not there ({error})"]
    return []


_PLACE_OF_X = {
    "bn_grad_stats": 1,
    "bn_grad_apply": 1,
    "bn_grad_coefficients": 2,  # a vector
    "bn_pool_grad_stats": 2,
    "bn_pool_grad_apply": 2,
    "conv_grad_input": 4,
    "conv_grad_weight": 3,
}
_TRAINING_CONVOLUTIONS = ("conv_stats", "conv_grad_input", "conv_grad_weight")


def _why_not_triton(op: str, args: tuple[Any, ...]) -> list[str]:
    x: Tensor = args[_PLACE_OF_X.get(op, 0)]
    reasons = []
    if x.dtype not in FUSED_DTYPES:
        reasons.append(f"x is {x.dtype}; it takes float32, float16 and bfloat16")
    if x.device.type != ("cpu" if _module("triton").INTERPRETED else "cuda"):
        reasons.append(f"x is on {x.device}; it takes CUDA tensors (CPU tensors under TRITON_INTERPRET=1)")
    if x.numel() == 0:
        reasons.append("x is empty")
    if op == "bn_grad_coefficients":
        return reasons + _mismatches(x, args)
    if not is_channels_last_once_dense(x):
        reasons.append("x is not channels_last")
    if op == "conv_bn_act":
        return reasons + _module("triton").why_not_conv(*args)
    if op in _TRAINING_CONVOLUTIONS:
        return reasons + _train_conv_mismatches(op, args)
    return reasons + (_pool_mismatches(op, args) if "pool" in op else _mismatches(x, args))


def _why_not_native(op: str, args: tuple[Any, ...]) -> list[str]:
    if op.startswith("conv"):
        return ["it has no convolution; on the CPU that is oneDNN's, which the separate backend calls"]
    if op == "bn_grad_coefficients" or "pool" in op:
        return ["it has neither passes over vectors nor pooling"]
    x: Tensor = args[_PLACE_OF_X.get(op, 0)]
    reasons = []
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device}; it takes CPU tensors")
    if x.dtype not in FUSED_DTYPES:
        reasons.append(f"x is {x.dtype}; it takes float32, float16 and bfloat16")
    if x.numel() == 0:
        reasons.append("x is empty")
    return reasons + _mismatches(x, args)


def _mismatches(x: Tensor, args: tuple[Any, ...]) -> list[str]:
    """What the public functions have refused already; an op called by itself must not read past the end either."""
    vector, device = (x.shape[-3 if x.dim() == 4 else 0],), x.device
    return [
        f"a tensor is {tuple(tensor.shape)} on {tensor.device} beside x, {tuple(x.shape)} on {device}"
        for tensor in args
        if isinstance(tensor, Tensor)
        and (tensor.device != device or tensor.shape != (vector if tensor.dim() == 1 else x.shape))
    ]


def _pool_mismatches(op: str, args: tuple[Any, ...]) -> list[str]:
    """Of a pass with pooling: what ``_mismatches`` says of the vectors, the window, and the sizes of its outputs."""
    place = _PLACE_OF_X.get(op, 0)
    x, (kernel_size, stride, padding) = args[place], args[-3:]
    reasons = _mismatches(x, args[place:-3])
    if any(2 * padding[i] > kernel_size[i] for i in (0, 1)) or kernel_size[0] * kernel_size[1] > 256:
        reasons.append(f"the window is {kernel_size}, padded by {padding}; it takes 256 pixels, half of a side padded")
    size = tuple(conv_output_size(x.shape[i + 2], kernel_size[i], stride[i], padding[i], 1) for i in (0, 1))
    if min(size) < 1:
        reasons.append(f"the output would be {size[0]} x {size[1]}; it takes at least one pixel")
    pooled = (*x.shape[:2], *size)
    for tensor in args[:place]:
        if tuple(tensor.shape) != pooled or tensor.device != x.device:
            reasons.append(f"a tensor is {tuple(tensor.shape)} on {tensor.device}; it takes {pooled} on {x.device}")
    return reasons


def _train_conv_mismatches(op: str, args: tuple[Any, ...]) -> list[str]:
    """What the training convolutions cannot take, beyond what holds for every op on x."""
    named = dict(zip(_argument_names(op), args, strict=True))
    x, conv_weight = named["x"], named["conv_weight"]
    settings = [named[name] for name in ("stride", "padding", "dilation", "groups")]
    module = _module("triton")
    if reasons := module.why_not_train_conv(x, conv_weight, *settings):
        return reasons
    filters, channels = conv_weight.shape[0], (x.shape[1],)
    size = (conv_output_size(x.shape[i + 2], conv_weight.shape[i + 2], *(s[i] for s in settings[:3])) for i in (0, 1))
    output = (x.shape[0], filters, *size)
    expected = {"dz": output, "y": output, "coefficients": (4, filters), "residual": tuple(x.shape)}
    expected |= dict.fromkeys(("running_mean", "running_var"), (filters,))
    expected |= dict.fromkeys(("mean", "invstd", "weight", "bias"), channels)
    for name, shape in expected.items():
        tensor = named.get(name)
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.device != x.device):
            reasons.append(f"{name} is {tuple(tensor.shape)} on {tensor.device}; it takes {shape} on {x.device}")
        if name in ("dz", "y", "residual") and tensor is not None and tensor.dtype != x.dtype:
            reasons.append(f"{name} is {tensor.dtype}; it takes x's dtype, {x.dtype}")
    return reasons


def _why_not_separate(op: str, args: tuple[Any, ...]) -> list[str]:
    return [] if op == "conv_bn_act" else ["it is a convolution and one pass of bn_apply, and has nothing else"]


# One for the process, not for the thread: autograd runs backward in threads of its own.
_requested: str = _known(os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, ENVIRONMENT_VARIABLE)

_CHECKS: dict[str, Callable[[str, tuple[Any, ...]], list[str]]] = {
    "triton": _why_not_triton,
    "native": _why_not_native,
    "separate": _why_not_separate,
    "reference": lambda op, args: [],
}


def _register(op: str) -> None:
    def body(*args: Any) -> Any:
        return getattr(choose(op, args), op)(*args)

    library.impl(op, body, "CompositeExplicitAutograd")


for _op in SCHEMAS:
    _register(_op)
