"""What a call stands in: what its user asks for, and who between here and the kernels wants to see every op, or to
change what it means.

A request belongs to the context of Python that asks (``contextvars``: a thread, a task of asyncio) and is never seen by
others; a new thread begins with the environment's. Backward of a block runs as its forward was asked to, by the route
that it brings; what it computes anew in a thread of autograd's, under the request of whoever called ``backward()``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fused_resnet.ops.layout import PLAIN
from fused_resnet.ops.route.request import AUTO, Request, checked_level, from_environment

_FROM_ENVIRONMENT = from_environment()
_asked: ContextVar[Request | None] = ContextVar("fused_resnet.request", default=None)


def request() -> Request:
    """The request of whoever calls this."""
    asked = _asked.get()
    # Where autograd keeps the context that backward() was called in, while it runs.
    if asked is None and torch._C._is_key_in_tls("context"):
        asked = torch._C._get_obj_in_tls("context").get(_asked)
    return _FROM_ENVIRONMENT if asked is None else asked


@contextlib.contextmanager
def asking(**wanted: str | int | bool | None) -> Iterator[None]:
    """Inside, these fields of the request are as given; the others stay."""
    token = _asked.set(request()._replace(**wanted))  # type: ignore[arg-type]
    try:
        yield
    finally:
        _asked.reset(token)


def requested_backend() -> str:
    """The backend asked for by ``use_backend``, else by the environment when this was imported, else "auto"."""
    return request().backend


# What torch.compiler.assume_constant_result does, which imports torch._dynamo, and that cannot read a context variable.
requested_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def requested_fusion_level() -> int | None:
    """The level asked for by ``use_fusion_level``, else by the environment when this was imported, else None."""
    return request().level


def use_fusion_level(level: int | None) -> contextlib.AbstractContextManager[None]:
    """``with use_fusion_level(level):`` trains residual blocks at this level (None for the automatic choice).

    For the context that asks, as ``use_backend``. A block keeps the level of its forward for its backward. Asked for by
    number, levels 1 to 3 run anywhere, through the reference where no kernel takes them: right, but slow. What no
    backend but the reference takes at all (float64, for one) stays at level 0 unless ``use_backend("reference")`` asks
    for that too.

    Raises:
        TypeError, ValueError: level is not None, 0, 1, 2 or 3.
    """
    return asking(level=checked_level(level, "level"))


def is_listened_to() -> bool:
    """True if something wants to see every op: a dispatch mode, tracing, functorch."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None or is_transformed()


def is_transformed() -> bool:
    """True inside ``torch.func.grad``, ``vmap`` and their like, and inside ``forward_ad.dual_level``."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class Route(Protocol):
    """Any of ``ops/route/routes.py``."""

    @property
    def heard(self) -> Any:
        """The same by way of PyTorch's dispatcher."""


R = TypeVar("R", bound=Route)


def for_listeners(route: R | None) -> R | None:
    """The route itself where nobody listens; where somebody does, the same by way of PyTorch's dispatcher; and None for
    those that take PyTorch's own ops only."""
    if route is None or not is_listened_to():
        return route
    return None if is_transformed() else route.heard


def hears_backward(grad: Tensor) -> bool:
    """`is_listened_to` for a gradient on its way back: also True of those of ``is_grads_batched=True`` and ``vmap``, of
    subclasses of Tensor, and of lazily negated ones, which the dispatcher resolves."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or type(grad) is not Tensor
        or functorch.is_batchedtensor(grad)
        or functorch.is_legacy_batchedtensor(grad)
        or grad.is_neg()
    )


def runs_unseen(x: Tensor) -> bool:
    """True if C++ may run on the memory of x, past PyTorch's dispatcher: a plain CPU tensor that is not empty, nobody
    that listens at the dispatcher, and no backend asked for."""
    if torch.compiler.is_compiling() or request().backend != AUTO or is_listened_to():
        return False
    return type(x) in PLAIN and x.device.type == "cpu" and x.numel() > 0
