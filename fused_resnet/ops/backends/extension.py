"""``fused_resnet._C``, or None where it was not built."""

from __future__ import annotations

from typing import Any

extension: Any
try:
    from fused_resnet import _C as extension  # type: ignore[attr-defined,no-redef]
except ImportError:  # ops/route/reasons.py says so
    extension = None
