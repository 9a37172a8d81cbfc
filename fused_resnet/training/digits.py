"""Real images that need no download: the handwritten digits that come with scikit-learn.

1,797 images of 8x8 pixels with 17 grey levels, from the test part of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
TRAIN_IMAGES = 1437
TEST_IMAGES = 360
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Images are (N, 3, size, size) in float32, the grey level in all three channels; labels (N,) in int64, 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> Digits:
        return Digits(*(tensor.to(device) for tensor in vars(self).values()))


def load_digits(size: int = 64) -> Digits:
    """The digits, enlarged bilinearly to ``size`` x ``size`` and normalised by the mean and deviation of the training
    images; always the same 1,437 to train with and 360 to test with.

    Raises:
        ValueError: size is less than 8.
        ImportError: scikit-learn is not installed.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8, the size of the images; got {size}")
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digit images come with scikit-learn, which is not installed: pip install 'fused_resnet[demo]' "
            "(or pip install scikit-learn)"
        ) from error
    bundled = datasets.load_digits()
    images = torch.as_tensor(bundled.images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(bundled.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    deviation, mean = torch.std_mean(images[train])
    images = ((images - mean) / deviation).expand(-1, 3, -1, -1).contiguous()
    return Digits(images[train], labels[train], images[test], labels[test])


def shuffled_batches(images: Tensor, labels: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images, labels) in an order given by the seed, without the last incomplete batch."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    for start in range(0, len(labels) - batch_size + 1, batch_size):
        chosen = order[start : start + batch_size]
        yield images[chosen], labels[chosen]
