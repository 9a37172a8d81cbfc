"""BatchNorm, residual add and ReLU in one pass: the parameters and buffers of modules, given to the ops.

``norm_act`` is what the blocks call. It runs the fused op where that is the same as calling the modules; where it might
not be (a hook, a subclass, another kind of norm), it calls the modules. ``why_not_fuse`` is the one place that decides.
"""

import sys
import types
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from fused_resnet.modules.plain import (
    UNFUSED,
    PlainNorm,
    batch_norm_arguments,
    class_name,
    has_global_hooks,
    is_intercepted,
    is_patched,
    vectors_fit,
)
from fused_resnet.ops.bn_act import bn_act, bn_act_dual, normalize
from fused_resnet.ops.checks import check_activation
from fused_resnet.ops.layout import is_negated, resolved_or_none

TAKERS_OF_NUMBERS = frozenset({"convert_sync_batchnorm", "fuse_conv_bn_eval", "fuse_linear_bn_eval"})
"""Functions of torch.nn that make another module of any BatchNorm's parameters and buffers."""
_TORCH_NN = str(Path(nn.__file__).parent)


class BatchNormAct2d(nn.BatchNorm2d):
    """``relu(BatchNorm2d(x) + residual)`` in one pass over memory.

    The arguments, parameters, buffers and ``state_dict`` are those of ``nn.BatchNorm2d``; checkpoints load both ways.
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` and ``torch.nn.utils.fuse_conv_bn_eval`` take any BatchNorm's numbers
    and leave the rest, so they raise TypeError, and do not drop the ReLU: in a model that will be converted, use
    ``ConvBNAct2d`` or the blocks, whose norms are plain ``nn.BatchNorm2d`` and run fused as ``nn.SyncBatchNorm`` too.

    Args:
        activation: "relu", or None for no activation.
        options: more that this PyTorch's ``nn.BatchNorm2d`` takes: ``bias`` from 2.13 on.

    Raises:
        ValueError: for another ``activation``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "relu",
        **options: Any,
    ) -> None:
        check_activation(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = activation

    # Under another name, for TorchScript knows no super().
    _batch_norm = types.FunctionType(nn.BatchNorm2d.forward.__code__, nn.BatchNorm2d.forward.__globals__, "_batch_norm")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``F.relu(F.batch_norm(x, ...) + residual)``, in x's dtype and memory format.

        Args:
            x: (N, C, H, W), any floating dtype and memory format.
            residual: added before the activation, in x's dtype; x's shape.

        Raises:
            ValueError: as ``nn.BatchNorm2d``: x is not 4D, or has one value per channel in training.
        """
        if torch.jit.is_scripting():  # torch.jit.script compiles this branch alone
            out = self._batch_norm(x)
            if residual is not None:
                out += residual
        else:
            if UNFUSED not in self.__dict__ and is_image(x):
                return _normalize(self, self.activation, x, residual)
            if isinstance(x, Proxy):  # one node of the graph, as PyTorch's own modules
                name = x.tracer.path_of_module(self)
                return x.tracer.create_proxy("call_module", name, (x,) if residual is None else (x, residual), {})
            out = add(super().forward(x), residual)
        return out if self.activation is None else F.relu(out)

    def __getattr__(self, name: str) -> Any:
        if name == "running_var" and not torch.compiler.is_compiling() and self.__dict__.get("activation") is not None:
            taker = sys._getframe(1).f_code
            if taker.co_name in TAKERS_OF_NUMBERS and taker.co_filename.startswith(_TORCH_NN):
                raise TypeError(
                    f"{taker.co_name} would drop the activation of a BatchNormAct2d; give that activation=None and "
                    "follow it by torch.nn.ReLU, or use ConvBNAct2d"
                )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


