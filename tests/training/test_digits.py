"""The bundled digits: what they are, and that they are always the same."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from fused_resnet.training.digits import TEST_IMAGES, TRAIN_IMAGES, load_digits, shuffled_batches

pytest.importorskip("sklearn", reason="scikit-learn is not installed")


def test_the_split_is_fixed_and_has_every_class():
    digits, again = load_digits(size=8), load_digits(size=8)
    assert digits.train_images.shape == (TRAIN_IMAGES, 3, 8, 8)
    assert digits.test_images.shape == (TEST_IMAGES, 3, 8, 8)
    for tensor, same in zip(vars(digits).values(), vars(again).values(), strict=True):
        assert torch.equal(tensor, same)
    assert digits.train_labels.bincount().min() > 120
    assert digits.test_labels.bincount().min() > 25


def test_every_image_is_in_one_part_and_once():
    from sklearn import datasets

    digits = load_digits(size=8)
    original = torch.as_tensor(datasets.load_digits().images, dtype=torch.float32).flatten(1)
    images = torch.cat([digits.train_images, digits.test_images])[:, 0].flatten(1)
    grey_levels = ((images - images.min()) / (images.max() - images.min()) * 16).round()
    assert sorted(map(tuple, grey_levels.tolist())) == sorted(map(tuple, original.tolist()))


def test_training_images_are_normalised_and_grey():
    digits = load_digits(size=16)
    assert digits.train_images.dtype == torch.float32
    assert digits.train_labels.dtype == torch.int64
    torch.testing.assert_close(digits.train_images.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(digits.train_images.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert torch.equal(digits.train_images[:, 0], digits.train_images[:, 2])


def test_enlarging_keeps_the_picture():
    small, large = load_digits(size=8).test_images, load_digits(size=32).test_images
    shrunk = F.avg_pool2d(large, 4)
    correlation = torch.corrcoef(torch.stack([small.flatten(), shrunk.flatten()]))[0, 1]
    assert correlation > 0.95


def test_batches_are_whole_disjoint_and_given_by_the_seed():
    images, labels = torch.arange(10.0)[:, None], torch.arange(10)
    batches = list(shuffled_batches(images, labels, 4, seed=3))
    seen = torch.cat([batch_labels for _, batch_labels in batches])
    assert [len(batch_labels) for _, batch_labels in batches] == [4, 4]
    assert len(seen.unique()) == 8
    assert all(torch.equal(batch_images[:, 0].long(), batch_labels) for batch_images, batch_labels in batches)
    repeated = torch.cat([batch_labels for _, batch_labels in shuffled_batches(images, labels, 4, seed=3)])
    other = torch.cat([batch_labels for _, batch_labels in shuffled_batches(images, labels, 4, seed=4)])
    assert torch.equal(seen, repeated)
    assert not torch.equal(seen, other)


def test_too_small_a_size_is_refused():
    with pytest.raises(ValueError, match="size must be at least 8.*got 7"):
        load_digits(size=7)


def test_without_scikit_learn_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'fused_resnet\[demo\]'"):
        load_digits()
