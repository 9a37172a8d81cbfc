"""What ``help`` says of a builder: every argument that it takes, with its default, and what it gives."""

from __future__ import annotations

import inspect

import pytest
import torch

import fused_resnet
from fused_resnet import models
from fused_resnet.models.resnet import FIXED_BY_ARCHITECTURE, ResNetOptions

BUILDERS = [name for name in models.__all__ if name.startswith(("resne", "wide_resne"))]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_says_what_it_takes(name):
    builder = getattr(fused_resnet, name)
    parameters = inspect.signature(builder).parameters
    theirs = inspect.signature(models.ResNet).parameters
    assert list(parameters)[:2] == ["weights", "progress"]
    assert set(parameters) == {"weights", "progress", *theirs} - {"block", "layers"}
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in parameters.values())
    text = inspect.getdoc(builder)
    for argument in ("(N, 3, H, W)", "(N, num_classes)", *parameters):
        assert argument in text


@pytest.mark.parametrize("name", BUILDERS)
def test_the_defaults_that_are_shown_are_those_that_are_used(name):
    shown = {name: one.default for name, one in inspect.signature(getattr(models, name)).parameters.items()}
    with torch.device("meta"):
        with_all_named, without = getattr(models, name)(**shown), getattr(models, name)()
    assert str(with_all_named) == str(without)
    assert shown["width_per_group"] == FIXED_BY_ARCHITECTURE.get(name, {}).get("width_per_group", 64)


def test_the_options_are_those_of_the_network():
    assert set(ResNetOptions.__annotations__) == set(inspect.signature(models.ResNet).parameters) - {"block", "layers"}
