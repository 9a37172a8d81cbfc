"""PyTorch's ways and this package's: every one that can run here gives right numbers; the others say why not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet

import fused_resnet
from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.suite.correctness import JudgedTask
from fused_resnet.bench.suite.network_contenders import compiled_contenders, prepared_graph_step
from fused_resnet.bench.suite.network_task import NetworkTask
from fused_resnet.bench.suite.preparing import prepared_module
from fused_resnet.bench.suite.registry import contenders, select
from fused_resnet.bench.suite.subjects import find_subject
from fused_resnet.bench.suite.task import Contender
from fused_resnet.bench.suite.task_lists import block_tasks, op_tasks, residual_blocks
from fused_resnet.models import cifar

ON_CPU = {
    INFERENCE: ["eager NCHW", "eager channels_last", "fused", "frozen"],
    TRAINING_STEP: ["eager NCHW", "eager channels_last", "fused", "fused efficient"],
}


def short(block: type[nn.Module]) -> nn.Module:
    """The stem and two stages of torchvision's network, of a block each."""
    model = resnet.ResNet(block, [1, 1, 1, 1], num_classes=10)  # type: ignore[arg-type]
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(128 * block.expansion, 10)  # type: ignore[operator, arg-type]
    return model


def basic() -> nn.Module:
    return short(resnet.BasicBlock)


def bottlenecks() -> nn.Module:
    return short(resnet.Bottleneck)


def vanilla() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def by_name(name: str) -> Contender:
    (found,) = (contender for contender in contenders() if contender.name == name)
    return found


def model_task(mode: str, dtype: torch.dtype = torch.float32, batch_size: int = 4) -> JudgedTask:
    return JudgedTask(f"{__name__}:basic", mode, batch_size, dtype, image_size=32)


def block_task(mode: str, dtype: torch.dtype = torch.float32) -> NetworkTask:
    (task, *_) = block_tasks([f"{__name__}:bottlenecks"], [mode], [4], [dtype], "cpu", 32)
    assert isinstance(task, JudgedTask)
    return task


@pytest.mark.parametrize("level", [model_task, block_task], ids=["model", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [INFERENCE, TRAINING_STEP])
def test_everyone_who_can_run_here_is_right(mode: str, dtype: torch.dtype, level):
    task = level(mode, dtype)
    for name in ON_CPU[mode]:
        contender = by_name(name)
        assert contender.why_absent(task) == [], name
        prepared = contender.prepare(task)
        error, wrong = task.why_wrong(prepared)
        assert wrong is None, f"{name}: {wrong}"
        assert error is not None and error > 0
        for _ in range(4):
            out = prepared.run()
        assert isinstance(out, Tensor) and out.isfinite().all()
        assert (prepared.saved_bytes() is None) == (mode == INFERENCE), name
        prepared.close()


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING_STEP])
def test_ours_runs_at_the_level_and_on_the_backend_that_are_asked_for(mode: str):
    task, moved = model_task(mode), []
    with fused_resnet.use_backend("reference"):
        for level in range(4):
            with fused_resnet.ops.use_fusion_level(level):
                prepared = by_name("fused").prepare(task)
                assert task.why_wrong(prepared)[1] is None
                moved.append(prepared.moved_bytes())
    assert sorted(set(moved), reverse=True) == moved if mode == TRAINING_STEP else len(set(moved)) == 1


@pytest.mark.parametrize("level", [model_task, block_task], ids=["model", "block"])
@pytest.mark.parametrize("fuse", [False, True], ids=["eager", "fused"])
def test_a_graphed_step_is_the_same_step(fuse: bool, level):
    """Without a GPU the same code runs without a graph."""
    task = level(TRAINING_STEP)
    module = fused_resnet.fuse(task.copy()) if fuse else task.copy()
    prepared = prepared_graph_step(task, module)
    assert task.why_wrong(prepared)[1] is None


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING_STEP])
def test_compiled_networks_are_right(mode: str):
    task = model_task(mode)
    for contender in compiled_contenders(backend="aot_eager"):
        if not contender.why_absent(task):
            prepared = contender.prepare(task)
            assert task.why_wrong(prepared)[1] is None, contender.name
            prepared.run()


def test_what_one_compiles_another_does_not_find(monkeypatch: pytest.MonkeyPatch):
    """Networks of one class and shape, of which one is to freeze its weights."""
    compilations: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        compilations.append(torch._inductor.config.freezing)
        return graph.forward

    task = model_task(INFERENCE)
    limit = torch._dynamo.config.recompile_limit
    for contender in compiled_contenders(backend=backend) * 5:  # more than PyTorch's limit of recompilations
        contender.prepare(task)
    assert compilations == [False, True] * 5
    assert torch._dynamo.config.recompile_limit == limit and not torch._inductor.config.freezing


