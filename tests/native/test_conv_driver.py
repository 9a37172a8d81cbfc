"""The CPU convolutions for every kind of processor that this one can run, with AddressSanitizer and UBSan.

Built here from csrc/cpu; with faults planted in a copy of the source, to know that the driver sees one.
"""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path

import pytest

from tests import cpp
from tests.cpp import CSRC, ROOT, Source
from tests.planted import Fault, copy_with_faults, numbered

SOURCES = ("conv", "gemm", "winograd", "grouped", "grad_weight", "winograd_grad")
CAPABILITIES: dict[str, list[str]] = runpy.run_path(str(ROOT / "setup.py"))["CPU_CAPABILITIES"]
FAULTS = [
    Fault(
        "conv/gather.h",
        "a window without its last column",
        "left + window_width <= «source_.width»",
        "source_.width + 1",
    ),
    Fault("conv/gather.h", "padding that is skipped too early", "«last_top» + begin * ", "top"),
    Fault("simd/tile.h", "a row of the residual", "first += «Element::load(tile.residual + offset)»", "Vector{}"),
    Fault("conv/winograd.h", "an output's transform", "to[1] = «m[1] - m[2] - m[3]»;", "m[1] - m[2] + m[3]"),
    Fault("conv/winograd.h", "a gradient's transform", "to[1] = «0.5f * (m[1] - m[2])»;", "0.5f * (m[1] + m[2])"),
    Fault(
        "conv/grad_weight.h",
        "a part's rows that run into the next",
        "kRowsWords = «kDepth * kTileRows + kRowVectors * kVectorLanes»;",
        "kDepth * kTileRows",
    ),
    Fault(
        "conv/winograd.h",
        "padding that a norm makes something of",
        "if («!all_inside && (place.inside >> (i * kWindow + j) & 1) == 0») {",
        "false",
    ),
    Fault("conv/grouped.cpp", "a narrow padded row", "«std::fill_n(to, left, 0.0f);»"),
]
NUMBERS = numbered(FAULTS)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler"),
]


def runs_here(capability: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needs = {"avx2": ["avx2", "fma"], "avx512": ["avx512bw", "avx512vl"], "avx512_bf16": ["avx512_bf16"]}
    return all(f" {need} " in flags.replace("\n", " ") for need in needs.get(capability, []))


WIDEST = [capability for capability in CAPABILITIES if runs_here(capability)][-1]
# avx512 is avx512_bf16 without one kind of element.
SANITIZED = {"baseline", "avx2", WIDEST}


@cache
def driver(capability: str, sanitizer: str | None, cpu: Path = CSRC / "cpu") -> Path:
    """conv_driver with the convolutions of ``cpu``, csrc/cpu or a copy of it."""
    options = ("-O1", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", f"-DCPU_CAPABILITY={capability}")
    options += (*CAPABILITIES[capability], *cpp.sanitizer_options(sanitizer))
    files = [*(cpu / "conv" / f"{name}.cpp" for name in SOURCES), cpu / "buffers.cpp", cpu / "conv_training.cpp"]
    files.append(Path(__file__).with_name("conv_driver.cpp"))
    sources = [Source(file, options, (cpu.parent, CSRC)) for file in files]
    return cpp.build(sources, output="conv_driver", options=["-fopenmp", *cpp.sanitizer_options(sanitizer)])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kind_of_processor(capability: str) -> None:
    if not runs_here(capability):
        pytest.skip(f"this processor is not {capability}")
    program = driver(capability, cpp.SANITIZERS[0] if capability in SANITIZED else None)
    done = cpp.run(program, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="3")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("fault", FAULTS, ids=NUMBERS)
def test_a_planted_fault_is_found(fault: Fault) -> None:
    if fault.name == "a narrow padded row" and WIDEST == "baseline":
        pytest.skip("no grouped method on this processor")
    fault.assert_plantable(CSRC / "cpu")
    assert planted(NUMBERS[fault.name]) > 0


def test_right_without_a_fault() -> None:
    assert planted(0) == 0


def planted(number: int) -> int:
    """How many cases are wrong; 1 or more where the program dies."""
    program = driver(WIDEST, None, copy_with_faults(CSRC / "cpu", FAULTS))
    return abs(cpp.run(program, OMP_NUM_THREADS="3", PLANTED_FAULT=str(number)).returncode)
