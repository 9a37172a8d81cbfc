"""What ``torch.autocast`` makes of the input of a convolution."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of x before a convolution; None where it leaves x alone, as on devices it does not know."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch._C._is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
