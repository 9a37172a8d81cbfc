"""Which backend runs: the reasons against each, explicit requests, the environment, the automatic choice."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet.ops import BackendError, bn_act, conv_bn_act, requested_backend, use_backend, why_not
from fused_resnet.ops.route import choose, reasons
from tests.ops.step import NEEDS_NATIVE, make_inputs

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(2, 3, 4, 4)
VECTOR = torch.ones(3)
APPLY = (X, VECTOR, VECTOR, None, None, None, True)
CONV = (X, torch.ones(5, 3, 1, 1), None, None, None, [1, 1], [0, 0], [1, 1], 1, True)


def apply_to(x: torch.Tensor) -> tuple:
    return (x, *APPLY[1:])


def test_nothing_is_requested_unless_asked_for():
    assert requested_backend() == (os.environ.get("FUSED_RESNET_BACKEND") or "auto")


def test_the_reference_takes_everything():
    for args in (APPLY, apply_to(X.double()), apply_to(X[:0]), apply_to(X[:, :, ::2])):
        assert why_not("reference", "bn_apply", *args) == []
    assert why_not("reference", "conv_bn_act", *CONV) == []


@NEEDS_NATIVE
def test_why_not_native():
    assert why_not("native", "bn_apply", *APPLY) == []
    assert why_not("native", "bn_apply", *apply_to(X.double())) == [
        "x is torch.float64; it takes float32, float16 and bfloat16"
    ]
    assert why_not("native", "bn_apply", *apply_to(X[:0])) == ["x is empty"]
    elsewhere = why_not("native", "bn_apply", *apply_to(X.to("meta")))
    assert elsewhere[0] == "x is on meta; it takes CPU tensors"
    assert "on cpu beside x" in elsewhere[1]
    assert len(why_not("native", "bn_apply", *apply_to(X[:0].double()))) == 2
    # Of the gradient ops x is the second argument.
    grad_apply = (X.double(), X, VECTOR, VECTOR, None, None, VECTOR, VECTOR, True)
    assert why_not("native", "bn_grad_apply", *grad_apply) == []
    assert "convolution" in why_not("native", "conv_bn_act", *CONV)[0]


def test_why_not_separate():
    assert why_not("separate", "conv_bn_act", *CONV) == []
    assert len(why_not("separate", "bn_apply", *APPLY)) == 1


def test_why_not_explains_why_a_backend_is_not_there():
    for name in ("cuda", "triton", "native"):
        assert why_not(name, "bn_apply", *APPLY)[: len(reasons.unavailable(name))] == reasons.unavailable(name)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            ("cudnn", "bn_apply", *APPLY),
            ValueError,
            "one of auto, cuda, triton, native, .* got 'cudnn'",
        ),
        ((None, "bn_apply", *APPLY), ValueError, "backend must be .* got None"),
        (("native", "relu", *APPLY), ValueError, "op must be one of bn_stats, .* got 'relu'"),
        (("native", "bn_apply", X), TypeError, r"args must be those of bn_apply, \(x, mean, .* got 1"),
        (("triton", "bn_apply"), TypeError, "args must be .* got 0"),
    ],
)
def test_why_not_of_nonsense(args, error, message):
    with pytest.raises(error, match=message):
        why_not(*args)


def test_use_backend_nests_and_restores():
    before = requested_backend()
    with use_backend("reference"):
        assert requested_backend() == "reference"
        with use_backend("separate"):
            assert requested_backend() == "separate"
        with use_backend("auto"):
            assert requested_backend() == "auto"
        assert requested_backend() == "reference"
    assert requested_backend() == before


def test_use_backend_restores_after_an_exception():
    before = requested_backend()
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        1 / 0  # noqa: B018
    assert requested_backend() == before


@pytest.mark.parametrize("name", ["cudnn", "", None, 1, ["native"]])
def test_use_backend_of_an_unknown_name(name):
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, triton"), use_backend(name):
        pass


def test_a_backend_that_is_not_there_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(choose, "unavailable", lambda name: ["it was left at home", "it was not built"])
    before = requested_backend()
    with (
        pytest.raises(BackendError, match="'native' cannot run any op: it was left at home; it was not built"),
        use_backend("native"),
    ):
        pass
    assert requested_backend() == before


@NEEDS_NATIVE
def test_a_backend_that_cannot_take_these_tensors_is_refused_with_every_reason():
    inputs = make_inputs((0, 3, 4, 4), torch.float64)
    with (
        use_backend("native"),
        pytest.raises(BackendError, match="'native' cannot run bn_apply: x is .*float64.*; x is empty"),
    ):
        bn_act(**inputs)
    conv = {"conv_weight": torch.ones(5, 3, 1, 1), "weight": None, "bias": None}
    running = {"running_mean": torch.zeros(5), "running_var": torch.ones(5)}
    with use_backend("native"), pytest.raises(BackendError, match="conv_bn_act: it has no single convolution"):
        conv_bn_act(X, **conv, **running)
    with use_backend("separate"), pytest.raises(BackendError, match="cannot run bn_apply"):
        bn_act(**make_inputs((2, 3, 4, 4)))


def test_the_automatic_choice_is_the_first_that_can(monkeypatch):
    def chosen(op, args):
        return choose.choose(op, args).__name__.rpartition(".")[2]

    usable = ["separate", "reference", *(["native"] if not reasons.unavailable("native") else [])]
    monkeypatch.setattr(reasons, "unavailable", lambda name: [] if name in usable else ["not here"])
    with use_backend("auto"):
        if "native" in usable:
            assert chosen("bn_apply", APPLY) == "native"
        assert chosen("bn_apply", apply_to(X.double())) == "reference"
        assert chosen("conv_bn_act", CONV) == "separate"
        monkeypatch.setattr(reasons, "unavailable", lambda name: [] if name == "reference" else ["not here"])
        assert chosen("bn_apply", APPLY) == "reference"
        assert chosen("conv_bn_act", CONV) == "reference"


@NEEDS_NATIVE
def test_separate_leaves_what_was_asked_for_as_it_is(monkeypatch):
    """What finishes its convolution is chosen automatically; other threads must not see their request change for it."""
    seen = []
    for name in ("native", "reference"):
        module = importlib.import_module(reasons.MODULES[name])

        def watched(*args, bn_apply=module.bn_apply):
            seen.append(requested_backend())
            return bn_apply(*args)

        monkeypatch.setattr(module, "bn_apply", watched)
    with use_backend("separate"):
        torch.ops.fused_resnet.conv_bn_act(*CONV)
    assert seen == ["separate"]


PROGRAM = """
import torch
from fused_resnet.ops import bn_act, requested_backend, why_not
x, vector = torch.randn(2, 3, 4, 4), torch.ones(3)
print(requested_backend())
bn_act(x, None, None, vector, vector)
"""


def run_with(backend_name: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"FUSED_RESNET_BACKEND": backend_name, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_the_environment_asks_for_a_backend():
    result = run_with("reference")
    assert (result.returncode, result.stdout.strip()) == (0, "reference"), result.stderr
    assert run_with("").stdout.strip() == "auto"


def test_the_environment_asks_for_what_cannot_be():
    result = run_with("cudnn")
    assert result.returncode != 0
    assert "FUSED_RESNET_BACKEND must be one of auto, cuda, triton" in result.stderr
    result = run_with("separate")
    assert result.returncode != 0
    assert "BackendError: backend 'separate' cannot run bn_apply" in result.stderr
