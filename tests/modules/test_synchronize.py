"""Models whose norms are nn.SyncBatchNorm on several ranks, against nn.BatchNorm2d in one process with all images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_resnet.convert import fusion_report, unfuse
from fused_resnet.frozen import freeze
from fused_resnet.modules import BasicBlock, Bottleneck, ConvBNAct2d, why_not_fuse
from fused_resnet.ops import use_fusion_level
from tests.modules.compare import assert_close, randomize, step, terms_of_gradients
from tests.ranks import counted_collectives, on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


def make_model() -> nn.Module:
    """Every kind of site: a norm alone, with a residual, and with a projection."""
    torch.manual_seed(3)
    blocks = (
        ConvBNAct2d(3, 8, 3),
        BasicBlock(8, 8),
        BasicBlock(8, 12, 2, projection(8, 12, 2)),
        Bottleneck(12, 2, 1, projection(12, 8, 1)),
        Bottleneck(8, 2),
    )
    return randomize(nn.Sequential(*blocks))


NORMS = 1 + 2 + 3 + 4 + 3


class Case(NamedTuple):
    dtype: torch.dtype = torch.float64
    memory_format: torch.memory_format = torch.channels_last
    images: tuple[int, ...] = (2, 1, 3)
    """How many each of three ranks has; of two ranks, the first has the last two's too."""
    momentum: float | None = 0.1
    wrap: str = ""
    """"parallel" for DistributedDataParallel, "checkpoint" for activations made again in backward, "all but one" for a
    process group without rank 1."""
    level: int | None = None
    """Of the residual blocks, where a rank has images; one without runs its norms one by one, beside the others."""

    def model(self) -> nn.Module:
        model = make_model().to(self.dtype).to(memory_format=self.memory_format)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = self.momentum
        return model

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """All images, and the gradient of all outputs."""
        torch.manual_seed(10 + index)
        x, cotangent = torch.randn(6, 3, 9, 8), torch.randn(6, 8, 5, 4)
        return x.to(self.dtype).contiguous(memory_format=self.memory_format), cotangent.to(self.dtype)

    def rows(self, rank: int, ranks: int) -> slice:
        images = self.images if ranks == 3 else (self.images[0], sum(self.images[1:]))
        return slice(sum(images[:rank]), sum(images[: rank + 1]))


CASES = {
    "float64": Case(),
    "float64 nchw": Case(memory_format=torch.contiguous_format),
    "float32": Case(torch.float32),
    "float32 nchw": Case(torch.float32, torch.contiguous_format),
    "cumulative average": Case(momentum=None),
    "an empty batch": Case(torch.float32, images=(4, 0, 2)),
    "an empty batch first": Case(images=(0, 2, 4)),
    "checkpoint": Case(wrap="checkpoint"),
    "parallel": Case(wrap="parallel"),
    "parallel with an empty batch": Case(torch.float32, images=(5, 0, 1), wrap="parallel"),
    "all but one": Case(wrap="all but one"),
    "level 1": Case(torch.float32, level=1),
    "level 3": Case(torch.float32, level=3),
    "level 3 with an empty batch": Case(torch.float32, images=(4, 0, 2), level=3),
    "level 3 with an empty batch first": Case(torch.float32, images=(0, 2, 4), level=3),
    "level 3 checkpoint": Case(torch.float32, wrap="checkpoint", level=3),
    "level 3 parallel": Case(torch.float32, wrap="parallel", level=3),
    "level 3 all but one": Case(torch.float32, wrap="all but one", level=3),
}


