"""Who runs networks and blocks in PyTorch: eager in its two memory formats, CUDA graphs, ``torch.compile``; and this
package, fused and frozen."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.bench.suite.moved_bytes import EAGER, EFFICIENT, FROZEN, FUSED, moved_bytes
from fused_resnet.bench.suite.network_task import NetworkTask, loss_of
from fused_resnet.bench.suite.preparing import (
    cuda_only,
    inference_only,
    module_in,
    network_contender,
    only,
    prepared_inference,
    prepared_module,
    prepared_training,
    training_only,
)
from fused_resnet.bench.suite.subjects import Subject
from fused_resnet.bench.suite.task import Contender, Prepared
from fused_resnet.bench.suite.training import Training, batches, make_optimizer, results_of
from fused_resnet.convert.sites import fusion_sites

FORMATS = {"eager NCHW": torch.contiguous_format, "eager channels_last": torch.channels_last}
WARM_UP = 3
RECOMPILE_LIMIT = 2**16
"""Where a network is compiled in parts, each part is kept with the code of its class, which many networks share; with
PyTorch's own limit of 8 the ninth would run in eager."""


def eager_contenders() -> list[Contender]:
    """One for each memory format."""

    def of(name: str, memory_format: torch.memory_format) -> Contender:
        settings: Any = {"memory_format": memory_format, "way": EAGER}
        return network_contender(name, lambda task: prepared_module(task, task.copy(), **settings))

    return [of(name, memory_format) for name, memory_format in FORMATS.items()]


def graph_contender() -> Contender:
    """Eager, channels_last, as one CUDA graph: inference, or a whole training step."""

    def prepare(task: NetworkTask) -> Prepared:
        if task.training:
            return prepared_graph_step(task, task.copy(), way=EAGER)
        module = module_in(task, task.copy(), torch.channels_last)
        inputs = task.inputs_as(task.dtype, torch.channels_last)
        return prepared_inference(task, CapturedInference(module, inputs[0]), inputs, way=EAGER)

    return network_contender("eager CUDA graph", prepare, cuda_only, no_float16)


no_float16 = only(
    lambda task: not task.training or task.dtype != torch.float16,
    "training in float16 scales its loss, which graph_step does not do",
)


class CapturedInference:
    """A module as one CUDA graph, for inputs like the example. The result is overwritten by the next call."""

    @torch.inference_mode()
    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self._input = example.clone()
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # chooses algorithms, which capture forbids
                module(self._input)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        self._module, self._graph = module, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._output = module(self._input)

    def __call__(self, x: Tensor) -> Tensor:
        self._input.copy_(x)
        self._graph.replay()
        return self._output


class WithInputGradient(nn.Module):
    """A block as it stands within a network, where its input wants a gradient; ``leaf.grad`` is it. ``graph_step``
    gives its model an input without one."""

    leaf: Tensor | None = None

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        self.leaf = x.detach().requires_grad_()
        return self.block(self.leaf)


def prepared_graph_step(task: NetworkTask, module: nn.Module, way: str | None = None) -> Prepared:
    """``graph_step`` of a module: where there is no CUDA device, the same step without a graph."""
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = WithInputGradient(module) if task.takes_input_gradient else module
    all_batches = batches(task, torch.channels_last)
    step = fused_resnet.graph_step(
        model, loss_of, make_optimizer(module), all_batches[0], autocast_dtype=task.autocast_dtype
    )
    turns = itertools.cycle(all_batches)

    def run() -> Tensor:
        return step(*next(turns))

    first = results_of(task, module, run(), model.leaf if isinstance(model, WithInputGradient) else None)
    for _ in all_batches[1:]:
        run()
    return Prepared(run, lambda: first, moved_bytes=lambda: moved_bytes(task, way))


def compiled_contenders(backend: str = "inductor") -> list[Contender]:
    """``torch.compile`` of channels_last networks with static shapes, as it is and with frozen weights."""
    prepare = functools.partial(functools.partial, _prepare_compiled, backend)
    return [
        network_contender("torch.compile", prepare(False)),
        network_contender("torch.compile freezing", prepare(True), inference_only),
    ]


