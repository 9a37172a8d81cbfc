"""Models frozen for inference: every BatchNorm folded, weights laid out for the device, one kernel a convolution."""

from fused_resnet.frozen.model import FrozenModel, freeze

__all__ = ["FrozenModel", "freeze"]
