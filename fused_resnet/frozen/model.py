"""``freeze``: a model as a function of its input alone, every BatchNorm folded into the convolution in front of it."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fused_resnet.convert.fuse import fuse
from fused_resnet.frozen.kept import Frozen, FrozenStage, Settings, lock, must_run_itself
from fused_resnet.frozen.network import Pixels, as_numbers
from fused_resnet.modules.conv_bn_act import ConvBNAct2d
from fused_resnet.modules.plain import FROZEN, Snapshot
from fused_resnet.modules.site import sites_of
from fused_resnet.ops.checks import DTYPES, check_bytes, check_image, check_normalize


class FrozenModel(nn.Module):
    """What ``freeze`` returns: ``module`` in eval, without gradients; perhaps as a CUDA graph.

    ``module`` has the names, parameters and buffers of the model that was frozen. What is written to them, put in
    their place or changed about a part counts from the next call on, as it does for the plain model; only what is
    written past PyTorch (``tensor.data``, a NumPy view) is not seen. Other threads see ``load_state_dict`` of this
    module all at once.
    """

    _like: Tensor
    __jit_unused_properties__: ClassVar = ["is_whole"]

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, normalize: tuple[Sequence[float], Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        pixels = None if normalize is None else Pixels(*normalize)
        self._settings = Settings(dtype, dtype_of(module, dtype), pixels)
        self._graph: torch.cuda.CUDAGraph | None = None
        for part in module.modules():
            if len(sites := sites_of(part)) > 1 or hasattr(part, "body") or (sites and isinstance(part, ConvBNAct2d)):
                part.__dict__[FROZEN] = Frozen(self._settings)
            elif type(part) is nn.Sequential and len(part) > 0 and all(len(sites_of(child)) > 1 for child in part):
                part.__class__ = FrozenStage
                part.__dict__[FROZEN] = Frozen(self._settings)
        self._is_whole = FROZEN in module.__dict__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the convolutions compute in; ``.to`` changes it."""
        return self._like.dtype

    @property
    def is_whole(self) -> bool:
        """Whether ``module`` itself is one of ours, and not only parts of it."""
        return FROZEN in self.module.__dict__

    def forward(self, x: Tensor) -> Tensor:
        """The model's output. x: (N, C, H, W) of any floating dtype and memory format, on the model's device, or uint8
        if it was frozen with ``normalize``; with a CUDA graph, of the example's shape (ValueError otherwise) and, if
        one of the two is uint8, of its dtype (TypeError). Under ``torch.jit.script`` x has the plain model's dtype."""
        with torch.no_grad():
            if torch.jit.is_scripting():  # torch.jit.script compiles this branch alone
                out = self.module(x)
                return out.to(self._like.dtype) if self._is_whole else out
            else:
                self._check(x)
                return self._run(x) if self._graph is None else self._replay(x)

    def _replay(self, x: Tensor) -> Tensor:
        assert self._graph is not None
        if (x.dtype == torch.uint8) != (self._graph_input.dtype == torch.uint8):
            raise TypeError(
                f"x must have the dtype the CUDA graph was captured with, {self._graph_input.dtype}; got {x.dtype}"
            )
        if x.shape != self._graph_input.shape:
            raise ValueError(
                f"x must have the shape the CUDA graph was captured with, {tuple(self._graph_input.shape)}; "
                f"got {tuple(x.shape)}"
            )
        if not self._graph_snapshot.holds():
            self.capture(self._graph_input)
        self._graph_input.copy_(x)
        self._graph.replay()
        return self._graph_output.clone()

    def _run(self, x: Tensor) -> Tensor:
        plain = self._settings.plain
        if not self.is_whole:  # the rest of the model gets what it would get
            return self.module(as_numbers(x, self._settings.pixels, plain))
        if must_run_itself(x):
            x = as_numbers(x, self._settings.pixels, plain).to(plain)
        elif x.dtype != torch.uint8 or not hasattr(self.module, "body"):
            x = as_numbers(x, self._settings.pixels, self.dtype).to(self.dtype)
        out = self.module(x)
        is_number = isinstance(out, Proxy) or (isinstance(out, Tensor) and out.is_floating_point())
        return out.to(self.dtype) if is_number else out

    def _check(self, x: Tensor) -> None:
        pixels = self._settings.pixels
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            if pixels is None:
                raise TypeError("x must be floating point, or the model frozen with normalize; got torch.uint8")
            check_bytes("x", x, len(pixels.scale))
        elif torch._C._get_tracing_state() is None and not isinstance(x, Proxy):
            check_image("x", x)

    @torch.inference_mode(False)  # the static input is written to by every later call, wherever that is made
    @torch.no_grad()
    def capture(self, x: Tensor) -> None:
        """Records the kernels of one call as a CUDA graph, which every later call replays; again, once a weight or a
        part has changed."""
        self._graph_input = x.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles and picks algorithms, which capture forbids
                self._run(self._graph_input)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self._graph_snapshot = Snapshot(self.module, tensors=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._graph_output = self._run(self._graph_input)
        self._graph = graph

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._settings.dtype, self._settings.plain = self.dtype, dtype_of(self.module, self.dtype)
        if self._graph is not None and (self._graph_input.device != self._like.device):
            self._graph = None
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``. A call in another thread sees all of it or nothing."""
        with lock.held:
            return super().load_state_dict(state_dict, strict, assign)

    def __getstate__(self) -> dict[str, Any]:
        captured = {"_graph": None, "_graph_input": None, "_graph_output": None, "_graph_snapshot": None}
        return {**self.__dict__, **captured}

    def train(self, mode: bool = True) -> Self:
        """Stays in eval, with a warning; the modules around it may train."""
        if mode:
            warnings.warn(
                "a frozen model stays in eval: it has no gradients; train the model it was frozen from", stacklevel=2
            )
        return super().train(False)


def freeze(
    model: nn.Module,
    example_input: Tensor,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> FrozenModel:
    """A copy of ``model`` for inference: BatchNorm folded, weights laid out for the device, one kernel a convolution.

    Equals ``model.eval()`` up to rounding. The model is left as it is. Only blocks and networks of ours and of
    torchvision's are folded; the rest of the copy is called as it is, with what it would get in the plain model. A
    block that cannot be folded (hooks, another kind of norm, batch statistics) runs the ordinary way; ``fusion_report``
    of the result says why. Whatever is written to the copy or changed in it later counts (`FrozenModel`).

    Args:
        model: torchvision's ResNets, ours, or any module with their blocks inside.
        example_input: (N, C, H, W) on the model's device; it is run once, and chooses layouts. Other sizes work too.
        dtype: float32, float16 or bfloat16 (float64 too, unfused) that the folded convolutions compute in; the model's
            if None. Parameters and buffers keep theirs, and what is not folded computes in them.
        cuda_graph: capture the whole model as one CUDA graph, for inputs of exactly the example's shape.
        normalize: (mean, std) of each channel. The model then takes images of bytes too, uint8, and computes with
            (x / 255 - mean) / std; in the kernel that reads them, where that is ours.

    Returns:
        A module from (N, C, H, W), any floating dtype, to the model's output; in ``dtype``, if the model is a network
        or a block of ours or torchvision's, and else as the model gives it.

    Raises:
        TypeError: model is not an ``nn.Module``, example_input not a floating-point Tensor (with normalize: or uint8),
            or dtype not floating.
        ValueError: example_input is not 4D or not on the model's device, cuda_graph without a CUDA device, or normalize
            not one number for each channel, or an std of 0.
    """
    check_normalize(normalize, example_input)
    if normalize is None or example_input.dtype != torch.uint8:
        check_image("example_input", example_input)
    if dtype not in (None, *DTYPES):
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, or None; got {dtype!r}")
    with torch.inference_mode(False):  # of whose tensors nobody counts what is written to them
        frozen = fuse(copy.deepcopy(model)).eval().requires_grad_(False)
    like = next((p for p in (*frozen.parameters(), *frozen.buffers()) if p.is_floating_point()), example_input)
    if like.device != example_input.device:
        raise ValueError(f"example_input must be on the model's device, {like.device}; got {example_input.device}")
    if cuda_graph and like.device.type != "cuda":
        raise ValueError(f"cuda_graph must be False for a model on {like.device}; it takes CUDA devices")
    result = FrozenModel(frozen, like.dtype if dtype is None else dtype, normalize)
    result.eval()
    result(example_input)
    if cuda_graph:
        result.capture(example_input)
    return result


def dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Of the convolutions' weights."""
    weights = (part.weight for part in module.modules() if isinstance(part, nn.Conv2d))
    return next((weight.dtype for weight in weights), otherwise)