def one_step(
    model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor, training: bool
) -> dict[str, Tensor]:
    """Output, gradients and buffers."""
    model.train(training).zero_grad()
    x = x.detach().requires_grad_()
    out = call(x)
    out.backward(cotangent)
    result = {"output": out.detach(), "gradient of x": x.grad}
    result |= {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
    return result | {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}


TRAINING = (True, True, False)  # of the steps of each case


def run_cases(rank: int) -> dict[str, Any]:
    """On one rank: each case on its rows, and what was called meanwhile."""
    ranks, results = dist.get_world_size(), {}
    group = dist.new_group([r for r in range(ranks) if r != 1])
    for name, case in CASES.items():
        model = case.model()
        # It refuses to wrap SyncBatchNorm on the CPU, but what is converted afterwards keeps its parameters.
        parallel = nn.parallel.DistributedDataParallel(model) if case.wrap == "parallel" else None
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group if case.wrap == "all but one" else None)
        call: Callable[[Tensor], Tensor] = parallel or model
        if case.wrap == "checkpoint":
            call = checkpointed(model)
        rows = case.rows(rank, ranks)
        with counted_collectives() as calls, use_fusion_level(case.level):
            steps = [
                one_step(model, call, *(t[rows] for t in case.batch(index)), training)
                for index, training in enumerate(TRAINING)
            ]
        results[name] = steps, calls
    results["no running statistics"] = [], collectives_without_running_statistics()
    return results


def collectives_without_running_statistics() -> list[str]:
    """Of a training and an eval forward, which both use the statistics of the batch."""
    module = ConvBNAct2d(3, 8, 3)
    module.bn = nn.SyncBatchNorm(8, track_running_stats=False)
    with counted_collectives() as calls, torch.no_grad():
        module(torch.randn(1, 3, 4, 4))
        module.eval()(torch.randn(1, 3, 4, 4))
    return calls


def checkpointed(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(model, x, use_reentrant=False)


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(request.param, run_cases, tmp_path_factory.mktemp("ranks"))


def together(case: Case, results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks have computed, as one process would have it."""
    merged = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name.startswith("buffer"):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"
            merged[name] = parts[0]
        elif name in ("output", "gradient of x"):
            merged[name] = torch.cat(parts)
        else:  # DistributedDataParallel gives every rank the average
            merged[name] = parts[0] * len(parts) if case.wrap == "parallel" else torch.stack(parts).sum(0)
    return merged


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_equal_one_process(name, ranks):
    case, size = CASES[name], len(ranks)
    groups = [[r for r in range(size) if r != 1], [1]] if case.wrap == "all but one" else [list(range(size))]
    for group in groups:
        rows = [index for rank in group for index in range(6)[case.rows(rank, size)]]
        model = unfuse(case.model())
        for index, training in enumerate(TRAINING):
            with terms_of_gradients(model) as terms:
                want = one_step(model, model, *(t[rows] for t in case.batch(index)), training)
            assert_close(together(case, [ranks[rank][name][0][index] for rank in group]), want, terms=terms)


FORWARD, BACKWARD = ["all_gather"] * NORMS, ["all_reduce"] * NORMS


def test_collectives(ranks):
    """One per norm and direction, none in eval, and none for a rank alone."""
    for rank, results in enumerate(ranks):
        for name, (_, calls) in results.items():
            if name not in CASES:
                assert calls == ["all_gather"]
            elif CASES[name].wrap == "checkpoint":
                assert calls == (FORWARD * 2 + BACKWARD) * 2
            elif CASES[name].wrap == "all but one" and (rank == 1 or len(ranks) == 2):
                assert calls == []
            else:
                assert calls == (FORWARD + BACKWARD) * 2, name


def synchronized() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(make_model())


@pytest.mark.parametrize("training", [True, False])
def test_without_a_process_group_it_is_batch_norm(training):
    model, twin = synchronized().train(training), unfuse(make_model()).train(training)
    x = torch.randn(2, 3, 9, 8)
    assert_close(step(model, model, x), step(twin, twin, x))


def test_reported_as_fused_and_folded_by_freeze():
    model = synchronized()
    sites = fusion_report(model.double()).sites
    assert {reason for site in sites for reason in site.reasons} == {
        "native: x is torch.float64; it takes float32, float16 and bfloat16"
    }
    model = model.float().eval()
    x = torch.randn(2, 3, 9, 8)
    frozen = freeze(model, x)
    assert all(site.folded for site in fusion_report(frozen).sites)
    with torch.no_grad():
        assert_close({"output": frozen(x)}, {"output": model(x)})


def test_compiles_the_ordinary_way(monkeypatch):
    model = synchronized()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 9, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(step(model, compiled, x), step(twin, twin, x))
    norm = nn.SyncBatchNorm(3)
    assert why_not_fuse(norm, nn.ReLU()) == []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert ["torch.compile" in reason for reason in why_not_fuse(norm, nn.ReLU())] == [True]
