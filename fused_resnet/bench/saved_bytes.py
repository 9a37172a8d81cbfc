"""How much memory a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the tensors that ``forward`` saves for backward, each storage counted once and whole.

    The model's own parameters and buffers are not counted: they live anyway. Inputs are counted where they are saved
    (a first convolution needs its image for the gradient of its weight), and so are a loss's labels.

    ``forward`` runs once, with gradients, and whatever it changes stays changed (running statistics in training mode).

    Example:
        ``saved_bytes(model, lambda: torch.nn.functional.cross_entropy(model(images), labels))``
    """
    owned = {_storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[tuple[torch.device, int], Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (key := _storage_key(tensor)) not in owned:
            kept[key] = tensor.detach()  # alive until the count, so that no address comes back as another storage
        return tensor.detach()  # not itself: an output that its own node holds is never freed, nor the graph behind it

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