def norm_act(norm: nn.Module, act: nn.Module | None, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``act(norm(x) + residual)``: one fused pass when norm and act are plain, else the modules, the ordinary way.

    Args:
        norm: fused if ``why_not_fuse(norm, act)`` is empty; any module from tensor to tensor works. An
            ``nn.SyncBatchNorm`` works on the CPU as well, where its own forward refuses to.
        act: fused if an ``nn.ReLU`` without hooks; None for no activation.
        x: (N, C, H, W), any floating dtype and memory format.
        residual: added before the activation, in x's dtype (the ordinary way: in that of norm's result); x's shape.

    Returns:
        A new tensor of x's shape, dtype and memory format (the ordinary way: what the modules return). A norm in
        training updates its running statistics and ``num_batches_tracked`` as ``nn.BatchNorm2d`` does, but once, not
        twice, when ``torch.utils.checkpoint`` runs it again during backward.

    Raises:
        ValueError: as ``nn.BatchNorm2d``: x is not 4D, or has one value per channel in training.
        NotImplementedError: in backward with ``create_graph=True``, of statistics that ranks share.
    """
    if is_image(x) and (residual is None or residual.shape == x.shape) and not why_not_fuse(norm, act):
        return _normalize(cast(PlainNorm, norm), None if act is None else "relu", x, residual)
    out = add(norm(x), residual)
    return out if act is None else act(out)


def norm_act_dual(norm: nn.Module, act: nn.Module | None, x: Tensor, norm2: nn.Module, x2: Tensor) -> Tensor:
    """``act(norm(x) + norm2(x2))``: the end of a projection block, in one pass that reads x and x2 and writes once.

    Arguments, result and errors are those of ``norm_act``; x2 has x's shape. Where only one of the norms can be fused,
    that one takes the other's output as its residual.
    """
    alike = is_image(x) and is_image(x2) and x.shape == x2.shape and x.dtype == x2.dtype
    if not alike or why_not_fuse(norm, act) or why_not_fuse(norm2, None):
        return norm_act(norm, act, x, residual=norm_act(norm2, None, x2))
    activation = None if act is None else "relu"
    first = batch_norm_arguments(cast(PlainNorm, norm))
    second = batch_norm_arguments(cast(PlainNorm, norm2))
    return bn_act_dual(x, first, x2, second, activation=activation)


def why_not_fuse(norm: nn.Module, act: nn.Module | None) -> list[str]:
    """The reasons why ``norm`` and ``act`` must be called as modules; an empty list means that they can be fused."""
    reasons = []
    if type(norm) is BatchNormAct2d:
        if norm.activation is not None:
            reasons.append("the norm is a BatchNormAct2d that applies an activation itself")
    elif type(norm) is nn.SyncBatchNorm:
        if torch.compiler.is_compiling():
            reasons.append("the norm is a torch.nn.SyncBatchNorm, whose collectives are not fused under torch.compile")
    elif type(norm) is not nn.BatchNorm2d:
        reasons.append(f"the norm is {class_name(norm)}, not exactly torch.nn.BatchNorm2d or torch.nn.SyncBatchNorm")
    if UNFUSED in norm.__dict__:
        reasons.append("fused_resnet.unfuse was called on it")
    if act is not None and type(act) is not nn.ReLU:
        reasons.append(f"the activation is {class_name(act)}, not exactly torch.nn.ReLU")
    if is_intercepted(norm):
        reasons.append("the norm has hooks, or a forward of its own")
    if act is not None and is_intercepted(act):
        reasons.append("the activation has hooks, or a forward of its own")
    if has_global_hooks():
        reasons.append("a hook is registered on all modules")
    if is_patched():
        reasons.append("a function of torch.nn.functional was replaced")
    return reasons


def _normalize(norm: PlainNorm, activation: str | None, x: Tensor, residual: Tensor | None) -> Tensor:
    arguments, residual = batch_norm_arguments(norm), resolved_or_none(residual)
    if residual is not None and residual.dtype != x.dtype:  # a float32 input of a block whose convolutions are autocast
        residual = residual.to(x.dtype)
    channels = x.shape[1]
    several = x.numel() > channels and arguments.process_group is None
    if several and not torch.compiler.is_compiling() and vectors_fit(norm, channels, x.device):
        return normalize(x, arguments, residual, activation is not None)
    weight, bias, running_mean, running_var, training, momentum, eps, group = arguments
    return bn_act(
        *(x, weight, bias, running_mean, running_var, residual),
        training=training,
        momentum=momentum,
        eps=eps,
        activation=activation,
        process_group=group,
    )


def add(out: Tensor, residual: Tensor | None) -> Tensor:
    """What ``out += residual`` would leave in out, its dtype kept; of fx proxies their sum."""
    if residual is None:
        return out
    total = out + residual
    return total.type_as(out) if isinstance(total, Tensor) and total.dtype != out.dtype else total


def is_image(x: object) -> TypeGuard[Tensor]:
    """False for what only the modules themselves can answer: fx proxies, jit traces, lazily negated views, and shapes
    and dtypes that they refuse."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return False
    return not is_negated(x) and not torch.jit.is_tracing() and x.shape[1] > 0
