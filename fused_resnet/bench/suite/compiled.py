"""``torch.compile`` of the plain network: as it is, with its longest search, and with frozen weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_resnet.bench.suite.conditions import inference_only, network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import module_in, prepared_inference, prepared_training
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.suite.training import Training

MAX_AUTOTUNE = "max-autotune"
RECOMPILE_LIMIT = 2**16
"""Where a network is compiled in parts, each part is kept with the code of its class, which many networks share; with
PyTorch's own limit of 8 the ninth would run in eager."""


def compiled_contenders(backend: str = "inductor") -> list[Contender]:
    """Of channels_last networks with static shapes; a training step's optimizer is as everybody's.

    Args:
        backend: of ``torch.compile``; another one where only the numbers matter, as in tests.
    """
    freezing = functools.partial(_prepare, backend, None, True)
    return [
        network_contender("torch.compile", functools.partial(_prepare, backend, None, False)),
        network_contender("torch.compile max-autotune", functools.partial(_prepare, backend, MAX_AUTOTUNE, False)),
        network_contender("torch.compile freezing", freezing, inference_only),
    ]


def _prepare(backend: str, mode: str | None, freezing: bool, task: NetworkTask) -> Prepared:
    with _compiling(freezing):
        return dataclasses.replace(_prepared(backend, mode, task), close=_forget)


def _prepared(backend: str, mode: str | None, task: NetworkTask) -> Prepared:
    module = task.copy()
    if task.training:
        call = _compile(module.to(memory_format=torch.channels_last), backend, mode)  # type: ignore[call-overload]
        return prepared_training(task, Training(task, module, call))
    call = _compile(module_in(task, module, torch.channels_last), backend, mode)
    inputs = task.inputs_as(task.dtype, torch.channels_last)
    return prepared_inference(task, call, inputs, guard=torch.no_grad)


def _forget() -> None:
    """PyTorch keeps what it has compiled, frozen weights included, for as long as the process lives. What other
    contenders have compiled goes with it, and would be compiled again: mostly the measurement is over by then."""
    torch._dynamo.reset()


def _compile(module: nn.Module, backend: str, mode: str | None) -> Any:
    mode = mode if backend == "inductor" else None
    compiled = torch.compile(_with_code_of_its_own(module), dynamic=False, backend=backend, mode=mode)
    if mode is None:
        return compiled

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last run's results are done with
        return compiled(x)

    return call


_numbers = itertools.count()


def _with_code_of_its_own(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What was compiled is kept with the code of a function, and found again by any other module of the same shapes,
    whether its weights were to be frozen or not: contenders must not share it."""

    def call(x: Tensor) -> Tensor:
        return module(x)

    code = call.__code__.replace(co_name=f"network_{next(_numbers)}")
    return types.FunctionType(code, globals(), closure=call.__closure__)


@contextlib.contextmanager
def _compiling(freezing: bool) -> Iterator[None]:
    """What was compiled by others stays."""
    import torch._dynamo.config
    import torch._inductor.config

    limits: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
    with torch._dynamo.config.patch(**limits), torch._inductor.config.patch(freezing=freezing):
        yield
