"""ResNets whose convolution, BatchNorm, ReLU and residual add are fused, in training and inference.

>>> import torch, fused_resnet
>>> model = fused_resnet.resnet18(num_classes=10).eval()           # or: fused_resnet.fuse(your_torchvision_model)
>>> fused_resnet.fusion_report(model).sites[0].fused
True
>>> fast = fused_resnet.freeze(model, torch.randn(1, 3, 64, 64))  # for inference
>>> fast(torch.randn(2, 3, 64, 64)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

from fused_resnet import models, modules, ops
from fused_resnet.convert import fuse, fusion_report, unfuse
from fused_resnet.cuda_graph.graph_step import graph_step
from fused_resnet.frozen import freeze
from fused_resnet.models import *  # noqa: F403  every builder, as listed in models.__all__
from fused_resnet.modules import BasicBlock, BatchNormAct2d, Bottleneck, ConvBNAct2d
from fused_resnet.ops import BackendError, use_backend
from fused_resnet.version import __version__

__all__ = [
    "BackendError",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvBNAct2d",
    "__version__",
    "freeze",
    "fuse",
    "fusion_report",
    "graph_step",
    "models",
    "modules",
    "ops",
    "unfuse",
    "use_backend",
    *models.__all__,
]
