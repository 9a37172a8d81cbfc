"""CUDA graphs: of eager's inference, and of whole training steps."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

import fused_resnet
from fused_resnet.bench.result import TRAINING_FORWARD
from fused_resnet.bench.suite.conditions import cuda_only, network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.loss import loss_of
from fused_resnet.bench.suite.moved_bytes import EAGER, Way, moved_bytes
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import module_in, prepared_inference
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.suite.training import batches, make_optimizer, results_of

WARM_UP = 3


def graphed_contenders() -> list[Contender]:
    """Eager, channels_last, as one graph."""
    return [network_contender("eager CUDA graph", _prepare, cuda_only, _not_the_forward, no_float16)]


def _not_the_forward(task: NetworkTask) -> list[str]:
    captures = "what is captured is inference or a whole training step"
    return [captures] if task.mode == TRAINING_FORWARD else []


def no_float16(task: NetworkTask) -> list[str]:
    """Of training: its loss has to be scaled, which ``graph_step`` does not do."""
    float16 = task.training and task.dtype == torch.float16
    return ["training in float16 scales its loss, which graph_step does not do"] if float16 else []


def _prepare(task: NetworkTask) -> Prepared:
    if task.training:
        return prepared_graph_step(task, task.copy(), way=EAGER)
    module = module_in(task, task.copy(), torch.channels_last)
    inputs = task.inputs_as(task.dtype, torch.channels_last)
    return prepared_inference(task, CapturedInference(module, inputs[0]), inputs, way=EAGER)


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
    """A block as it stands within a network, where its input wants a gradient; ``leaf.grad`` is it.

    ``graph_step`` gives its model an input without one.
    """

    leaf: Tensor | None = None

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        self.leaf = x.detach().requires_grad_()
        return self.block(self.leaf)


def prepared_graph_step(task: NetworkTask, module: nn.Module, way: Way = None) -> Prepared:
    """``graph_step`` of a module: where there is no CUDA device, the same step without a graph."""
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = WithInputGradient(module) if task.level_takes_input_gradient else module
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
