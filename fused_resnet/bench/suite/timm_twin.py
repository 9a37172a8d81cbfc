"""timm's network of the same name, in eager PyTorch, channels_last, with the same weights."""

from __future__ import annotations

from torch import nn

from fused_resnet.bench.suite.conditions import installed, network_contender
from fused_resnet.bench.suite.contender import Contender
from fused_resnet.bench.suite.moved_bytes import EAGER
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import prepared_module
from fused_resnet.bench.suite.subjects import TIMM, Subject, find_subject
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.suite.torchvision_ops import timm


def timm_contenders() -> list[Contender]:
    """One; absent where eager is timm's network already, or where timm's has other parameters than the task's."""
    return [network_contender("timm", _prepare, installed("timm"), _same)]


def _same(task: NetworkTask) -> list[str]:
    if task.network.source == "timm":
        return ["eager is timm's already"]
    if task.network.source == "user":
        return ["a user's network has no twin in timm"]
    library, name = timm(), task.network.name
    if library is None:
        return ["timm cannot be imported"]
    if not library.is_model(name):
        return [f"timm has no {name}"]
    ours, theirs = (_shapes(network.without_memory(task.path)) for network in (task.network, _of_timm(task)))
    return [] if ours == theirs else [f"the parameters of timm's {name} are not those of {task.network.source}'s"]


def _of_timm(task: NetworkTask) -> Subject:
    return find_subject(TIMM + task.network.name)


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


def _prepare(task: NetworkTask) -> Prepared:
    twin = _of_timm(task).build().get_submodule(task.path)
    twin.load_state_dict(task.module.state_dict())
    return prepared_module(task, twin.to(task.device).train(task.training), way=EAGER)
