"""Conversion of models that exist already: ``fuse`` and back, ``freeze`` for inference, and a report of every norm."""

from fused_resnet.convert.freeze import FrozenModel, freeze
from fused_resnet.convert.fuse import fuse, unfuse
from fused_resnet.convert.report import FusionReport, FusionSite, fusion_report

__all__ = ["FrozenModel", "FusionReport", "FusionSite", "freeze", "fuse", "fusion_report", "unfuse"]
