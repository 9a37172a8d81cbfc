"""``python -m fused_resnet tune`` from its arguments to the choice of a backend."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import pytest
import torch

from fused_resnet.arguments import ConvSettings
from fused_resnet.bench.suite.rounds import Method
from fused_resnet.bench.tune import command
from fused_resnet.bench.tune.fastest import tune
from fused_resnet.bench.tune.level_task import LevelStep
from fused_resnet.bench.tune.questions import Selection, questions
from fused_resnet.ops import reference, training_level, use_backend
from fused_resnet.ops.backends.native.conv import NativeConv, takes_dtype
from fused_resnet.ops.plan import measured_plan, plan_file, plan_key
from fused_resnet.ops.route import choose, context
from fused_resnet.ops.route.reasons import module, why_not_device
from tests.ops.step import NEEDS_NATIVE

SELECTION = Selection(("resnet18",), {"training": (2,)}, (torch.float32,), torch.device("cpu"), 32)
QUICK = Method(rounds=5, min_seconds=0, most_rounds=5, sample_seconds=0.0002, pause=0, warm_up=False)
SLEEP = 0.003


@pytest.fixture(autouse=True)
def no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(plan_file.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(plan_file, "SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(command, "METHOD", QUICK)
    measured_plan.reload()
    with use_backend("auto"):
        yield
    monkeypatch.undo()
    measured_plan.reload()


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all the shapes, those of two passes and the first two convolutions."""

    def few(selection, tiles):
        found = questions(selection, tiles)
        convolutions = [each for each in found if each.op == "conv_bn_act"][:2]
        return [
            *convolutions,
            *(each for each in found if each.title.startswith(("bn_stats ", "bn_apply 64"))),
        ]

    monkeypatch.setattr(command, "questions", few)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([*words, "--device", "cpu", "--model", "resnet18"]))


def slowed(function):
    def slow(*arguments):
        time.sleep(SLEEP)
        return function(*arguments)

    return slow


