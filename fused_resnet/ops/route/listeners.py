"""Whether somebody between here and the kernels wants to see every op, or to change what it means."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_resnet.ops.route import request

PLAIN = (Tensor, Parameter)


def are_plain(*tensors: Tensor | None) -> bool:
    """False where a subclass of Tensor is among them, which may mean anything: it takes PyTorch's own ops only."""
    return all([tensor is None or type(tensor) in PLAIN for tensor in tensors])


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
    if torch.compiler.is_compiling() or request.current.backend != request.AUTO or is_listened_to():
        return False
    return type(x) in PLAIN and x.device.type == "cpu" and x.numel() > 0
