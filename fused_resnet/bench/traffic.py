"""What each op reads from and writes to memory when it is well-made GPU kernels: the table behind ``bench/ledger.py``.

An op is one or more passes. A pass reads each of its operands once and writes each of its results once; that is the
least it can move, and what a good kernel does when the tensors are larger than the caches. Not counted: a kernel's own
workspace (partial sums of a reduction, cuDNN's and Triton's alike), and what a cache keeps from one kernel to the next.

An op without a row is an error, so that no pass is ever left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """One call of an op: its arguments by the names of its schema, defaults included, and the tensors it returned."""

    arguments: dict[str, Any]
    results: tuple[Tensor, ...]


class Pass(NamedTuple):
    """One pass over memory, in bytes."""

    kind: str
    reads: int
    writes: int


Row = Callable[[Call], list[Pass]]


def passes(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> list[Pass]:
    """The passes of one call; none for views and for what only allocates, and none for tensors on the meta device.

    Raises:
        NotImplementedError: the table has no row for this op.
    """
    if moves_nothing(func):
        return []
    schema = func._schema.arguments
    arguments = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    arguments |= dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
    call = Call(arguments, tuple(tensors(results)))
    operands = [*tensors(list(arguments.values())), *call.results]
    if not operands or any(tensor.is_meta for tensor in operands):  # a profiler's mark, an inference of shapes
        return []
    if (row := ROWS.get(_name(func))) is None:
        raise NotImplementedError(f"no row in {__name__} says what {func} reads and writes; add one to ROWS or FREE")
    return row(call)


def moves_nothing(func: torch._ops.OpOverload) -> bool:
    """True for views, changes of shape or strides alone, and allocation."""
    return func.is_view or _name(func) in FREE


def size(*operands: Any) -> int:
    """Bytes of tensors, also in lists; None and numbers are 0, and what ``expand`` repeats is there once."""
    return sum(
        math.prod(length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not length)
        * tensor.element_size()
        for tensor in tensors(operands)
    )


def tensors(value: Any) -> Iterable[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def _name(func: torch._ops.OpOverload) -> str:
    """Without overload, "aten." and the underscore of an op in place, which moves what the other does."""
    return func._schema.name.replace("::", ".").removeprefix("aten.").removesuffix("_")


def _once(kind: str, *unread: str, rewritten: tuple[str, ...] = (), **needed: str) -> Row:
    """One pass: every argument is read but ``unread`` and those whose ``needed`` other argument is None; every result
    and what is ``rewritten`` is written."""

    def row(call: Call) -> list[Pass]:
        a, skipped = call.arguments, [*unread]
        skipped += [name for name, other in needed.items() if a[other] is None]
        read = [value for name, value in a.items() if name not in skipped]
        return [Pass(kind, size(read), size(call.results, [a[name] for name in rewritten]))]

    return row


def _written_only(kind: str) -> Row:
    return lambda call: [Pass(kind, 0, size(call.results))]


def _fused_sgd(call: Call) -> list[Pass]:
    """One pass over parameters, gradients and momenta, which rewrites all but the gradients."""
    kept = size(call.arguments["self"], call.arguments["momentum_buffer_list"])
    return [Pass("update", kept + size(call.arguments["grads"]), kept)]


def _convolution_backward(call: Call) -> list[Pass]:
    a, results = call.arguments, iter(call.results)
    read = {"input gradient": a["weight"], "weight gradient": a["input"], "bias gradient": None}
    wanted = [kind for kind, asked in zip(read, a["output_mask"], strict=True) if asked]
    return [Pass(kind, size(a["grad_output"], read[kind]), size(next(results))) for kind in wanted]


def _batch_norm(call: Call) -> list[Pass]:
    """In training the statistics need all of x before the first value can be normalised, so x is read twice."""
    a, (out, *statistics) = call.arguments, call.results
    running, affine = (a["running_mean"], a["running_var"]), (a["weight"], a["bias"])
    if not a["training"]:
        return [Pass("normalise", size(a["input"], running, affine), size(out))]
    return [
        Pass("statistics", size(a["input"], running), size(statistics, running)),
        Pass("normalise", size(a["input"], statistics, affine), size(out)),
    ]


def _batch_norm_backward(call: Call) -> list[Pass]:
    a, results = call.arguments, list(call.results)
    vectors, mask = size(a["save_mean"], a["save_invstd"], a["weight"]), a["output_mask"]
    both = size(a["grad_out"], a["input"]) + vectors
    grad_input = size(results.pop(0)) if mask[0] else 0
    found = [Pass("statistics", both, size(results))] if a["train"] or any(mask[1:]) else []
    # Of constants the gradient of the input needs no sums, and no input.
    read = both + size(results) if a["train"] else size(a["grad_out"]) + vectors
    return found + ([Pass("normalise", read, grad_input)] if mask[0] else [])


def _cudnn_batch_norm_backward(call: Call) -> list[Pass]:
    a, (grad_input, *sums) = call.arguments, call.results
    read = size(a["grad_output"], a["input"], a["save_mean"], a["save_var"], a["weight"])
    return [Pass("statistics", read, size(sums)), Pass("normalise", read + size(sums), size(grad_input))]


def _bn_grad_apply(call: Call) -> list[Pass]:
    needs_x = call.arguments["relu"] or call.arguments["sum_dz"] is not None
    return _once("normalise", *([] if needs_x else ["x"]))(call)


def _rows(row: Callable[[str], Row], kinds: dict[str, str], prefix: str = "") -> dict[str, Row]:
    """A row for each op, from its kind to the names of all that are of it."""
    return {f"{prefix}{name}": row(kind) for kind, names in kinds.items() for name in names.split()}


_RUNNING = ("running_mean", "running_var")
FREE = {
    *("_local_scalar_dense", "_reshape_alias", "_unsafe_view", "as_strided", "detach", "empty", "empty_like"),
    *("empty_strided", "is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "set"),
}
"""Ops that only allocate, or only make another view, beside those that say so themselves (``OpOverload.is_view``)."""
_ONCE = {
    "convolution": "convolution cudnn_convolution",
    "statistics": "var_mean batch_norm_stats batch_norm_backward_reduce",
    "normalise": "batch_norm_elemt batch_norm_backward_elemt",
    "relu": "relu threshold_backward",
    "add": "add",
    "pool": "max_pool2d_with_indices mean _adaptive_avg_pool2d _adaptive_avg_pool2d_backward",
    "linear": "addmm mm",
    "loss": "_log_softmax _log_softmax_backward_data nll_loss_forward",
    "elementwise": "div mul neg sub sqrt rsqrt where addcmul pow",
    "sum": "sum",
    "copy": "_to_copy clone contiguous",
}
_OURS = {
    "normalise": "bn_apply bn_apply_dual bn_apply_mask bn_apply_dual_mask bn_apply_pool bn_pool_grad_apply",
    "statistics": "bn_grad_stats bn_grad_stats_mask bn_pool_grad_stats bn_grad_coefficients",
    "convolution": "stem conv_bn_act",
    "pool": "avgpool",
}
_FILL = "zero fill zeros zeros_like ones ones_like full full_like new_zeros new_ones new_full scalar_tensor"
ROWS: dict[str, Row] = {
    **_rows(_once, _ONCE),
    **_rows(_written_only, {"fill": _FILL}),
    **_rows(_once, _OURS, prefix="fused_resnet."),
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm"), _batch_norm),
    "native_batch_norm_backward": _batch_norm_backward,
    "cudnn_batch_norm_backward": _cudnn_batch_norm_backward,
    "max_pool2d_with_indices_backward": _once("pool", "self"),
    "nll_loss_backward": _once("loss", "self"),
    "copy": _once("copy", "self"),
    "_fused_sgd": _fused_sgd,
    "_foreach_mul": _once("elementwise", rewritten=("self",)),
    "fused_resnet.bn_stats": _once("statistics", rewritten=_RUNNING),
    "fused_resnet.bn_stats_apply": _once("normalise", rewritten=_RUNNING),
    "fused_resnet.bn_grad_apply": _bn_grad_apply,
    "fused_resnet.bn_grad_apply_mask": _once("normalise", x="sum_dz"),
    "fused_resnet.conv_stats": _once("convolution", rewritten=_RUNNING),
    "fused_resnet.conv_grad_input": _once("input gradient", x="mean", y="coefficients"),
    "fused_resnet.conv_grad_weight": _once("weight gradient", "conv_weight", y="coefficients"),
}
"""The rows, by the name of the op as `_name` gives it. Fused ones as ``ops/reference/`` says."""
