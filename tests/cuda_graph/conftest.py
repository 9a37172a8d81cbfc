"""CUDA graphs where there is no GPU."""

from __future__ import annotations

import importlib

import pytest

from tests.cuda_graph import steps


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures happen on the CPU, and the optimizers with ``capturable`` believe that it can."""
    module = importlib.import_module("fused_resnet.cuda_graph.graph_step")  # its function has its name
    monkeypatch.setattr(module, "CudaGraph", steps.RecordedCalls)
    monkeypatch.setattr(module, "why_not_capture", lambda device: "")
    for name in ("adam", "rmsprop", "nadam", "rprop"):
        optimizers = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(optimizers, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])
    monkeypatch.setattr(steps, "CAPTURABLE", True)


@pytest.fixture(params=[False, True], ids=["uncaptured", "replayed"])
def either_way(request: pytest.FixtureRequest) -> None:
    if request.param:
        request.getfixturevalue("recorded")
