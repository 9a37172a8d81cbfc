"""``torch.jit.script`` and ``torch.jit.trace``: what they make of our models answers as the plain model does."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from fused_resnet import freeze
from tests.convert.twins import FOLDED, TWINS, images, twins
from tests.modules.compare import assert_close, step

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def reloaded(scripted: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TWINS)
def test_a_scripted_model_answers_and_trains_as_the_plain_one(name: str, training: bool):
    ours, plain = twins(name, training)
    classes = [type(module) for module in ours.modules()]
    scripted = reloaded(torch.jit.script(copy.deepcopy(ours)))
    assert_close(step(scripted, scripted, images()), step(plain, plain, images()))
    torch.jit.script(ours)
    assert [type(module) for module in ours.modules()] == classes


def test_a_script_is_of_plain_ops_alone():
    """So it loads where this package is not installed."""
    for name in ("BasicBlock", "modules"):
        graph = torch.jit.script(twins(name)[0]).inlined_graph
        assert "aten::batch_norm" in str(graph) and "fused_resnet::" not in str(graph)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, images())])
@pytest.mark.parametrize("name", FOLDED)
def test_a_frozen_model_scripted_or_traced(name: str, make, wrapped: bool):
    ours, plain = twins(name)
    frozen = freeze(nn.Sequential(ours) if wrapped else ours, images())
    before = frozen(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        made = reloaded(make(frozen))
    for x in (images(), 2 * images(), images(batch_size=3)):
        torch.testing.assert_close(made(x), plain(x))
    assert torch.equal(frozen(images()), before)
    exported = torch.export.export(frozen, (images(),)).module()
    torch.testing.assert_close(exported(images()), plain(images()))


@pytest.mark.parametrize("name", ["BasicBlock", "modules"])
def test_a_model_frozen_in_another_dtype_gives_that(name: str):
    ours, plain = twins(name)
    frozen = freeze(ours, images(), dtype=torch.bfloat16)
    for make in (torch.jit.script, torch.fx.symbolic_trace, lambda model: torch.jit.trace(model, images())):
        out = make(frozen)(images())
        assert out.dtype == frozen(images()).dtype
        torch.testing.assert_close(out.float(), plain(images()), rtol=2e-2, atol=2e-2)
