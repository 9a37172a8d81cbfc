"""The passes of a training step at every level of fusion, counted beside a measurement of one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from fused_resnet.bench.byte_tables import column
from fused_resnet.bench.contenders import builder_names
from fused_resnet.bench.result import MODEL, TRAINING_FORWARD, TRAINING_STEP, Measurement
from fused_resnet.bench.training_ledger import LEVELS, training_ledger


def step_ledgers(measurement: Measurement, known: Collection[str] = ()) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """An entry for ``Result.ledgers`` from the measured model, or none: of a model that this package has no builder
    for, of inference, of an op, and of a model in ``known``.

    Counted for the measurement's dtype, batch and image size.
    """
    name = measurement.subject
    if (
        measurement.level != MODEL
        or measurement.mode not in (TRAINING_FORWARD, TRAINING_STEP)
        or name in known
        or name not in builder_names()
    ):
        return {}
    dtype, image_size = getattr(torch, measurement.dtype), measurement.image_size or 224
    found: dict[str, list[dict[str, Any]]] = {}
    for level in LEVELS:
        ledger = training_ledger(name, level, measurement.batch_size, dtype, image_size)
        found[column(level)] = [
            {"phase": entry.phase, "kind": entry.kind, "bytes": entry.total / ledger.images}
            for entry in ledger.by_pass()
        ]
    return {name: found}
