"""Bytes saved for backward, against counts made by hand."""

from __future__ import annotations

import functools
import gc
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.bench.ledger import saved_bytes

FLOAT = 4


def test_a_convolution_saves_its_input():
    model = nn.Conv2d(3, 5, 3, bias=False)
    x = torch.randn(2, 3, 8, 8)
    assert saved_bytes(model, lambda: model(x)) == x.numel() * FLOAT


def test_convolution_norm_relu_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 8, 8)
    image, activation = 2 * 3 * 8 * 8, 2 * 5 * 8 * 8
    # The image; the convolution's output, saved by the norm; the output of norm and ReLU in one storage, saved by the
    # ReLU; the norm's mean and invstd. Its weight and running statistics are the model's and do not count.
    bytes_by_hand = (image + 2 * activation + 2 * 5) * FLOAT
    assert saved_bytes(model, lambda: model(x)) == bytes_by_hand


def test_a_storage_saved_twice_counts_once_and_a_view_counts_whole():
    model = nn.Identity()
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(model, lambda: (x * x).sum() + (x[:3] ** 2).sum()) == 10 * FLOAT


def test_storages_freed_during_the_forward_are_not_lost():
    model = nn.Identity()
    leaf = torch.randn(1000, requires_grad=True)

    def forward() -> None:
        for _ in range(3):  # each result is dropped, so that its memory could come back under the next
            (leaf.detach() * 2).mul(leaf).sum()

    assert saved_bytes(model, forward) == 3 * 1000 * FLOAT


def test_views_of_parameters_do_not_count():
    model = nn.Linear(4, 6, bias=False)
    x = torch.randn(2, 4, requires_grad=True)
    assert saved_bytes(model, lambda: F.linear(x, model.weight[:3])) == x.numel() * FLOAT


def test_gradients_may_be_off_outside():
    model = nn.Conv2d(3, 5, 3)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert saved_bytes(model, lambda: model(x)) == x.numel() * FLOAT


def test_nothing_stays_alive():
    """A hook that hands a saved output back as it came ties it to its own node, and the whole graph is never freed."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    weight = weakref.ref(model[0].weight)
    saved_bytes(model, functools.partial(model, torch.randn(1, 3, 8, 8)))
    del model
    gc.collect()
    assert weight() is None
