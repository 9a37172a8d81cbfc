"""What is made of a result: CSV, Markdown, one HTML page with plots, and the comparison of two."""

from __future__ import annotations

from fused_resnet.bench.report.files import write_all

__all__ = ["write_all"]
