"""The CPU convolutions for every kind of processor that this one can run, and under AddressSanitizer and UBSan.

Built here from csrc/cpu; with a fault planted in the source, to know that the driver and the sanitizer see one.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = ("conv", "gemm", "winograd", "grouped", "grad_weight", "winograd_grad")
CAPABILITIES: dict[str, list[str]] = runpy.run_path(str(ROOT / "setup.py"))["CPU_CAPABILITIES"]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
PLANTED = {
    "a window without its last column": (
        "conv/gather.h",
        "left + window_width <= source_.width",
        "left + window_width <= source_.width + 1",
    ),
    "padding that is skipped too early": ("conv/gather.h", "last_top + begin * ", "top + begin * "),
    "a row of the residual": ("simd/tile.h", "first += Element::load(tile.residual + offset)", "first += Vector{}"),
    "an output's transform": ("conv/winograd.h", "to[1] = m[1] - m[2] - m[3];", "to[1] = m[1] - m[2] + m[3];"),
    "a gradient's transform": ("conv/winograd.h", "to[1] = 0.5f * (m[1] - m[2]);", "to[1] = 0.5f * (m[1] + m[2]);"),
    "a part's rows that run into the next": (
        "conv/grad_weight.h",
        "kDepth * kTileRows + kRowVectors * kVectorLanes",
        "kDepth * kTileRows",
    ),
    "padding that a norm makes something of": (
        "conv/winograd.h",
        "if (!all_inside && (place.inside >> (i * kWindow + j) & 1) == 0) {",
        "if (false) {",
    ),
    "a narrow padded row": ("conv/grouped.cpp", "std::fill_n(to, left, 0.0f);", ""),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.xdist_group("conv_driver"),
]


def runs_here(capability: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needs = {"avx2": ["avx2", "fma"], "avx512": ["avx512bw", "avx512vl"], "avx512_bf16": ["avx512_bf16"]}
    return all(f" {need} " in flags.replace("\n", " ") for need in needs.get(capability, []))


def widest() -> str:
    return [capability for capability in CAPABILITIES if runs_here(capability)][-1]


def build(folder: Path, capability: str, *flags: str, csrc: Path = CSRC) -> Path:
    program = folder / "driver"
    sources = [csrc / "cpu" / "conv" / f"{name}.cpp" for name in SOURCES]
    command = ["g++", "-O1", "-g", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", f"-I{csrc}"]
    command += [f"-DCPU_CAPABILITY={capability}", *CAPABILITIES[capability], *flags]
    others = (csrc / "cpu" / "buffers.cpp", csrc / "cpu" / "conv_training.cpp", ROOT / "tests/native/conv_driver.cpp")
    command += [*map(str, sources), *map(str, others)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "3"}
    return subprocess.run([str(program)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kind_of_processor(capability: str, tmp_path: Path):
    if not runs_here(capability):
        pytest.skip(f"this processor is not {capability}")
    done = run(build(tmp_path, capability))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "capability", sorted({widest(), "avx2", "baseline"} & {c for c in CAPABILITIES if runs_here(c)})
)
def test_address_and_undefined_behaviour_sanitizers(capability: str, tmp_path: Path):
    done = run(build(tmp_path, capability, *SANITIZERS))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path):
    if fault == "a narrow padded row" and widest() == "baseline":
        pytest.skip("no grouped method on this processor")
    name, line, instead = PLANTED[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("cuda"))
    source = (csrc / "cpu" / name).read_text()
    assert source.count(line) >= 1
    (csrc / "cpu" / name).write_text(source.replace(line, instead, 1))
    assert run(build(tmp_path, widest(), csrc=csrc)).returncode != 0
