"""What is read beside a measurement, from a psutil and an NVML of the test's own."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_resnet.bench.suite import clocks
from fused_resnet.bench.suite.clocks import Clocks, gpu_state, notes

GPU = torch.device("cuda", 0)


@pytest.fixture
def installed(monkeypatch) -> dict[str, Any]:
    """The modules that can be imported; none before a test puts them here."""
    modules: dict[str, Any] = {}
    monkeypatch.setattr(clocks.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(clocks.os, "cpu_count", lambda: 4)
    return modules


def facts_after(modules: dict[str, Any], monkeypatch, wall: float, ours: float, **seconds: float) -> dict[str, Any]:
    """What `Clocks` says after ``wall`` seconds, of which this process computed for ``ours``."""
    moments = iter([(0.0, {}, 0.0), (wall, seconds, ours)])
    now: list[Any] = []

    def monotonic() -> float:
        return now[-1][0]

    def cpu_times() -> Any:
        now.append(next(moments))
        return SimpleNamespace(**({"user": 0.0, "steal": 0.0} | now[-1][1]))

    process = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=now[-1][2], system=0.0))
    monkeypatch.setattr(clocks.time, "monotonic", monotonic)
    modules["psutil"] = SimpleNamespace(cpu_times=cpu_times, Process=lambda: process)
    return Clocks("cpu").facts()


def test_other_peoples_work_is_told_from_our_own(installed, monkeypatch):
    quiet = facts_after(installed, monkeypatch, 10.0, ours=20.0, user=20.5)
    assert quiet["cores_busy_with_others"] == pytest.approx(0.05)
    assert quiet["notes"] == []
    busy = facts_after(installed, monkeypatch, 10.0, ours=20.0, user=25.0, system=6.0, softirq=4.0, idle=5.0)
    assert busy["cores_busy_with_others"] == pytest.approx(1.5)
    assert busy["notes"] == ["other programs kept 1.5 of 4 cores busy"]


def test_what_the_host_took_is_told(installed, monkeypatch):
    found = facts_after(installed, monkeypatch, 10.0, ours=20.0, user=20.0, steal=8.0)
    assert found["stolen"] == pytest.approx(0.2)
    assert found["notes"] == ["the host took 20% of this virtual machine's time"]


def test_without_psutil_only_the_load_is_known(installed, monkeypatch):
    monkeypatch.setattr(clocks.os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    found = Clocks("cpu").facts()
    assert found["before"] == {"load_average": 9.0} and "cores_busy_with_others" not in found
    assert found["notes"] == ["the load average was 9.0 on 4 cores"]


def nvml(slowed_down_by: int, **unsupported: Any) -> Any:
    """NVML's functions by their names, of one GPU that is asked for by its UUID."""

    def handle(uuid: str) -> str:
        assert uuid == "GPU-1234-abcd"
        return "gpu"

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetClockInfo=lambda gpu, clock: {"sm": 1980, "memory": 2619}[clock],
        nvmlDeviceGetTemperature=lambda gpu, sensor: 41,
        nvmlDeviceGetPowerUsage=unsupported.get("power", lambda gpu: 212_550),
        nvmlDeviceGetEnforcedPowerLimit=lambda gpu: 700_000,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: slowed_down_by,
        NVML_CLOCK_SM="sm",
        NVML_CLOCK_MEM="memory",
        NVML_TEMPERATURE_GPU="gpu",
    )


def test_the_state_of_a_gpu_and_what_slows_it_down(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1234-abcd"))
    assert gpu_state(GPU) == {}
    installed["pynvml"] = nvml(slowed_down_by=1)
    expected = {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 41.0, "watt": 212.55, "watt_limit": 700.0}
    assert gpu_state(GPU) == expected
    installed["pynvml"] = nvml(slowed_down_by=0x20, power=lambda gpu: 1 / 0)
    state = gpu_state(GPU)
    assert "watt" not in state and state["slowed_down_by"] == "0x0000000000000020"
    assert notes({"before": {}, "after": state}) == [
        "the GPU was slowed down (clocks_throttle_reasons 0x0000000000000020)"
    ]


def test_the_facts_of_this_machine_are_json():
    pytest.importorskip("psutil")
    found = Clocks("cpu").facts()
    assert json.loads(json.dumps(found)) == found
    assert {"before", "after", "notes", "cores_busy_with_others", "stolen"} <= set(found)


@pytest.mark.gpu
def test_the_state_of_this_gpu():
    found = Clocks("cuda").facts()
    if not found["after"].get("sm_mhz"):
        pytest.skip("nvidia-ml-py is not installed, or NVML does not say")
    assert 100 < found["after"]["sm_mhz"] < 5000
