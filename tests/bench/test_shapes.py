"""The benchmarks' table of shapes against the network it claims to be."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from benchmarks.shapes import RESNET50_SITES


def test_the_table_holds_every_norm_of_resnet50():
    from torchvision.models import resnet50

    model = resnet50().eval()
    found: Counter[tuple[int, int, str]] = Counter()
    blocks = {name for name, module in model.named_modules() if hasattr(module, "bn3")}
    projections = {name for name in blocks if model.get_submodule(name).downsample is not None}

    def record(name: str):
        block, _, child = name.rpartition(".")
        ending = "relu" if child != "bn3" else "projection" if block in projections else "residual"

        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found[output.shape[1], output.shape[2], ending] += 1

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "downsample" not in name:
            module.register_forward_hook(record(name))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))

    assert found == Counter({(site.channels, site.size, site.ending): site.count for site in RESNET50_SITES})
    assert sum(site.count for site in RESNET50_SITES) == 49
