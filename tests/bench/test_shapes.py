"""The sites of norms and convolutions that the benchmarks of ops run over, against torchvision's networks."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from fused_resnet.bench.sites import ADDED, PLAIN, SHORTCUT, conv_sites, convolutions, norm_sites

NAMES = ("resnet18", "resnet50", "resnext50_32x4d")


@pytest.mark.parametrize("name", NAMES)
def test_they_are_every_norm_of_the_network(name: str):
    from torchvision import models

    with torch.device("meta"):
        model = getattr(models, name)().eval()
    found: Counter[tuple[int, int, str]] = Counter()
    last = "bn3" if hasattr(model.layer1[0], "bn3") else "bn2"

    def record(path: str):
        block, _, child = path.rpartition(".")

        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            shortcut = model.get_submodule(block).downsample if child == last and block else None
            ending = "relu" if child != last or not block else "residual" if shortcut is None else "projection"
            found[output.shape[1], output.shape[2], ending] += 1

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and "downsample" not in path:
            module.register_forward_hook(record(path))
    model(torch.empty(1, 3, 224, 224, device="meta"))

    sites = norm_sites(name)
    assert found == Counter({(site.channels, site.height, site.ending): often for site, often in sites.items()})
    assert sites.total() == {"resnet18": 17}.get(name, 49)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_every_shape_of_convolution(name: str):
    sites = conv_sites(name)
    assert {site.conv for site in sites} == set(convolutions(name))
    assert len({(str(site), site.normed) for site in sites}) == len(sites)


def test_what_stands_around_a_convolution():
    of_bottleneck = {str(site): site for site in conv_sites("resnet50", 224)}
    stem = of_bottleneck["3x224x224 7x7/2 to 64"]
    assert (stem.behind, stem.normed, stem.takes_gradient) == (PLAIN, False, False)
    first, middle = of_bottleneck["64x56x56 1x1 to 64"], of_bottleneck["64x56x56 3x3 to 64"]
    assert (first.normed, first.takes_gradient, middle.normed) == (False, True, True)
    last, shortcut = of_bottleneck["64x56x56 1x1 to 256 with add"], of_bottleneck["64x56x56 1x1 to 256 no ReLU"]
    assert (last.behind, last.normed) == (ADDED, True)
    assert (shortcut.behind, shortcut.normed, shortcut.conv) == (SHORTCUT, False, last.conv)
    of_basic_block = {str(site): site for site in conv_sites("resnet18", 224)}
    assert of_basic_block["64x56x56 3x3 to 64"].normed is False
    assert of_basic_block["64x56x56 3x3 to 64 with add"].normed is True


@pytest.mark.parametrize(
    ("endings", "count"), [(("relu",), 8), (("residual",), 4), (("relu", "residual", "projection"), 16)]
)
def test_passes_are_where_the_network_has_them(endings: tuple[str, ...], count: int):
    assert sum(site.ending in endings for site in norm_sites("resnet50")) == count
