"""Which module runs an op, asked at every call by PyTorch's dispatcher, and once by whoever keeps the answer.

A backend is a module that exports functions named as in ``ops/reference/``:

========== ============================================== =====================================
name       module                                         where
========== ============================================== =====================================
cuda       ``ops/backends/cuda/`` over ``_C.cuda``        CUDA, channels_last
triton     ``fused_resnet.kernels``                       CUDA, channels_last
native     ``ops/backends/native/`` over ``_C``           CPU, channels_last and contiguous
separate   ``ops/backends/separate.py``                   everywhere, for convolutions
reference  ``ops/reference/``                             everywhere, float64 too
========== ============================================== =====================================

The automatic choice is the first of these with no reason against it, but for convolutions that Triton is expected to
do faster (``ops/route/preference.py``); ``reference`` never has one. An explicit request
(``use_backend``, or ``FUSED_RESNET_BACKEND`` in the environment) runs there or raises with every reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_resnet.ops.route import context, routes
from fused_resnet.ops.route.context import asking, is_listened_to
from fused_resnet.ops.route.packing import BY_DISPATCHER, argument_names, flat, packed
from fused_resnet.ops.route.preference import ranking
from fused_resnet.ops.route.raw_arguments import check_given, check_raw
from fused_resnet.ops.route.reasons import module, reasons_against, unavailable
from fused_resnet.ops.route.request import AUTO, BackendError, checked_backend
from fused_resnet.ops.schemas import SCHEMAS, library


def why_not(backend: str, op: str, *args: Any) -> list[str]:
    """The reasons why ``backend`` cannot run ``op`` on these arguments; an empty list means that it can.

    One that cannot run in this process at all says only that.

    Args:
        backend: "cuda", "triton", "native", "separate" or "reference".
        op: a name in ``ops/schemas.py``, such as "bn_apply".
        args: the op's arguments in the order of its schema.
    """
    checked_backend(backend)
    if op not in tuple(SCHEMAS):
        raise ValueError(f"op must be one of {', '.join(SCHEMAS)}; got {op!r}")
    names = argument_names(op)
    if len(args) != len(names):
        raise TypeError(f"args must be those of {op}, ({', '.join(names)}); got {len(args)} of them")
    return list(reasons_against(backend, op, args))


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """``with use_backend(name):`` runs every op inside on this backend ("auto" for the automatic choice).

    For the context that asks (``contextvars``: this thread, or this task of asyncio), and for backward of what is
    computed inside. A function of ``torch.compile`` asks when it is compiled whether ops of ours run, and when it runs
    which backend.

    Raises:
        ValueError: there is no backend of this name.
        BackendError: it cannot run in this process; inside the ``with``, an op raises it for tensors it cannot take.
    """
    checked_backend(name)
    if name != AUTO and (reasons := unavailable(name)):
        raise BackendError(_refusal(name, "any op", reasons))
    return asking(backend=name)


def empty_cache() -> None:
    """Gives the memory that the CPU kernels keep for the next outputs of its sizes back to the system."""
    if not unavailable("native"):
        module("native").empty_cache()


def limit_kept_memory(nbytes: int) -> None:
    """Has the CPU kernels keep at most this much memory of freed outputs and of their own: 2 GiB if this is not called,
    with 0 none. Large outputs in use count as well.

    Raises:
        TypeError, ValueError: nbytes is not an int from 0 on.
    """
    if isinstance(nbytes, bool) or not isinstance(nbytes, int):
        raise TypeError(f"nbytes must be an int; got {type(nbytes).__name__}")
    if nbytes < 0:
        raise ValueError(f"nbytes must be 0 or more; got {nbytes}")
    if not unavailable("native"):
        module("native").keep_at_most(nbytes)


def choose(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The module that runs ``op`` on these arguments."""
    name = context.request().backend
    if name == AUTO:
        return choose_automatically(op, args)
    if reasons := reasons_against(name, op, args):
        raise BackendError(_refusal(name, op, reasons))
    return module(name)


def choose_automatically(op: str, args: tuple[Any, ...]) -> ModuleType:
    """The first module that can run ``op`` on these arguments, whatever was asked for."""
    for name in ranking(op, args):
        if not reasons_against(name, op, args):
            return module(name)
    raise AssertionError("the reference refuses nothing")


def function_for(op: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs ``op`` on arguments like these (the function's own), kept as a route is; the dispatcher's
    where somebody listens there."""
    if torch.compiler.is_compiling() or is_listened_to():
        return BY_DISPATCHER[op]
    key = (op, context.request(), *map(_like, args))
    function = routes.kept.get(key)
    if function is None:
        function = routes.keep(key, getattr(choose(op, tuple(flat(op, args))), op))
    return function


def runs_in_cuda(op: str, args: tuple[Any, ...]) -> bool:
    """True if the CUDA C++ kernels run ``op`` on these arguments, automatically or asked for."""
    if torch.compiler.is_compiling() or context.request().backend not in (AUTO, "cuda"):
        return False
    key = ("runs_in_cuda", op, context.request(), *map(_like, args))
    found = routes.kept.get(key)
    return routes.keep(key, not reasons_against("cuda", op, args)) if found is None else found


def _like(argument: Any) -> Any:
    """What of an argument a choice may depend on."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return tuple(argument) if isinstance(argument, list) else argument


def _refusal(backend: str, op: str, reasons: list[str]) -> str:
    return f"backend {backend!r} cannot run {op}: " + "; ".join(reasons)


def _register(op: str) -> None:
    def body(*args: Any) -> Any:
        key = (op, context.request(), *map(_like, args))
        function = routes.kept.get(key)
        if function is None:
            check_given(op, args)
            if context.request().backend != AUTO:  # which says in its own words what it cannot take
                choose(op, args)
            check_raw(op, args)
            function = routes.keep(key, getattr(choose(op, args), op))
        return function(*packed(op, args))

    library.impl(op, body, "CompositeExplicitAutograd")


for _op in SCHEMAS:
    _register(_op)
