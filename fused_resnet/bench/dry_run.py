"""Running a network for its shapes only: real CPU tensors whose values nobody computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fused_resnet.bench.traffic import moves_nothing, tensors
from fused_resnet.ops.layout import conv_memory_format


class DryRun(TorchDispatchMode):
    """``with DryRun():`` no op computes: results have their shape, dtype, strides and storage, and arbitrary values.

    What runs above the ops runs as ever: autograd, autocast, modules, the choice of a backend and of a level. Memory of
    a result is asked for and never touched, so that a step of ResNet-50 at batch 256 takes seconds and, where the
    system hands out pages when they are touched, no memory. Only for CPU tensors and for code that branches on no value
    of theirs.

    Why not the meta device: autocast does not know it, and shape inference there looks like the work itself. Why not
    ``FakeTensorMode``: its tensors are a subclass, for which no fused backend is chosen.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = list(tensors([args, tuple(kwargs.values())]))
        scalars_only = all(tensor.numel() <= 1 for tensor in operands)  # loss, counters: their type promotion is subtle
        on_meta = str(kwargs.get("device")) == "meta" or any(tensor.is_meta for tensor in operands)
        if moves_nothing(func) or scalars_only or on_meta:
            return func(*args, **kwargs)
        if not func._schema.returns:  # an op on lists in place, some of which the meta device has not
            return None
        shapes = _Twins()
        found = func(*tree_map(shapes.twin, args), **tree_map(shapes.twin, _without_device(kwargs)))
        if func is torch.ops.aten.convolution.default:
            found = found.contiguous(memory_format=conv_memory_format(*args[:2]))
        elif func in _LAID_OUT_LIKE:
            likes = [args[position] for position in _LAID_OUT_LIKE[func]]
            pairs = zip(found, likes, strict=False)
            laid_out = [None if result is None else _empty(like, result.dtype, "meta") for result, like in pairs]
            found = (*laid_out, *found[len(laid_out) :])
        return tree_map(shapes.original, found)


class _Twins:
    """Meta tensors in place of real ones, and the way back."""

    def __init__(self) -> None:
        self._twins: dict[int, Tensor] = {}
        self._originals: dict[int, Tensor] = {}

    def twin(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._twins:
            twin = _empty(value, value.dtype, "meta")
            self._twins[id(value)], self._originals[id(twin)] = twin, value
        return self._twins[id(value)]

    def original(self, value: Any) -> Any:
        """The real tensor of a twin (an op in place returns one); new memory for any other."""
        if not isinstance(value, Tensor):
            return value
        return self._originals[id(value)] if id(value) in self._originals else _empty(value, value.dtype, "cpu")


def _empty(like: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=device)


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.device("meta") if name == "device" else value for name, value in kwargs.items()}


# Kernels keep channels_last, which the meta device forgets; by the places of the arguments that the results lie like.
_LAID_OUT_LIKE = {
    torch.ops.aten.convolution_backward.default: (1, 2),
    torch.ops.aten.native_batch_norm.default: (0,),
    torch.ops.aten.native_batch_norm_backward.default: (1,),
}
