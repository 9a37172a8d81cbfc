"""Conversion of models that exist already: ``fuse`` and back, and a report of every norm."""

from fused_resnet.convert.fuse import fuse, unfuse
from fused_resnet.convert.report import FusionReport, FusionSite, fusion_report

__all__ = ["FusionReport", "FusionSite", "fuse", "fusion_report", "unfuse"]
