"""What is read beside a measurement, from a /proc and an nvidia-smi of the test's own."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_resnet.bench.suite import clocks
from fused_resnet.bench.suite.clocks import Clocks, cpu_megahertz, gpu_state, notes, read

GPU = torch.device("cuda", 0)


def write_stat(folder: Path, seconds: dict[str, float]) -> None:
    """/proc/stat with so many seconds of each kind of all cores together."""
    tick = os.sysconf("SC_CLK_TCK")
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
    fields = " ".join(str(int(seconds.get(name, 0) * tick)) for name in names)
    (folder / "stat").write_text(f"cpu  {fields}\ncpu0 {fields}\n")


@pytest.fixture
def proc(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(clocks, "PROC", tmp_path)
    monkeypatch.setattr(clocks, "CPU_FREQUENCIES", str(tmp_path / "none"))
    monkeypatch.setattr(clocks.os, "cpu_count", lambda: 4)
    write_stat(tmp_path, {})
    return tmp_path


def facts_after(proc: Path, monkeypatch, wall: float, ours: float, **seconds: float) -> dict[str, Any]:
    """What `Clocks` says after ``wall`` seconds, of which this process computed for ``ours``."""
    times = iter([(0.0, 0.0), (wall, ours)])
    now: list[tuple[float, float]] = []

    def monotonic() -> float:
        now.append(next(times))
        return now[-1][0]

    def process_times() -> Any:
        spent = ours if len(now) else 0.0
        return SimpleNamespace(user=spent, system=0.0, children_user=0.0, children_system=0.0)

    monkeypatch.setattr(clocks.time, "monotonic", monotonic)
    monkeypatch.setattr(clocks.os, "times", process_times)
    measured = Clocks("cpu")
    write_stat(proc, seconds)
    return measured.facts()


def test_other_peoples_work_is_told_from_our_own(proc, monkeypatch):
    quiet = facts_after(proc, monkeypatch, 10.0, ours=20.0, user=20.5)
    assert quiet["cores_busy_with_others"] == pytest.approx(0.05)
    assert quiet["notes"] == []
    write_stat(proc, {})
    busy = facts_after(proc, monkeypatch, 10.0, ours=20.0, user=25.0, system=6.0, softirq=4.0)
    assert busy["cores_busy_with_others"] == pytest.approx(1.5)
    assert busy["notes"] == ["other programs kept 1.5 of 4 cores busy"]


def test_what_the_host_took_is_told(proc, monkeypatch):
    found = facts_after(proc, monkeypatch, 10.0, ours=20.0, user=20.0, steal=8.0)
    assert found["stolen"] == pytest.approx(0.2)
    assert found["notes"] == ["the host took 20% of this virtual machine's time"]


@pytest.mark.parametrize("text", ["", "cpu  1 2\n", "intr 5\n"])
def test_a_system_that_tells_nothing(proc, monkeypatch, text):
    (proc / "stat").write_text(text)
    found = Clocks("cpu").facts()
    assert "cores_busy_with_others" not in found
    monkeypatch.setattr(clocks.os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert Clocks("cpu").facts()["notes"] == ["the load average was 9.0 on 4 cores"]


def test_frequencies_are_those_of_sysfs_else_of_cpuinfo(proc, tmp_path, monkeypatch):
    assert cpu_megahertz() == []
    (proc / "cpuinfo").write_text("processor\t: 0\ncpu MHz\t\t: 2596.1\nmodel name : x\ncpu MHz\t\t: 2400.0\n")
    assert cpu_megahertz() == [2596.1, 2400.0]
    folder = tmp_path / "system"
    for core, kilohertz in enumerate((3_000_000, 3_100_000)):
        path = folder / f"cpu{core}" / "cpufreq" / "scaling_cur_freq"
        path.parent.mkdir(parents=True)
        path.write_text(f"{kilohertz}\n")
    monkeypatch.setattr(clocks, "CPU_FREQUENCIES", str(folder))
    assert sorted(cpu_megahertz()) == [3000.0, 3100.0]
    assert read(torch.device("cpu"))["cpu_mhz"] == 3050.0


def install_smi(folder: Path, monkeypatch, body: str) -> None:
    """An nvidia-smi, first on the path, that keeps what it was asked."""
    path = folder / "nvidia-smi"
    path.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1234-abcd"))


def test_a_gpu_is_asked_for_by_its_uuid(tmp_path, monkeypatch):
    install_smi(tmp_path, monkeypatch, 'echo "1980, 2619, 41, 212.55, 700.00, 0x0000000000000001"')
    assert gpu_state(GPU) == {
        "sm_mhz": 1980.0,
        "memory_mhz": 2619.0,
        "celsius": 41.0,
        "watt": 212.55,
        "watt_limit": 700.0,
    }
    asked = (tmp_path / "asked").read_text()
    assert "--id=GPU-1234-abcd" in asked and "clocks.sm" in asked and "nounits" in asked


def test_a_gpu_that_is_slowed_down_is_noted(tmp_path, monkeypatch):
    install_smi(tmp_path, monkeypatch, 'echo "1200, 2619, 88, [N/A], 700.00, 0x0000000000000020"')
    state = gpu_state(GPU)
    assert "watt" not in state
    assert state["slowed_down_by"] == "0x0000000000000020"
    assert notes({"before": {}, "after": state}) == [
        "the GPU was slowed down (clocks_throttle_reasons 0x0000000000000020)"
    ]


@pytest.mark.parametrize("body", ["exit 9", "echo nothing of use", ":"])
def test_an_nvidia_smi_that_does_not_answer(tmp_path, monkeypatch, body):
    install_smi(tmp_path, monkeypatch, body)
    assert gpu_state(GPU) == {}


def test_no_nvidia_smi(monkeypatch):
    monkeypatch.setattr(clocks.shutil, "which", lambda name: None)
    assert gpu_state(GPU) == {}


def test_the_facts_of_this_machine_are_json():
    found = Clocks("cpu").facts()
    assert json.loads(json.dumps(found)) == found
    assert {"before", "after", "notes"} <= set(found)


@pytest.mark.gpu
def test_the_state_of_this_gpu():
    found = Clocks("cuda").facts()
    if not found["after"].get("sm_mhz"):
        pytest.skip("there is no nvidia-smi, or it does not say")
    assert 100 < found["after"]["sm_mhz"] < 5000
