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
    """The passes of one call; none for views and for what only allocates, and none for tensors on the meta device."""
    if moves_nothing(func):
        return []
    call = Call(_bound(func, args, kwargs), tuple(tensors(results)))
    operands = [*tensors(list(call.arguments.values())), *call.results]
    if not operands or any(tensor.is_meta for tensor in operands):  # a profiler's mark, an inference of shapes
        return []
    row = ROWS.get(_name(func))
    if row is None:
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
    """Without overload and without the underscore of an op in place, which moves what the other does."""
    return f"{func.namespace}.{func._schema.name.partition('::')[2].removesuffix('_')}"


def _bound(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    arguments = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    return {**defaults, **dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}


def _once(kind: str, *unread: str, rewritten: tuple[str, ...] = ()) -> Row:
    """One pass: every argument but ``unread`` is read, every result and what is ``rewritten`` is written."""

    def row(call: Call) -> list[Pass]:
        read = [value for name, value in call.arguments.items() if name not in unread]
        return [Pass(kind, size(read), size(call.results, [call.arguments[name] for name in rewritten]))]

    return row


def _written_only(kind: str) -> Row:
    return lambda call: [Pass(kind, 0, size(call.results))]


def _convolution_backward(call: Call) -> list[Pass]:
    a, results = call.arguments, iter(call.results)
    read = {"input gradient": "weight", "weight gradient": "input", "bias gradient": "bias_sizes"}
    wanted = [kind for kind, asked in zip(read, a["output_mask"], strict=True) if asked]
    return [Pass(kind, size(a["grad_output"], a[read[kind]]), size(next(results))) for kind in wanted]


def _batch_norm(call: Call) -> list[Pass]:
    """In training the statistics need all of x before the first value can be normalised, so x is read twice."""
    a = call.arguments
    out, *statistics = call.results
    running, affine = (a["running_mean"], a["running_var"]), (a["weight"], a["bias"])
    if not a["training"]:
        return [Pass("normalise", size(a["input"], running, affine), size(out))]
    return [
        Pass("statistics", size(a["input"], running), size(statistics, running)),
        Pass("normalise", size(a["input"], statistics, affine), size(out)),
    ]


def _batch_norm_backward(call: Call) -> list[Pass]:
    a = call.arguments
    both = size(a["grad_out"], a["input"])
    vectors = size(a["save_mean"], a["save_invstd"], a["weight"])
    mask = a["output_mask"]
    results = iter(call.results)
    grad_input = size(next(results)) if mask[0] else 0
    sums = size(list(results))
    if not a["train"]:  # constants: the gradient of the input needs no sums, and no input
        found = [Pass("statistics", both + vectors, sums)] if any(mask[1:]) else []
        return found + ([Pass("normalise", size(a["grad_out"]) + vectors, grad_input)] if mask[0] else [])
    found = [Pass("statistics", both + vectors, sums)]
    return found + ([Pass("normalise", both + vectors + sums, grad_input)] if mask[0] else [])


def _cudnn_batch_norm_backward(call: Call) -> list[Pass]:
    a = call.arguments
    read = size(a["grad_output"], a["input"], a["save_mean"], a["save_var"], a["weight"])
    grad_input, *sums = call.results
    return [Pass("statistics", read, size(sums)), Pass("normalise", read + size(sums), size(grad_input))]


def _unless(kind: str, *always_unread: str, **needed: str) -> Row:
    """One pass that does not read the operands named here where the argument that needs them is None."""

    def row(call: Call) -> list[Pass]:
        unread = [name for name, other in needed.items() if call.arguments[other] is None]
        return _once(kind, *always_unread, *unread)(call)

    return row


def _bn_grad_apply(call: Call) -> list[Pass]:
    needs_x = call.arguments["relu"] or call.arguments["sum_dz"] is not None
    return _once("normalise", *([] if needs_x else ["x"]))(call)


def _fused_optimizer(*states: str) -> Row:
    """One pass over parameters, gradients and states, which rewrites all but the gradients."""

    def row(call: Call) -> list[Pass]:
        a = call.arguments
        kept = size(a["self"], [a[state] for state in states])
        return [Pass("update", kept + size(a["grads"]), kept)]

    return row


def _foreach(kind: str) -> Row:
    """Lists of tensors in one pass: in place, and so without results, it rewrites the first list."""
    return lambda call: [
        Pass(kind, size(list(call.arguments.values())), size(call.results or call.arguments["self"])),
    ]


FREE = {
    f"aten.{name}"
    for name in [
        "_local_scalar_dense",
        "_reshape_alias",
        "_unsafe_view",
        "as_strided",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "is_same_size",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "set",
    ]
}
"""Ops that only allocate, or only make another view, beside those that say so themselves (``OpOverload.is_view``)."""


def _rows(kind: str, names: str, row: Callable[[str], Row] = _once, of: str = "aten") -> dict[str, Row]:
    return dict.fromkeys((f"{of}.{name}" for name in names.split()), row(kind))


_running = ("running_mean", "running_var")

ROWS: dict[str, Row] = {
    **_rows("convolution", "convolution cudnn_convolution"),
    "aten.convolution_backward": _convolution_backward,
    **dict.fromkeys(("aten.native_batch_norm", "aten.cudnn_batch_norm"), _batch_norm),
    "aten.native_batch_norm_backward": _batch_norm_backward,
    "aten.cudnn_batch_norm_backward": _cudnn_batch_norm_backward,
    **_rows("statistics", "var_mean batch_norm_stats batch_norm_backward_reduce"),
    "aten.batch_norm_gather_stats_with_counts": _once("statistics", "input", rewritten=_running),
    **_rows("normalise", "batch_norm_elemt batch_norm_backward_elemt"),
    **_rows("relu", "relu threshold_backward"),
    **_rows("add", "add"),
    **_rows("pool", "max_pool2d_with_indices mean _adaptive_avg_pool2d _adaptive_avg_pool2d_backward"),
    "aten.max_pool2d_with_indices_backward": _once("pool", "self"),
    **_rows("linear", "addmm mm"),
    **_rows("loss", "_log_softmax _log_softmax_backward_data nll_loss_forward"),
    "aten.nll_loss_backward": _once("loss", "self"),
    **_rows("elementwise", "div mul neg sub sqrt rsqrt where addcmul addcdiv lerp reciprocal pow"),
    **_rows("sum", "sum"),
    **_rows("copy", "_to_copy clone contiguous"),
    "aten.copy": _once("copy", "self"),
    **_rows("fill", "zero fill zeros zeros_like ones ones_like full full_like", _written_only),
    **_rows("fill", "new_zeros new_ones new_full scalar_tensor", _written_only),
    **_rows(
        "elementwise",
        "_foreach_add _foreach_sub _foreach_mul _foreach_div _foreach_neg _foreach_sqrt _foreach_lerp _foreach_addcmul"
        " _foreach_addcdiv",
        _foreach,
    ),
    "aten._fused_sgd": _fused_optimizer("momentum_buffer_list"),
    **dict.fromkeys(
        ("aten._fused_adam", "aten._fused_adamw"), _fused_optimizer("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    ),
    "fused_resnet.bn_stats": _once("statistics", rewritten=_running),
    "fused_resnet.bn_stats_apply": _once("normalise", rewritten=_running),
    **_rows("normalise", "bn_apply bn_apply_dual bn_apply_mask bn_apply_dual_mask bn_apply_pool", of="fused_resnet"),
    **_rows("statistics", "bn_grad_stats bn_grad_stats_mask bn_pool_grad_stats", of="fused_resnet"),
    **_rows("statistics", "bn_grad_coefficients", of="fused_resnet"),
    "fused_resnet.bn_pool_grad_apply": _once("normalise"),
    "fused_resnet.bn_grad_apply": _bn_grad_apply,
    "fused_resnet.bn_grad_apply_mask": _unless("normalise", x="sum_dz"),
    "fused_resnet.avgpool": _once("pool"),
    **_rows("convolution", "stem conv_bn_act", of="fused_resnet"),
    "fused_resnet.conv_stats": _once("convolution", rewritten=_running),
    "fused_resnet.conv_grad_input": _unless("input gradient", x="mean", y="coefficients"),
    "fused_resnet.conv_grad_weight": _unless("weight gradient", "conv_weight", y="coefficients"),
}
"""The rows, by the name of the op without overload and trailing underscore. Fused ones as ``ops/reference/`` says."""
