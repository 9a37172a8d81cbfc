"""Whole networks as tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_resnet.bench.contenders import settle_statistics
from fused_resnet.bench.result import MODEL
from fused_resnet.bench.suite.network_task import SETTLING, NetworkTask, combinations
from fused_resnet.bench.suite.subjects import Subject, find_subject
from fused_resnet.bench.suite.task import Task

SETTLING_PIXELS = 2**14
"""Running statistics are taken of as many images as have about so many pixels, two at least."""


def model_tasks(
    names: Sequence[str],
    modes: Sequence[str],
    batch_sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device | str,
    image_size: int = 224,
) -> list[Task]:
    """Each network in each mode, dtype and batch size.

    Args:
        names: as `find_subject` takes them.
        modes: of ``result.MODES``.
        batch_sizes, dtypes, device: of the tasks.
        image_size: pixels of an image's side.

    Raises:
        ValueError: an unknown name, mode or dtype, or a size below 1.
    """
    return [
        ModelTask(subject, mode, batch_size, dtype, device, image_size)
        for subject in map(find_subject, names)
        for mode, batch_size, dtype in combinations(modes, batch_sizes, dtypes)
    ]


class ModelTask(NetworkTask):
    """A network on images (N, 3, S, S). A training step's loss is cross entropy with random labels.

    Args:
        subject: the network, or its name as `find_subject` takes it.
        mode: of ``result.MODES``.
        batch_size: N.
        dtype: float32, bfloat16 or float16.
        device: where it runs.
        image_size: S.
    """

    level = MODEL

    def __init__(
        self,
        subject: Subject | str,
        mode: str,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        image_size: int = 224,
    ) -> None:
        network = find_subject(subject) if isinstance(subject, str) else subject
        super().__init__(network, mode, batch_size, dtype, device, image_size)
        self.subject = network.name

    def make_module(self) -> nn.Module:
        model = self.network.build()
        images = max(2, SETTLING_PIXELS // self._size**2)
        settle_statistics(model, torch.randn(images, 3, self._size, self._size, generator=self._generator(SETTLING)))
        return model

    def input_shape(self) -> tuple[int, ...]:
        return self.batch_size, 3, self._size, self._size

    def make_target(self) -> Tensor:
        return torch.randint(_classes(self.network, self._size), (self.batch_size,))

    @property
    def _size(self) -> int:
        assert self.image_size is not None
        return self.image_size


@functools.cache
def _classes(network: Subject, size: int) -> int:
    """How many logits it gives.

    Raises:
        TypeError: it gives something else.
    """
    with torch.device("meta"), torch.no_grad():
        out = network.build()(torch.empty(1, 3, size, size))
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{network.name} must give logits, a tensor (N, classes); got {got}")
    return out.shape[1]
