"""Who takes part in a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fused_resnet.bench.suite.task import Prepared


@dataclass(frozen=True)
class Contender:
    """One way to do a task.

    Attributes:
        name: in tables, such as "eager channels_last" or "onnxruntime".
        why_absent: the reasons why it cannot do this task here (not installed, no GPU, inference only, another dtype);
            an empty list means that it can try. Cheap: imports nothing that takes long where it can help it.
        prepare: makes it ready for the task; how long that takes is its setup time. May raise: it has then failed.
        ours: whether this package runs it.
    """

    name: str
    why_absent: Callable[[Any], list[str]]
    prepare: Callable[[Any], Prepared]
    ours: bool = False
