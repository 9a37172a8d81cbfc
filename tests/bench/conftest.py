"""The machine of `planted`."""

from __future__ import annotations

import gc

import pytest

from fused_resnet.bench.roofline import Ceilings
from fused_resnet.bench.suite import runner
from tests.bench.planted import Machine


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """With a roofline at once, and without a search for garbage through all of what the tests have made."""
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)
    monkeypatch.setattr(runner, "measure_ceilings", lambda device, dtype, rounds: Ceilings(100.0, 1000.0))
    return Machine()