def chosen_for_bn_apply(batch: int = 2) -> str:
    x = torch.randn(batch, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    vector = torch.ones(64)
    return choose.choose("bn_apply", (x, vector, vector, vector, vector, None, True)).__name__


@NEEDS_NATIVE
def test_what_is_planted_wins_and_is_chosen_from_then_on(few_questions, monkeypatch, capsys):
    """The heuristics' choice is made slow for one op, the other candidate for another: only the first changes."""
    assert chosen_for_bn_apply().endswith("native")
    monkeypatch.setattr(module("native"), "bn_apply", slowed(module("native").bn_apply))
    monkeypatch.setattr(reference, "bn_stats", slowed(reference.bn_stats))
    words = ("--mode", "training", "--batch-size", "2", "--image-size", "32")
    assert run(*words) == 0
    output = capsys.readouterr().out
    decisions = measured_plan.decisions()
    of_apply = [d for (op, _), d in decisions.items() if op == "bn_apply"]
    of_stats = [d for (op, _), d in decisions.items() if op == "bn_stats"]
    assert len(of_apply) == 2 and all((d.winner, d.heuristic) == ("reference", "native") for d in of_apply)
    assert len(of_stats) == 5 and all((d.winner, d.heuristic) == ("native", "native") for d in of_stats)
    assert all(d.seconds["native"] > SLEEP > d.seconds["reference"] for d in of_apply)
    assert "7 measured, 2 of them faster than as written; 0 were known before" in output
    assert "bn_apply 64x16x16 x 2 float32" in output and str(measured_plan.plan_path()) in output

    assert chosen_for_bn_apply().endswith("reference") and chosen_for_bn_apply(3).endswith("native")
    measured_plan.reload()
    assert chosen_for_bn_apply().endswith("reference")


@NEEDS_NATIVE
def test_a_rerun_goes_on_where_the_first_one_stopped(few_questions, capsys, tmp_path):
    words = ("--mode", "inference", "training", "--batch-size", "1", "--image-size", "32")
    file = tmp_path / "mine.json"
    assert run(*words, "--budget", "0.000001", "--output", str(file)) == 0
    assert "left: 9 (the time was used up)" in capsys.readouterr().out
    assert run(*words, "--output", str(file)) == 0
    assert "9 measured" in capsys.readouterr().out
    before = file.read_text()
    assert run(*words, "--output", str(file)) == 0
    assert "0 measured, 0 of them faster than as written; 9 were known before" in capsys.readouterr().out
    assert file.read_text() == before
    assert run(*words, "--output", str(file), "--again") == 0
    assert "9 measured" in capsys.readouterr().out
    assert file.read_text() != before
    assert not measured_plan.plan_path().exists() and chosen_for_bn_apply(1).endswith("native")


def test_the_dry_mode_runs_everything_tiny_to_the_end_and_keeps_nothing(capsys):
    assert run("--mode", "inference", "training", "--dry") == 0
    output = capsys.readouterr().out
    for op in ("conv_bn_act", "bn_stats", "bn_apply_dual", "bn_grad_stats", "bn_grad_apply"):
        assert f"{op} " in output
    assert "dry: tiny shapes" in output and not measured_plan.plan_path().exists()


@NEEDS_NATIVE
def test_wrong_numbers_are_dropped_and_reported(few_questions, monkeypatch, capsys):
    right = reference.bn_apply

    def wrong(*arguments):
        return right(*arguments) + (1 if arguments[0].dtype == torch.float32 else 0)  # fast, and nearly

    monkeypatch.setattr(module("native"), "bn_apply", slowed(module("native").bn_apply))
    monkeypatch.setattr(reference, "bn_apply", wrong)
    assert run("--mode", "training", "--batch-size", "2", "--image-size", "32") == 0
    output = capsys.readouterr().out
    assert output.count("dropped: reference of bn_apply 64x") == 2 and "PyTorch's own" in output
    assert {d.winner for (op, _), d in measured_plan.decisions().items() if op == "bn_apply"} == {"native"}


def test_nothing_live_is_touched(few_questions):
    """Not the generator, the requested backend, or the plan in effect."""
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measured_plan.record("thing", (1,), "fast", {})
    assert run("--mode", "inference", "--batch-size", "1", "--image-size", "32") == 0
    torch.testing.assert_close(torch.rand(3), expected)
    assert context.requested_backend() == "auto" and measured_plan.winner("thing", (1,)) == "fast"


def test_ctrl_c_keeps_what_was_measured(monkeypatch):
    asked = questions(SELECTION, {})[:4]

    def interrupt(question):
        if question is asked[2]:
            raise KeyboardInterrupt

    outcome = tune(asked, {}, None, method=QUICK, begin=interrupt)
    assert outcome.interrupted and outcome.left == [question.title for question in asked[2:]]
    assert set(measured_plan.decisions()) == {(question.op, question.key) for question in asked[:2]}


def test_a_budget_is_kept_by_what_the_slowest_of_its_op_took():
    asked, now = questions(SELECTION, {})[:5], [0.0]

    def take_ten_seconds(question, found):
        now[0] += 10

    outcome = tune(asked, {}, None, method=QUICK, seconds=35, clock=lambda: now[0], finish=take_ten_seconds)
    assert len({question.op for question in asked}) == 1
    assert len(outcome.found) == 3 and len(outcome.left) == 2  # a fourth would have ended at 40


def test_one_that_raises_is_reported_and_the_others_go_on(monkeypatch):
    asked = questions(SELECTION, {})[:3]
    asked[1] = dataclasses.replace(asked[1], ask=lambda: 1 / 0)
    outcome = tune(asked, {}, None, method=QUICK)
    assert len(outcome.found) == 2 and "ZeroDivisionError" in outcome.failed[asked[1].title]


def test_the_questions_are_of_every_pass_and_shape_once():
    found = questions(SELECTION, {})
    keys = [(question.op, question.key) for question in found]
    assert len(set(keys)) == len(keys) and {op for op, _ in keys} == {
        *("bn_stats", "bn_apply", "bn_apply_dual", "bn_grad_stats", "bn_grad_apply"),
        *([measured_plan.LEVEL] if takes_dtype(torch.float32) else []),
    }
    for question in found[:3]:  # a key is made of one image, and is that of the whole batch
        op, args = question.task.ops(question.task.first)[0]
        assert plan_key.key_of(op, args) == question.key and question.key[0][0] == 2


@pytest.mark.skipif(not takes_dtype(torch.float32), reason="no C++ convolutions for this processor")
@pytest.mark.skipif(not why_not_device("triton", torch.device("cpu")), reason="Triton's interpreter comes first")
def test_the_levels_of_the_cpu_are_measured_and_used(monkeypatch):
    def some(selection, tiles):
        return [each for each in questions(selection, tiles) if each.op == measured_plan.LEVEL][:1]

    monkeypatch.setattr(command, "questions", some)
    right = LevelStep.run

    def slow_above_0(self, level):
        time.sleep(10 * SLEEP if level > 0 else 0)
        return right(self, level)

    monkeypatch.setattr(LevelStep, "run", slow_above_0)
    assert run("--mode", "training", "--batch-size", "2", "--image-size", "32") == 0
    ((op, key), decision) = next(iter(measured_plan.decisions().items()))
    assert op == measured_plan.LEVEL and set(decision.seconds) == {"0", "1", "2"}
    assert (decision.winner, decision.heuristic) == ("0", "2")
    (question,) = some(SELECTION, {})
    inputs = question.task.first.inputs
    x, weight, settings = inputs.x, inputs.weight, inputs.settings
    assert key == question.key and training_level(x, weight, *settings) == 0
    with measured_plan.ignoring_measured_plan():
        assert training_level(x, weight, *settings) == 2


@pytest.mark.skipif(not takes_dtype(torch.float32), reason="no C++ convolutions for this processor")
def test_the_methods_of_a_frozen_network_are_measured_and_used(monkeypatch, capsys):
    def some(selection, tiles):
        return [each for each in questions(selection, tiles) if each.op == measured_plan.METHOD][:2]

    monkeypatch.setattr(command, "questions", some)
    monkeypatch.setattr(NativeConv, "estimated", lambda self, shape, dtype: "gemm")
    right = NativeConv.__call__

    def slow_products(self, x, residual=None, overwrite=False):
        time.sleep(10 * SLEEP if self._method == "gemm" else 0)
        return right(self, x, residual, overwrite)

    monkeypatch.setattr(NativeConv, "__call__", slow_products)
    assert run("--mode", "inference", "--batch-size", "2", "--image-size", "32") == 0
    assert "winograd (as written: gemm)" in capsys.readouterr().out
    decisions = {key: d for (op, key), d in measured_plan.decisions().items() if op == measured_plan.METHOD}
    assert {(d.winner, d.heuristic) for d in decisions.values()} == {("winograd", "gemm")}
    weight = torch.randn(64, 64, 3, 3)
    conv = NativeConv(weight, torch.zeros(64), ConvSettings(padding=(1, 1)), True)
    image = torch.randn(2, 64, 8, 8)
    conv(image)
    assert conv.methods == ["winograd"]
    conv(torch.randn(2, 64, 9, 9))  # which nobody measured
    assert conv.methods == ["winograd", "gemm"]
    with measured_plan.ignoring_measured_plan():
        unasked = NativeConv(weight, torch.zeros(64), ConvSettings(padding=(1, 1)), True)
        unasked(image)
    assert unasked.methods == ["gemm"]
    measured_plan.record(measured_plan.METHOD, next(iter(decisions)), "of another version", {})
    conv = NativeConv(weight, torch.zeros(64), ConvSettings(padding=(1, 1)), True)
    conv(image)
    assert conv.methods == ["gemm"]
    with pytest.raises(ValueError, match="method must be one of gemm, winograd; got 'fft'"):
        NativeConv(weight, torch.zeros(64), ConvSettings(padding=(1, 1)), True, "fft")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "-1"], "must be seconds, 0 or more; got '-1'"),
        (["--batch-size", "0"], "must be a whole number of at least 1; got '0'"),
        (["--image-size", "16"], "must be at least 32, since networks divide it by 32; got 16"),
        (["--model", "vgg16"], "invalid choice: 'vgg16'"),
    ],
)
def test_bad_arguments(words, message, capsys):
    with pytest.raises(SystemExit):
        run(*words)
    assert message in capsys.readouterr().err


def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    strange = tmp_path / "letter.txt"
    strange.write_text("Dear Sir")
    assert run("--output", str(strange)) == 1
    assert "letter.txt is not a plan" in capsys.readouterr().err and strange.read_text() == "Dear Sir"
    assert run("--output", str(strange / "plan.json")) == 1
    assert "letter.txt" in capsys.readouterr().err
    for device, message in (
        ("cuda:63", "that PyTorch finds here"),
        ("meta", "must be cpu or a GPU"),
        ("gpu?", "must name a device"),
    ):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert command.main(parser.parse_args(["--device", device])) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run() == 1
    assert "needs rich" in capsys.readouterr().err
