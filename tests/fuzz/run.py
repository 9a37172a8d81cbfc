"""Checks generated calls of one kind, the same ones every time: ``python -m tests.fuzz.run functions 500 last.txt``.

Before each call its description is written to the file, so that a process that dies has named what it died of.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

SANITIZED_EXTENSION = "FUSED_RESNET_FUZZ_EXTENSION"
"""An environment variable: the file that is ``fused_resnet._C`` in this process."""


def run(kind: str, count: int, last: Path) -> None:
    """Raises what the first call that differs, made as small as can be, is told by."""
    calls, number = importlib.import_module(f"tests.fuzz.{kind}").CALLS, 0

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(call=calls)
    def check(call: Any) -> None:
        nonlocal number
        number += 1
        last.write_text(f"call {number} of {kind}: {call}\n")
        try:
            call.check()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{last.read_text()}") from None

    check()
    print(f"{number} calls of {kind}")


def take_extension(path: str) -> None:
    """Has this file imported as ``fused_resnet._C``."""
    spec = importlib.util.spec_from_file_location("fused_resnet._C", path)
    assert spec is not None and spec.loader is not None
    sys.modules["fused_resnet._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fused_resnet._C"])


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")
    if path := os.environ.get(SANITIZED_EXTENSION):
        take_extension(path)
    importlib.import_module("fused_resnet.bench.suite.torchvision_ops").missing_torchvision_ops()
    run(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
