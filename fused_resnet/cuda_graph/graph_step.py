"""``graph_step``: a whole training step as one CUDA graph, which costs the host one launch instead of some thousand."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fused_resnet.cuda_graph.training_state import (
    CreatedState,
    TrainingState,
    add_state,
    parameters_of,
    remove_state,
    reset_state,
)


@torch.inference_mode(False)  # the static buffers are written to by every later call, wherever that is made
def graph_step(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    example: tuple[Tensor, Tensor],
    *,
    autocast_dtype: torch.dtype | None = None,
    warmup: int = 3,
) -> GraphStep:
    """A whole training step, captured as one CUDA graph: ``loss = step(images, labels)``. It equals::

        model.zero_grad()
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = loss_fn(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    Nothing is trained here: parameters, buffers, gradients, the optimizer's state and torch's random generators are as
    before, and the first call is the first step. Gradients of a step stay in ``p.grad`` until the next one.

    A call that finds the graph out of date captures it again, at the price of ``warmup`` steps: a hyperparameter in
    ``optimizer.param_groups`` has changed, a module's ``training``, a ``requires_grad``, or the memory of a parameter,
    buffer or optimizer state (``optimizer.load_state_dict``, ``model.to``). For a learning rate that changes at every
    step, make it a tensor on the device, which schedulers change in place and the graph reads:
    ``SGD(..., lr=torch.tensor(0.1, device="cuda"), fused=True)``, or likewise ``Adam(..., capturable=True)``.

    Other Python in the step (hooks, prints, a choice of backend) acts when the graph is captured, not afterwards. On
    other devices than CUDA every call runs the lines above; ``step.captured`` is False and ``step.reason`` says why.

    Args:
        model: on the device of the example, in whatever mode it is to be trained in.
        loss_fn: ``loss_fn(model(images), labels)`` is a scalar; a module's parameters and buffers are looked after too.
        optimizer: one that can be captured: on CUDA, ``capturable=True`` where the class has that argument.
        example: (images, labels), of the shapes, dtypes, device and memory format of every call; channels_last images
            for speed. The values only have to be valid.
        autocast_dtype: None or bfloat16. float16 needs a GradScaler, which decides on the host whether to skip a step.
        warmup: steps before a capture, which compile kernels and choose algorithms.

    Returns:
        A callable from (images, labels) to the loss before the update, a new scalar without gradient. Other memory
        formats are copied to the example's.

    Raises:
        TypeError: an argument is of another type.
        ValueError: also at a call: other shapes, dtypes or devices than the example's, with nothing trained; a
            BatchNorm with ``momentum=None`` in training, which reads its count on the host; an optimizer that keeps
            state on the host, or whose state cannot be prepared before its first step (SGD with dampening).
        RuntimeError: also at a call: the warm-up or the capture failed. Model and optimizer are as before, and the
            cause is chained.
    """
    return GraphStep(model, loss_fn, optimizer, example, autocast_dtype, warmup)


class GraphStep:
    """What ``graph_step`` returns.

    Attributes:
        captures: how many graphs have been captured so far; the latest is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        example: tuple[Tensor, Tensor],
        autocast_dtype: torch.dtype | None,
        warmup: int,
    ) -> None:
        _check_arguments(model, optimizer, example, autocast_dtype, warmup)
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._autocast_dtype, self._warmup = autocast_dtype, warmup
        self._images, self._labels = (tensor.detach().clone() for tensor in example)
        self._device = self._images.device
        self._why_not = why_not_capture(self._device)
        self._graph: CudaGraph | None = None
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._created: CreatedState = {}
        self.captures = 0
        if self._why_not:
            _check_norms(self._modules())
        else:
            self._capture()

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._graph is not None

    @property
    def reason(self) -> str:
        """Why there is no graph; empty where there is one."""
        return "" if self.captured else self._why_not or "the last capture failed"

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """One training step; the loss before the update. See ``graph_step``."""
        _check_like("images", images, self._images)
        _check_like("labels", labels, self._labels)
        if self._why_not:
            _check_norms(self._modules())
            return self._run(_in_format(images, self._images), _in_format(labels, self._labels))
        if not self._is_current():
            self._capture()
            add_state(self._optimizer, self._created)
        assert self._graph is not None
        self._created = {}
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss.clone()

    def _run(self, images: Tensor, labels: Tensor) -> Tensor:
        for owner in (self._model, self._loss_fn, self._optimizer):
            if isinstance(owner, nn.Module | torch.optim.Optimizer):
                owner.zero_grad()
        # No cache: it may hold casts from an autocast region around this one, which every replay would read again.
        enabled = self._autocast_dtype is not None
        with torch.autocast(self._device.type, self._autocast_dtype, enabled=enabled, cache_enabled=False):
            loss = self._loss_fn(self._model(images), labels)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor; got {got}")
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _capture(self) -> None:
        self._release()
        _check_norms(self._modules())
        started = self._signature()
        _check_capturable(self._optimizer, self._device, started, started)
        before = TrainingState(self._modules(), self._optimizer, self._device)
        graph = CudaGraph(self._device)

        def run() -> Tensor:
            return self._run(self._images, self._labels)

        try:
            with _naming("the warm-up"):
                graph.warm_up(run, self._warmup)
            _check_capturable(self._optimizer, self._device, started, self._signature())
            created = before.restore()
            reset_state(self._optimizer, created, before)
            add_state(self._optimizer, created)
            signature = self._signature()
            with _naming("the capture"):
                loss = graph.record(run)
            gradients = [(parameter, parameter.grad) for parameter in parameters_of(self._modules(), self._optimizer)]
        finally:
            before.restore()
        self._graph, self._loss, self._created, self._recorded = graph, loss, created, signature
        self._gradients = gradients
        self.captures += 1

    def _release(self) -> None:
        """Drops the graph and the last reference to its memory; the gradients in it are kept."""
        for parameter, gradient in self._gradients:
            if gradient is not None and parameter.grad is gradient:
                parameter.grad = gradient.clone()
        self._graph, self._gradients, self._created = None, [], {}

    def _is_current(self) -> bool:
        """Whether a new capture would be of the same step; if so, the state that was made for it is in its place."""
        if self._graph is None:
            return False
        add_state(self._optimizer, self._created)
        if self._signature() == self._recorded:
            return True
        remove_state(self._optimizer, self._created)
        return False

    def _signature(self) -> Signature:
        groups = self._optimizer.param_groups
        modules = self._modules()
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        optimized = [parameter for group in groups for parameter in group["params"]]
        state = [v for p in optimized for v in self._optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
        return Signature(
            [(name, _frozen(value)) for group in groups for name, value in group.items() if name != "params"],
            [module.training for module in modules],
            [(id(tensor), tensor.data_ptr(), tensor.requires_grad) for tensor in (*tensors, *optimized)],
            [tensor.data_ptr() for tensor in state],
        )

    def _modules(self) -> list[nn.Module]:
        return [*self._model.modules(), *(self._loss_fn.modules() if isinstance(self._loss_fn, nn.Module) else ())]


class Signature(NamedTuple):
    """What a graph has frozen, or holds the address of."""

    hyperparameters: list[tuple[str, Any]]
    modes: list[bool]
    tensors: list[tuple[int, int, bool]]
    state: list[int]


class CudaGraph:
    """What one function launches on a CUDA device, recorded and replayed, in a memory pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Tensor], times: int) -> None:
        """Runs it, on the stream of the capture: autograd runs a backward where its forward ran."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Captures it; the tensor that it returns holds the result of the latest ``replay``."""
        # The outer stream context is for a capture that fails, which leaves the capture's stream current. thread_local
        # lets other threads allocate meanwhile, as a DataLoader's that pins memory does.
        capture = torch.cuda.graph(self._graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(torch.cuda.current_stream(self._device)), capture:
            return run()

    def replay(self) -> None:
        """Launches everything again, on the current stream."""
        self._graph.replay()


def why_not_capture(device: torch.device) -> str:
    """Why a step on this device is not captured; empty where it is."""
    return "" if device.type == "cuda" else f"the example is on {device}; CUDA graphs need a CUDA device"


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"{what} of graph_step failed; model and optimizer are as before. {type(error).__name__}: {error}"
        ) from error


def _frozen(value: Any) -> Any:
    """Of a hyperparameter, what a graph keeps: a tensor's address on the device, any other value itself."""
    if isinstance(value, Tensor):
        return value.tolist() if value.is_cpu else value.data_ptr()
    return [_frozen(item) for item in value] if isinstance(value, list | tuple) else value


def _in_format(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def _check_arguments(model: Any, optimizer: Any, example: Any, autocast_dtype: Any, warmup: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    if not isinstance(example, list | tuple) or [isinstance(t, Tensor) for t in example] != [True, True]:
        raise TypeError("example must be a tuple of two tensors, (images, labels)")
    if autocast_dtype not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast_dtype must be None or torch.bfloat16; got {autocast_dtype!r} (float16 needs a GradScaler, which "
            "cannot be captured)"
        )
    if not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"warmup must be a positive integer; got {warmup!r}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"optimizer must step without a closure; got {type(optimizer).__name__}")
    device = example[0].device
    tensors = [("example's labels", example[1]), *model.named_parameters(), *model.named_buffers()]
    tensors += [("optimizer's parameter", p) for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of the example's images, {device}; got {tensor.device}")


def _check_like(name: str, tensor: Any, example: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    for what in ("shape", "dtype", "device"):
        got, takes = getattr(tensor, what), getattr(example, what)
        if got != takes:
            raise ValueError(f"{name} must have the example's {what}, {takes}; got {got}")


def _check_norms(modules: list[nn.Module]) -> None:
    for module in modules:
        cumulative = isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats
        if cumulative and module.training:
            raise ValueError(
                f"a BatchNorm in training must have a momentum; got {module}, whose average over all batches takes a "
                "count that is read on the host, which no graph can do"
            )


def _check_capturable(optimizer: Any, device: torch.device, started: Signature, ended: Signature) -> None:
    """ValueError where a replay would leave out something that the optimizer or the model does on the host."""
    name = type(optimizer).__name__
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(f"optimizer must be capturable; make it as {name}(..., capturable=True)")
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.device != device):
                raise ValueError(f"optimizer must keep its state on {device}; {name} has {key!r} on the host")
    if started.hyperparameters != ended.hyperparameters:
        raise ValueError(f"optimizer must not change its hyperparameters in a step, which a graph cannot; got {name}")
    if started.modes != ended.modes or started.tensors != ended.tensors:
        raise ValueError("model must update its tensors in place and keep its mode; a step of this one does not")
