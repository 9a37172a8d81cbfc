"""What a launcher launches, compiled for GPUs that are not here, and read: registers, spills, instructions.

The launchers run as they are, on empty CPU tensors of real shapes that nobody reads or writes. Only the last step is
replaced: Triton's ``run`` compiles for the named chip and does not launch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fused_resnet.kernels import bn_act, bn_act_grad, conv
from fused_resnet.kernels.device import CHIPS as KINDS
from tests import build_cache

# compute capability: (multiprocessors, bytes of shared memory that one program may have)
CHIPS = {80: (108, 163 * 1024), 89: (142, 99 * 1024), 90: (132, 227 * 1024)}


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would have been launched."""

    name: str
    ptx: str
    registers: int
    stack: int
    local: int
    shared: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


@pytest.fixture(params=(80, 90), ids=lambda chip: f"sm_{chip}")
def chip(request: pytest.FixtureRequest) -> int:
    """The two generations of matrix instructions. sm_89 has sm_80's, and less shared memory: WITH_LITTLE_SHARED_MEMORY
    asks for it where that makes a difference."""
    return request.param


WITH_LITTLE_SHARED_MEMORY = pytest.mark.parametrize("chip", [89], indirect=True, ids=["sm_89"])


@pytest.fixture
def compile_launches(chip: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Compiled]]:
    """A function that calls a launcher and returns what it would have launched on ``chip``."""
    launched: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(run(self, *args, grid=grid, warmup=True, **options))

    not_here = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", chip, 32),
        get_current_device=lambda: 1000 + chip,  # Triton's cache of compiled kernels is by this number
        get_current_stream=lambda device: 0,
    )
    # Triton keeps what it compiled under a hash of the kernel's source, its constants, the chip and its own version.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(build_cache.FOLDER / "triton"))
    monkeypatch.setattr("triton.runtime.jit.driver", SimpleNamespace(active=not_here))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in (bn_act, bn_act_grad, conv):
        monkeypatch.setattr(module, "multiprocessors", lambda device: CHIPS[chip][0])
    for name in ("conv_stats", "conv_grad_input", "conv_grad_weight"):
        module = sys.modules[f"fused_resnet.kernels.{name}"]
        monkeypatch.setattr(module, "chip_of", lambda device: KINDS[divmod(chip, 10)])

    def call(launcher: Callable[..., Any], *args: Any) -> list[Compiled]:
        launched.clear()
        launcher(*args)
        return [read(kernel, tmp_path / "kernel.cubin") for kernel in launched]

    return call


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Addresses without memory behind them, until somebody writes there."""
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def check_resources(kernel: Compiled, registers: int) -> None:
    assert kernel.stack == 0 and kernel.local == 0, f"{kernel.name} spills: {kernel.stack} bytes of stack"
    assert kernel.registers <= registers, f"{kernel.name} takes {kernel.registers} registers"


def read(kernel: Any, cubin: Path) -> Compiled:
    """Reads the machine code with the cuobjdump inside the triton package."""
    cubin.write_bytes(kernel.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    name, shared = kernel.metadata.name, kernel.metadata.shared
    return Compiled(name, kernel.asm["ptx"], found["REG"], found["STACK"], found["LOCAL"], shared)
