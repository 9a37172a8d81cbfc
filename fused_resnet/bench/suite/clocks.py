"""Clocks, temperature, power and other people's work beside a measurement: whatever the machine tells."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BUSY = 0.25
"""Cores taken by others, from which on the measurement carries a note."""
STOLEN = 0.05
"""The share of the machine's time that its host gave to others, from which on it carries a note."""
SMI_SECONDS = 10
GPU_FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watt": "power.draw",
    "watt_limit": "power.limit",
    "slowed_down_by": "clocks_throttle_reasons.active",
}
"""Our names of what nvidia-smi is asked for."""
NOT_SLOWED_DOWN = {0, 1}  # of its bits: none, and "idle"
PROC = Path("/proc")
CPU_FREQUENCIES = "/sys/devices/system/cpu"


class Clocks:
    """Read when made, and again by `facts`.

    Args:
        device: what is measured. A GPU's own state is read through nvidia-smi.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._before, self._times = read(self._device), _Times.now()

    def facts(self) -> dict[str, Any]:
        """ "before" and "after", and between the two the cores that other programs kept busy, the share of time that a
        host took from this virtual machine; "notes" are sentences on what should not have been."""
        after, times = read(self._device), _Times.now()
        found: dict[str, Any] = {"before": self._before, "after": after}
        if self._times is not None and times is not None:
            found |= self._times.until(times)
        found["notes"] = notes(found)
        return found


def read(device: torch.device) -> dict[str, Any]:
    """The state of this moment; what cannot be read is left out."""
    found: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        found["load_average"] = os.getloadavg()[0]
    if frequencies := cpu_megahertz():
        found["cpu_mhz"] = statistics.median(frequencies)
    if device.type == "cuda":
        found |= gpu_state(device)
    return found


def notes(found: dict[str, Any]) -> list[str]:
    """What of ``Clocks.facts`` makes the measurement less certain, as sentences."""
    said = []
    cores = os.cpu_count() or 1
    load = found["before"].get("load_average")
    others = found.get("cores_busy_with_others")
    if others is not None and others > BUSY:
        said.append(f"other programs kept {others:.1f} of {cores} cores busy")
    elif others is None and load is not None and load > cores:
        said.append(f"the load average was {load:.1f} on {cores} cores")
    if (stolen := found.get("stolen")) is not None and stolen > STOLEN:
        said.append(f"the host took {stolen:.0%} of this virtual machine's time")
    if slowed := found["after"].get("slowed_down_by"):
        said.append(f"the GPU was slowed down (clocks_throttle_reasons {slowed})")
    return said


def cpu_megahertz() -> list[float]:
    """Of each core, from sysfs or /proc/cpuinfo; empty where neither says."""
    found = []
    for path in Path(CPU_FREQUENCIES).glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        try:
            found.append(int(path.read_text()) / 1e3)
        except (OSError, ValueError):
            continue
    if found:
        return found
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
        return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        return []


def gpu_state(device: torch.device) -> dict[str, Any]:
    """`GPU_FIELDS` of this GPU; empty where there is no nvidia-smi, or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--id={_smi_id(device)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, f"--query-gpu={','.join(GPU_FIELDS.values())}"],
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, Any] = {}
    for name, text in zip(GPU_FIELDS, done.stdout.strip().split(","), strict=False):
        text = text.strip()
        if name == "slowed_down_by":
            try:
                found |= {name: text} if int(text, 16) not in NOT_SLOWED_DOWN else {}
            except ValueError:  # "[N/A]"
                continue
        else:
            try:
                found[name] = float(text)
            except ValueError:
                continue
    return found


def _smi_id(device: torch.device) -> str:
    """nvidia-smi counts all GPUs, PyTorch those that this process may see; the UUID is the same for both."""
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return str(index) if uuid is None else f"GPU-{uuid}"


@dataclass(frozen=True)
class _Times:
    """Seconds of CPU time since the machine started, all cores together; and since this process did."""

    wall: float
    busy: float
    stolen: float
    ours: float

    @classmethod
    def now(cls) -> _Times | None:
        try:
            name, *fields = (PROC / "stat").read_text().splitlines()[0].split()
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return None
        if name != "cpu" or len(fields) < 8:
            return None
        user, nice, system, _, _, irq, softirq, steal = (int(field) / tick for field in fields[:8])
        times = os.times()
        ours = times.user + times.system + times.children_user + times.children_system
        return cls(time.monotonic(), user + nice + system + irq + softirq, steal, ours)

    def until(self, later: _Times) -> dict[str, float]:
        wall = later.wall - self.wall
        if wall <= 0:
            return {}
        others = (later.busy - self.busy) - (later.ours - self.ours)
        return {
            "cores_busy_with_others": max(0.0, others / wall),
            "stolen": (later.stolen - self.stolen) / wall / (os.cpu_count() or 1),
        }
