"""Ops as tasks: all of them, right and wrong contenders, reasons, bytes by hand, and what a list of them holds."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from benchmarks.norm_step import NormStepTask
from fused_resnet.bench.norm_inputs import Norm
from fused_resnet.bench.passes import PASSES, STATS_APPLY, PassTask
from fused_resnet.bench.result import INFERENCE, TRAINING_FORWARD, TRAINING_STEP
from fused_resnet.bench.sites import ENDINGS, NormSite, conv_sites
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import PRODUCTS, ConvTrainingTask
from fused_resnet.bench.suite.op_stem import BYTES, CHANNELS_LAST, LAYOUTS, StemTask
from fused_resnet.bench.suite.registry import op_contenders
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.suite.task_lists import op_tasks

SITE = NormSite(40, 2, 5, "residual")
VECTORS = 1024
"""Bytes: with a norm that is folded into the weight a convolution reads fewer of them."""
CONTENDERS = {contender.name: contender for contender in op_contenders()}
CONVS = {str(site): site for site in conv_sites("resnet18", 32)}
GROUPED = {str(site): site for site in conv_sites("resnext50_32x4d", 32)}


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpTask, "compile_backend", "eager")


def by_hand() -> list[OpTask]:
    """One of every kind, small and odd."""
    stages = [CONVS["64x8x8 3x3 to 64 with add"], CONVS["64x8x8 1x1/2 to 128 no ReLU"], CONVS["3x32x32 7x7/2 to 64"]]
    stages.append(GROUPED["128x8x8 3x3 to 128 in 32 groups"])
    return [
        *(PassTask(norm_pass, SITE, 3, torch.float32, "cpu") for norm_pass in [*PASSES[::4], STATS_APPLY]),
        *(NormStepTask(NormSite(16, 3, 5, ending), 2, torch.float32, "cpu") for ending in ENDINGS),
        *(ConvInferenceTask(site, 2, torch.float32, "cpu") for site in stages),
        *(ConvTrainingTask(site, product, 2, torch.float32, "cpu") for site in stages for product in PRODUCTS),
        *(StemTask(17, 2, torch.float16, "cpu", layout) for layout in LAYOUTS),
    ]


@pytest.mark.parametrize("task", [task for task in by_hand() if task.exists], ids=repr)
def test_every_contender_is_right_or_says_why_not(task: OpTask):
    took_part = set()
    for contender in CONTENDERS.values():
        if contender.why_absent(task):
            continue
        prepared = contender.prepare(task)
        error, wrong = task.why_wrong(prepared)
        assert wrong is None, contender.name
        assert error is not None and 0 <= error < 0.05
        prepared.run()
        moved = prepared.moved_bytes()
        assert moved is None or moved >= task.least_bytes() - VECTORS > 0
        took_part.add(contender.name)
        prepared.close()
    assert {"eager", "torch.compile", "ours reference"} <= took_part


@pytest.mark.parametrize("task", [task for task in by_hand() if task.exists], ids=repr)
def test_a_wrong_result_is_found(task: OpTask):
    right = CONTENDERS["eager"].prepare(task)

    def results() -> list[torch.Tensor | None]:
        given = [None if result is None else result.clone() for result in right.results()]
        first = next(result for result in given if result is not None)
        first[(-1,) * first.dim()] += 0.05 * first.abs().max() + 0.05
        return given

    error, wrong = task.why_wrong(Prepared(run=lambda: None, results=results))
    assert wrong is not None and "error is" in wrong
    assert error is not None and error > 0.01


def test_a_result_that_is_not_a_number_is_wrong():
    task = PassTask(PASSES[1], SITE, 3, torch.float32, "cpu")
    nothing = torch.full((3, 40, 2, 5), torch.nan)
    error, wrong = task.why_wrong(Prepared(run=lambda: None, results=lambda: [nothing]))
    assert wrong is not None and error is not None and error != error


def test_who_cannot_take_part_says_why():
    step = PassTask(PASSES[0], SITE, 3, torch.float32, "cpu")
    assert CONTENDERS["eager NCHW"].why_absent(step) == ["it has no bn_stats"]
    assert "convolution" in CONTENDERS["ours separate"].why_absent(step)[0]
    assert CONTENDERS["ours cuda"].why_absent(step) != []
    half = ConvInferenceTask(GROUPED["128x8x8 3x3 to 128 in 32 groups"], 2, torch.float64, "cpu")
    assert "float64" in CONTENDERS["ours packed oneDNN"].why_absent(half)[0]
    assert CONTENDERS["eager"].why_absent(object()) == ["it takes tasks at op level only"]


def test_names_are_unique_and_ours_say_so():
    assert len(CONTENDERS) == len(op_contenders())
    assert all(name.startswith("ours ") == contender.ours for name, contender in CONTENDERS.items())


def test_bytes_of_a_step_by_hand():
    site = NormSite(40, 16, 16, "residual")
    step, one = NormStepTask(site, 8, torch.float16, "cpu"), 8 * 40 * 16 * 16 * 2
    assert step.least_bytes() == (1 + 3 + 4 + 3) * one
    assert 0 <= step.moved("reference") - step.least_bytes() < one / 10  # vectors
    # Eager adds and applies the ReLU in passes of its own, forward and backward, and reads x once more in each norm.
    assert step.moved("eager") > 1.3 * step.least_bytes()
    assert step.saved("eager") == 2 * one + 2 * 40 * 4  # x and the output; mean and invstd


def test_bytes_of_convolutions_by_hand():
    x, y, weight, vector = 2 * 64 * 8 * 8 * 2, 2 * 64 * 8 * 8 * 2, 64 * 64 * 9 * 2, 64 * 4
    site = CONVS["64x8x8 3x3 to 64 with add"]
    least = {product: ConvTrainingTask(site, product, 2, torch.bfloat16, "cpu").least_bytes() for product in PRODUCTS}
    assert least == {
        "conv_stats": x + weight + y + (4 + 2) * vector,  # the norm before it; mean and invstd
        "conv_grad_input": 2 * y + weight + 2 * x + (4 + 4 + 2) * vector,  # and the coefficients; two sums
        "conv_grad_weight": 2 * y + x + 2 * weight + (4 + 4) * vector,  # in float32
    }
    inference = ConvInferenceTask(site, 2, torch.bfloat16, "cpu")
    assert inference.least_bytes() == x + weight + 2 * y + 2 * vector
    assert inference.moved("separate") == inference.least_bytes() + 2 * y
    assert inference.flop() == 2 * 2 * 64 * 8 * 8 * 64 * 9


def test_stem_by_hand():
    stem = StemTask(224, 2, torch.bfloat16, "cpu", BYTES)
    x, weight, conv, out = 2 * 3 * 224 * 224, 64 * 3 * 49, 2 * 64 * 112 * 112, 2 * 64 * 56 * 56
    assert stem.least_bytes() == x + 2 * weight + 2 * out + 2 * 64 * 4
    assert stem.flop() == 2 * conv * 3 * 49 == 2 * 236_027_904
    vectors = 3 * 4  # a float for each channel of the image
    scaled = (x + 4 * x) + (8 * x + vectors) + (8 * x + vectors) + (4 * x + 2 * x)  # float, times, plus, to bfloat16
    convolved = 2 * x + 2 * weight + 2 * 64 + 2 * conv
    assert stem.moved("eager") == scaled + convolved + 4 * conv + (2 * conv + 2 * out + 8 * out)  # indices are int64


def test_all_ops_of_networks():
    modes = [INFERENCE, TRAINING_FORWARD]
    tasks = op_tasks(["resnet18", "resnet50"], modes, [1, 2], [torch.float32], "cpu", 64)
    keys = {(task.subject, task.mode, task.batch_size, task.dtype) for task in tasks}
    assert len(keys) == len(tasks)
    assert {task.mode for task in tasks} == set(modes)
    assert not any("grad" in task.subject or "step" in task.subject for task in tasks)
    more = op_tasks(["resnet18"], [TRAINING_STEP], [1], [torch.bfloat16], "cpu", 64)
    assert {task.mode for task in more} == {TRAINING_FORWARD, TRAINING_STEP}
    subjects = {task.subject for task in more}
    for start in ("bn_stats", "bn_apply_dual", "bn_grad_apply_mask", *PRODUCTS):
        assert any(subject.startswith(start) for subject in subjects), start
    assert not any(subject.startswith("conv_grad_input 3x64x64") for subject in subjects)


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match="at op level a model must be one of .*; got 'resnet19'"):
        op_tasks(["resnet19"], [INFERENCE], [1], [torch.float32], "cpu")
    with pytest.raises(ValueError, match="a mode must be one of inference.*; got 'training'"):
        op_tasks(["resnet18"], ["training"], [1], [torch.float32], "cpu")


def test_inputs_take_turns_and_are_not_zero():
    seen = []
    task = PassTask(PASSES[1], SITE, 3, torch.float32, "cpu")
    prepared = task.prepare("eager", lambda norm: lambda: seen.append(norm) or [])
    seen.clear()
    for _ in range(8):
        prepared.run()
    assert len({id(norm) for norm in seen}) == 4
    assert all(norm.x.count_nonzero() == norm.x.numel() for norm in seen)
    assert not torch.equal(seen[0].x, seen[1].x)


def test_inputs_that_were_given_back_come_back_the_same():
    task = PassTask(PASSES[1], SITE, 3, torch.float32, "cpu")
    prepared = CONTENDERS["eager"].prepare(task)
    norm, values = weakref.ref(task.first), task.first.x.clone()
    task.release()
    assert norm() is not None  # for the contender
    del prepared
    gc.collect()
    assert norm() is None
    assert torch.equal(task.first.x, values)


def test_tasks_that_nobody_can_do_do_not_pile_up():
    """A list of tasks is asked whether anybody can do them, before anything is measured."""
    tasks = [PassTask(norm_pass, SITE, 3, torch.float64, "cpu") for norm_pass in PASSES]
    for task in tasks:
        task.why_not("separate")
        task.why_not("reference")
        assert isinstance(task.first, Norm)
    assert sum("input_sets" in vars(task) for task in tasks) == 1


def test_the_generator_is_left_as_it_was():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert StemTask(17, 1, torch.float16, "cpu", CHANNELS_LAST).first.x.dtype == torch.float16
    assert torch.equal(torch.rand(3), expected)
