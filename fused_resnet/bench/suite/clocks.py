"""Clocks, temperature, power and other people's work beside a measurement: whatever the machine tells.

CPU times come from psutil, a GPU's state from nvidia-ml-py; without these packages the facts are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import time
from typing import Any, NamedTuple

import torch

BUSY = 0.25
"""Cores taken by others, from which on the measurement carries a note."""
STOLEN = 0.05
"""The share of the machine's time that its host gave to others, from which on it carries a note."""
NOT_SLOWED_DOWN = {0, 1}  # of NVML's bits: none, and "idle"


class Clocks:
    """Read when made, and again by `facts`.

    Args:
        device: what is measured.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._before, self._times = read(self._device), _times()

    def facts(self) -> dict[str, Any]:
        """ "before" and "after", and between the two the cores that other programs kept busy, the share of time that a
        host took from this virtual machine; "notes" are sentences on what should not have been."""
        after, now, then = read(self._device), _times(), self._times
        found: dict[str, Any] = {"before": self._before, "after": after}
        if now is not None and then is not None and now.wall > then.wall:
            wall, others = now.wall - then.wall, (now.busy - then.busy) - (now.ours - then.ours)
            found["cores_busy_with_others"] = max(0.0, others / wall)
            found["stolen"] = (now.stolen - then.stolen) / wall / (os.cpu_count() or 1)
        return found | {"notes": notes(found)}


def read(device: torch.device) -> dict[str, Any]:
    """The state of this moment; what cannot be read is left out."""
    found: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        found["load_average"] = os.getloadavg()[0]
    with contextlib.suppress(Exception):  # psutil is not installed, or the system tells nothing
        frequencies = [core.current for core in importlib.import_module("psutil").cpu_freq(percpu=True)]
        found["cpu_mhz"] = statistics.median(frequencies)
    return found | (gpu_state(device) if device.type == "cuda" else {})


def notes(found: dict[str, Any]) -> list[str]:
    """What of ``Clocks.facts`` makes the measurement less certain, as sentences."""
    said = []
    cores, load = os.cpu_count() or 1, found["before"].get("load_average")
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


def gpu_state(device: torch.device) -> dict[str, Any]:
    """Clocks, temperature, power and what slows this GPU down; empty where NVML does not answer."""
    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # nvidia-ml-py is not installed, or its driver does not know the device
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        # NVML counts all GPUs, PyTorch those that this process may see; the UUID is the same for both.
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        questions = {
            "sm_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            "memory_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
            "celsius": lambda: float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            "watt": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "watt_limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
            "slowed_down_by": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
        }
        for name, ask in questions.items():
            with contextlib.suppress(Exception):  # not supported by this one
                found[name] = ask()
        slowed_down_by = found.pop("slowed_down_by", 0)
        found |= {} if slowed_down_by in NOT_SLOWED_DOWN else {"slowed_down_by": f"{slowed_down_by:#018x}"}
    return found


class _Times(NamedTuple):
    """Seconds of CPU time since the machine started, all cores together; and since this process did."""

    wall: float
    busy: float
    stolen: float
    ours: float


def _times() -> _Times | None:
    try:
        psutil = importlib.import_module("psutil")
        machine, process = psutil.cpu_times(), psutil.Process().cpu_times()
    except Exception:  # not installed, or the system tells nothing
        return None
    busy, ours = ("user", "nice", "system", "irq", "softirq"), ("user", "system", "children_user", "children_system")
    summed = (sum(getattr(of, name, 0.0) for name in names) for of, names in ((machine, busy), (process, ours)))
    of_machine, of_process = summed
    return _Times(time.monotonic(), of_machine, getattr(machine, "steal", 0.0), of_process)
