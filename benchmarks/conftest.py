"""What every pytest-benchmark suite here stands on: machine facts in its JSON, and ``--quick``."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.by_pytest import DEVICE
from fused_resnet.bench.machine import machine_facts
from fused_resnet.bench.suite.torchvision_ops import import_or_none

import_or_none("torchvision.models")  # importable from here on, also where its own library does not fit this torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a selection of every suite, in about five minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    kept = [item for item in items if item.callspec.params.get("is_quick")]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["facts"] = machine_facts(DEVICE)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """How many were wrong, where whoever opens the file sees it first."""
    wrong = [b["fullname"] for b in output_json["benchmarks"] if b["extra_info"].get("accuracy", "right") != "right"]
    output_json["wrong"] = wrong
