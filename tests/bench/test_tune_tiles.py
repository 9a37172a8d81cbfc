"""Tiles and levels: what is chosen from outside is what the kernels take, and both are measured as any candidate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fused_resnet import kernels
from fused_resnet.arguments import ConvSettings
from fused_resnet.bench.tune.questions import choosing, tile_questions, with_tiles
from fused_resnet.kernels import chosen_tiles
from fused_resnet.kernels.conv_tiles import conv_tiles
from fused_resnet.kernels.device import CHIPS
from fused_resnet.kernels.training_tiles import Product, training_tiles
from fused_resnet.ops.plan import measured_plan, plan_file
from tests.kernels.compiled import chip, compile_launches, empty  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (256 * 28 * 28, 128, 128, 9, 2, 132)
PRODUCT = Product(256 * 28 * 28, 128, 9, 128, flat=True)


@pytest.fixture(autouse=True)
def nobody_is_asked_afterwards():
    yield
    chosen_tiles.choose_by(None)


def asks() -> list:
    return tile_questions(lambda: (conv_tiles(*SHAPE), training_tiles(PRODUCT, 2, CHIPS[9, 0])))


def test_the_kernels_say_what_they_could_take():
    convolution, training = asks()
    assert (convolution.plan_key[0], training.plan_key[0]) == ("conv_bn_act", "training")
    for question in (convolution, training):
        assert question.usual in question.names and len(set(question.names)) == len(question.names) >= 11
        plan_file.check_key(question.plan_key)


def test_a_tile_chosen_from_outside_is_taken_and_no_other_shape_changes():
    (convolution, training), others = asks(), (conv_tiles(7 * 7, 512, 512, 9, 2, 132), conv_tiles(*SHAPE))
    picked = {question.plan_key: question.names[-1] for question in (convolution, training)}
    chooser = choosing(picked)
    assert str(with_tiles(chooser, lambda: conv_tiles(*SHAPE))()) == convolution.names[-1] != convolution.usual
    assert str(training_tiles(PRODUCT, 2, CHIPS[9, 0])) == training.names[-1] != training.usual
    assert conv_tiles(7 * 7, 512, 512, 9, 2, 132) == others[0]
    chosen_tiles.choose_by(None)
    assert conv_tiles(*SHAPE) == others[1]


def test_a_tile_that_is_not_legal_here_is_never_taken():
    usual = conv_tiles(*SHAPE)
    for name in ("512x512x512, 64 warps, 9 stages", "", "128x128"):
        chosen_tiles.choose_by(lambda *question, name=name: name)
        assert conv_tiles(*SHAPE) == usual


def test_who_chooses_is_asked_once_for_a_shape():
    asked = []
    chosen_tiles.choose_by(lambda *question: asked.append(question))
    for _ in range(3):
        conv_tiles(*SHAPE)
        training_tiles(PRODUCT, 2, CHIPS[9, 0])
    assert len(asked) == 2


def test_a_plan_with_tiles_reaches_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv(plan_file.ENVIRONMENT_VARIABLE, str(tmp_path))
    convolution, _ = asks()
    chosen_tiles.choose_by(None)
    name = next(name for name in convolution.names if name != convolution.usual)
    measured_plan.reload()
    try:
        measured_plan.record(measured_plan.TILES, convolution.plan_key, name, {}, heuristic=convolution.usual)
        measured_plan.reload()  # as a new process, which asks for a backend first
        assert str(conv_tiles(*SHAPE)) == convolution.usual
        assert measured_plan.winner("bn_apply", ()) is None
        assert str(conv_tiles(*SHAPE)) == name
        with measured_plan.ignoring_measured_plan():
            assert str(conv_tiles(*SHAPE)) == convolution.usual
        assert str(conv_tiles(*SHAPE)) == name
    finally:
        monkeypatch.undo()
        measured_plan.reload()
    assert str(conv_tiles(*SHAPE)) == convolution.usual


@pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1: there is no compiler in this process")
@pytest.mark.parametrize("chip", [90], indirect=True)
def test_other_tiles_are_other_machine_code(compile_launches):  # noqa: F811
    x, weight = empty((8, 64, 28, 28), torch.bfloat16), empty((64, 64, 1, 1), torch.bfloat16)
    arguments = (x, weight, None, None, None, ConvSettings(), True)
    (question,) = tile_questions(lambda: compile_launches(kernels.conv_bn_act, *arguments))
    found = {}
    for name in (question.usual, next(name for name in question.names if name.startswith("16x32"))):
        (found[name],) = with_tiles(
            choosing({question.plan_key: name}), lambda: compile_launches(kernels.conv_bn_act, *arguments)
        )()
    first, second = found.values()
    assert first.ptx != second.ptx and ".reqntid 64" in second.ptx.replace(", 1, 1", "")


INTERPRETED = """
import torch
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import PRODUCTS, ConvTrainingTask
from fused_resnet.bench.sites import Convolution, ConvSite
from fused_resnet.bench.tune import questions
from fused_resnet.bench.tune.level_task import LevelTask
from fused_resnet.bench.suite.rounds import ONCE
from fused_resnet.bench.tune.fastest import tune
from fused_resnet.ops.plan import measured_plan
from fused_resnet.ops import training_level

torch.set_num_threads(1)
conv = Convolution(16, 3, 3, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1)
site = ConvSite(conv, "", normed=True, takes_gradient=True)
settings = (1, torch.float32, torch.device("cpu"))
tiles = {}
asked = [questions.which_backend(1, ConvInferenceTask(site, *settings))]
asked += [questions.which_tile(1, ConvTrainingTask(site, product, *settings)) for product in PRODUCTS]
asked += [questions.which_level(tiles, LevelTask(site, *settings))]
outcome = tune(asked, tiles, None, method=ONCE)
assert not outcome.failed and not outcome.left, (outcome.failed, outcome.left)
first, *products, level = [found for _, found in outcome.found]
assert not any(found.dropped for _, found in outcome.found), outcome.found
assert len([name for name in first.seconds if name.startswith("triton")]) == 2 and "separate" in first.seconds, first
assert all(len(found.seconds) == 2 for found in products), products
assert set(level.seconds) == {"0", "1", "2", "3"} and level.heuristic == "3", level
assert len(tiles) == 4, tiles
found = {op for op, _ in measured_plan.decisions()}
assert found == {"tiles", "conv_bn_act", "conv_stats", "conv_grad_input", "conv_grad_weight", "training_level"}, found
"""


def test_tiles_and_levels_are_measured_and_right_in_triton_s_interpreter(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", plan_file.ENVIRONMENT_VARIABLE: str(tmp_path)}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "error::RuntimeWarning:fused_resnet", "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