def test_what_was_compiled_goes_when_the_measurement_is_over():
    """A graph keeps frozen weights, and PyTorch the graph."""
    graphs: list[weakref.ref[torch.fx.GraphModule]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(weakref.ref(graph))
        return graph.forward

    prepared = compiled_contenders(backend=backend)[1].prepare(model_task(INFERENCE))
    assert [graph() is not None for graph in graphs] == [True]
    prepared.close()
    del prepared
    gc.collect()
    assert [graph() for graph in graphs] == [None]


def test_a_failed_compilation_leaves_nothing_changed():
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        raise RuntimeError("no compiler")

    limit = torch._dynamo.config.recompile_limit
    task = model_task(INFERENCE)
    with pytest.raises(Exception, match="no compiler"):
        compiled_contenders(backend=backend)[1].prepare(task)
    assert torch._dynamo.config.recompile_limit == limit and not torch._inductor.config.freezing
    assert task.why_wrong(by_name("frozen").prepare(task))[1] is None


def test_every_contender_starts_from_the_same_weights_and_changes_no_others():
    task = model_task(TRAINING_STEP)
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    losses = []
    for name in ("eager channels_last", "fused"):
        prepared = by_name(name).prepare(task)
        (loss, *_) = prepared.results()
        losses.append(loss)
        for _ in range(3):
            prepared.run()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for name, value in task.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_runs_take_the_inputs_in_turn():
    task = model_task(INFERENCE, batch_size=1)
    prepared = by_name("eager NCHW").prepare(task)
    outs = [prepared.run() for _ in range(6)]
    for i in range(3):
        assert torch.equal(outs[i], outs[i + 3])
        assert not torch.equal(outs[i], outs[(i + 1) % 3])


def test_a_training_step_trains():
    task = model_task(TRAINING_STEP)
    prepared = by_name("fused").prepare(task)
    losses = [prepared.run().item() for _ in range(60)]  # type: ignore[attr-defined]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_saved_and_moved_bytes_shrink_where_they_should():
    task = model_task(TRAINING_STEP)
    eager, fused = (by_name(name).prepare(task) for name in ("eager channels_last", "fused"))
    assert fused.moved_bytes() < eager.moved_bytes()  # type: ignore[operator]
    assert fused.saved_bytes() <= eager.saved_bytes()  # type: ignore[operator]
    inference = model_task(INFERENCE)
    plain, frozen = (by_name(name).prepare(inference).moved_bytes() for name in ("eager channels_last", "frozen"))
    assert frozen < plain  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("torch.compile freezing", TRAINING_STEP, "it does inference only"),
        ("frozen graph", INFERENCE, "it needs a CUDA device; the task is on cpu"),
        ("fused graph", TRAINING_STEP, "it needs a CUDA device; the task is on cpu"),
        ("eager CUDA graph", INFERENCE, "it needs a CUDA device; the task is on cpu"),
        ("fused efficient", INFERENCE, "it does training only"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_who_is_absent_says_why(name: str, mode: str, reason: str):
    reasons = by_name(name).why_absent(model_task(mode))
    assert len(reasons) == 1 and reasons[0].startswith(reason)


def test_a_network_that_fuse_does_not_know_is_measured_and_ours_says_that_nothing_was_fused():
    task = JudgedTask(f"{__name__}:vanilla", INFERENCE, 2, image_size=16)
    assert task.why_wrong(by_name("eager channels_last").prepare(task))[1] is None
    for name in ("fused", "frozen"):
        assert "nothing in it was fused" in by_name(name).why_absent(task)[0]


def test_contenders_of_networks_leave_ops_alone():
    (op, *_) = op_tasks(["resnet18"], [INFERENCE], [1], [torch.float32], "cpu", 32)
    absent = {c.name: c.why_absent(op) for c in contenders()}
    assert absent["frozen"] == ["it takes networks and blocks only"]
    assert absent["eager"] == []
    assert len(absent) == len(contenders())  # no name twice


def test_selection_by_pattern():
    assert [c.name for c in select(["eager n*", "FROZEN"])] == ["eager NCHW", "frozen"]
    assert len(select([])) == len(select(None)) == len(contenders())
    with pytest.raises(ValueError, match="a contender must be one of eager NCHW, .*; got 'froze'"):
        select(["frozen", "froze"])


def test_a_block_of_ours_is_measured_like_torchvisions():
    subject = find_subject("fused_resnet.models.cifar:cifar_resnet20")
    block = residual_blocks(subject, 16)[1]
    task = JudgedTask(subject, TRAINING_STEP, 4, image_size=16, block=block)
    assert isinstance(task.module, cifar.BasicBlock)
    for name in ("eager channels_last", "fused"):
        assert task.why_wrong(by_name(name).prepare(task))[1] is None


def test_a_contender_with_wrong_numbers_is_called_wrong():
    task = model_task(INFERENCE)
    module = task.copy()
    module.layer2[0].downsample[1].running_mean += 1
    error, wrong = task.why_wrong(prepared_module(task, module))
    assert error is not None and wrong is not None and wrong.startswith("the error of output is ")