def _prepare_compiled(backend: str, freezing: bool, task: NetworkTask) -> Prepared:
    with _compiling(freezing):
        module = task.copy()
        if task.training:
            call = _compile(module.to(memory_format=torch.channels_last), backend)  # type: ignore[call-overload]
            prepared = prepared_training(task, Training(task, module, call))
        else:
            call = _compile(module_in(task, module, torch.channels_last), backend)
            inputs = task.inputs_as(task.dtype, torch.channels_last)
            prepared = prepared_inference(task, call, inputs, guard=torch.no_grad)
        return dataclasses.replace(prepared, close=_forget)


def _forget() -> None:
    """PyTorch keeps what it has compiled, frozen weights included, for as long as the process lives. What other
    contenders have compiled goes with it, and would be compiled again: mostly the measurement is over by then."""
    torch._dynamo.reset()


_numbers = itertools.count()


def _compile(module: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    """With code of its own: what was compiled is kept with the code of a function, and found again by any other module
    of the same shapes, whether its weights were to be frozen or not. Contenders must not share it."""

    def call(x: Tensor) -> Tensor:
        return module(x)

    code = call.__code__.replace(co_name=f"network_{next(_numbers)}")
    own = types.FunctionType(code, globals(), closure=call.__closure__)
    return torch.compile(own, dynamic=False, backend=backend)


@contextlib.contextmanager
def _compiling(freezing: bool) -> Iterator[None]:
    """What was compiled by others stays."""
    import torch._dynamo.config
    import torch._inductor.config

    limits: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
    with torch._dynamo.config.patch(**limits), torch._inductor.config.patch(freezing=freezing):
        yield


def our_contenders() -> list[Contender]:
    """At the level and on the backend that are asked for (FUSED_RESNET_LEVEL, FUSED_RESNET_BACKEND)."""
    ours = functools.partial(network_contender, ours=True)

    def graph(task: NetworkTask) -> Prepared:
        return prepared_graph_step(task, fused_copy(task), way=FUSED)

    def efficient(task: NetworkTask) -> Prepared:
        return prepared_module(task, fused_copy(task, "efficient"), way=EFFICIENT)

    return [
        ours("fused", lambda task: prepared_module(task, fused_copy(task), way=FUSED), fusable),
        ours("frozen", functools.partial(_prepare_frozen, False), inference_only, fusable),
        ours("frozen graph", functools.partial(_prepare_frozen, True), inference_only, cuda_only, fusable),
        ours("fused graph", graph, training_only, cuda_only, no_float16, fusable),
        ours("fused efficient", efficient, training_only, fusable),
    ]


def fusable(task: NetworkTask) -> list[str]:
    """A network has to have something that ``fuse`` knows."""
    if _has_sites(task.network, task.path):
        return []
    return [
        "nothing in it was fused: fuse knows the exact classes of torchvision's ResNet blocks and this package's own, "
        f"and {task.subject} has none"
    ]


@functools.cache
def _has_sites(network: Subject, path: str) -> bool:
    module = network.without_memory(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing can be fused, which is what is asked here
        fused_resnet.fuse(module)
    return any(not site.reasons for part in module.modules() for site in fusion_sites(part))


def fused_copy(task: NetworkTask, memory: str = "default") -> nn.Module:
    """The task's module, after ``fuse``."""
    return fused_resnet.fuse(task.copy(), memory=memory)


def _prepare_frozen(cuda_graph: bool, task: NetworkTask) -> Prepared:
    """``freeze`` in the task's dtype."""
    inputs = task.inputs_as(task.dtype, torch.channels_last)
    module = task.copy().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = fused_resnet.freeze(module, inputs[0], dtype=task.dtype, cuda_graph=cuda_graph)
    return prepared_inference(task, frozen, inputs, way=FROZEN)
