"""setup.py: what FUSED_RESNET_BUILD chooses, the errors, and CUDA sources compiled and linked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BUILD = [sys.executable, "setup.py", "build_ext", "--inplace"]

CUDA_SOURCE = """
#include <cuda_runtime_api.h>

__global__ void twice(float* x, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) x[i] *= 2.0f;
}

// Visible, unlike the functions of the package, so that ctypes can call it.
extern "C" __attribute__((visibility("default"))) int probe_launch(float* x, int size, cudaStream_t stream) {
  twice<<<(size + 255) / 256, 256, 0, stream>>>(x, size);
  return cudaGetLastError();
}
"""
PROBE = """
import ctypes, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
status = ctypes.CDLL(sys.argv[1]).probe_launch(None, ctypes.c_int(0), None)
print(json.dumps({"targets": extension.cuda_targets, "status": status}))
"""
SMALL_MODULE = """
#include <pybind11/pybind11.h>
#ifndef FUSED_RESNET_CUDA_TARGETS
#define FUSED_RESNET_CUDA_TARGETS ""
#endif
PYBIND11_MODULE(_C, m) { m.attr("cuda_targets") = FUSED_RESNET_CUDA_TARGETS; }
"""


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("gpu", "FUSED_RESNET_BUILD must be one of auto, auto-cpu, cuda, cpu, none; got 'gpu'"),
        ("cpu", "FUSED_RESNET_BUILD=cpu cannot be done, missing: a C++ compiler"),
        ("cuda", "FUSED_RESNET_BUILD=cuda cannot be done, missing: a C++ compiler"),
    ],
)
def test_a_choice_that_cannot_be_met_is_an_error(choice, message, sources, run, tmp_path):
    shutil.copy(sources / "setup.py", tmp_path)
    done = run([sys.executable, "setup.py", "build_ext"], tmp_path, FUSED_RESNET_BUILD=choice, CXX="/nonexistent/c++")
    assert done.returncode != 0
    assert message in done.stderr


def test_the_automatic_choice_says_what_is_missing(sources, run, tmp_path):
    shutil.copy(sources / "setup.py", tmp_path)
    done = run([sys.executable, "setup.py", "--version"], tmp_path, FUSED_RESNET_BUILD="auto", CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "nothing is compiled (missing: a C++ compiler (no '/nonexistent/c++'; CXX names another))" in done.stderr


def test_an_nvcc_that_does_not_work_is_no_nvcc(sources, run, tmp_path):
    """One that is older than a target, or that refuses the C++ compiler: its own words are told."""
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "nvcc"
    broken.write_text("#!/bin/sh\necho \"nvcc fatal : Unsupported gpu architecture 'compute_90a'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    command = [sys.executable, "setup.py", "--version"]
    done = run(command, sources, FUSED_RESNET_BUILD="auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "without CUDA kernels, missing: an nvcc that compiles for sm_80" in done.stderr
    assert "Unsupported gpu architecture 'compute_90a'" in done.stderr
    done = run(command, sources, FUSED_RESNET_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "FUSED_RESNET_BUILD=cuda cannot be done, missing: an nvcc" in done.stderr


def test_code_that_does_not_compile_is_an_error_with_a_way_out(copy_sources, run):
    sources = copy_sources()
    (sources / "csrc" / "bindings" / "module.cpp").write_text("#error broken on purpose\n")
    done = run(BUILD, sources, MAX_JOBS="1")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr
    assert "FUSED_RESNET_BUILD=none installs the package without it" in done.stderr


def test_a_second_build_compiles_only_what_changed(copy_sources, run):
    sources = copy_sources()
    shutil.rmtree(sources / "csrc")
    (sources / "csrc" / "bindings").mkdir(parents=True)
    (sources / "csrc" / "cpu" / "conv").mkdir(parents=True)
    (sources / "csrc" / "bindings" / "module.cpp").write_text(SMALL_MODULE)
    (sources / "csrc" / "cpu" / "conv" / "empty.cpp").write_text('#include "empty.h"\n')
    (sources / "csrc" / "cpu" / "conv" / "empty.h").touch()
    assert "compile bindings/module.o" in compiled(run(BUILD, sources))
    assert compiled(run(BUILD, sources)) == []
    (sources / "csrc" / "cpu" / "conv" / "empty.h").touch()
    again = compiled(run(BUILD, sources))
    assert "compile cpu/conv/empty.baseline.o" in again
    assert "compile bindings/module.o" not in again


def compiled(build: subprocess.CompletedProcess[str]) -> list[str]:
    assert build.returncode == 0, build.stdout + build.stderr
    return [line.partition("] ")[2] for line in build.stdout.splitlines() if "] compile" in line]


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_cuda_sources_are_compiled_for_every_target_and_linked(copy_sources, run):
    """One small kernel in place of ours, which the build of the package itself compiles (tests/cuda/test_compiled)."""
    sources = copy_sources()
    shutil.rmtree(sources / "csrc")
    (sources / "csrc" / "bindings").mkdir(parents=True)
    (sources / "csrc" / "cuda").mkdir(parents=True)
    (sources / "csrc" / "cuda" / "probe.cu").write_text(CUDA_SOURCE)
    (sources / "csrc" / "bindings" / "module.cpp").write_text(SMALL_MODULE)
    built = run(BUILD, sources, FUSED_RESNET_BUILD="cuda")
    assert built.returncode == 0, built.stdout + built.stderr
    (extension,) = (sources / "fused_resnet").glob("_C*.so")
    assert targets_in(extension) == {"sm_80", "sm_86", "sm_89", "sm_90a", "compute_90"}
    done = run([sys.executable, "-c", PROBE, extension], sources)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["targets"] == "sm_80 sm_86 sm_89 sm_90a compute_90"
    # The runtime that was linked in answers: cudaErrorInvalidConfiguration of an empty grid, or, where there is no
    # device, cudaErrorNoDevice or cudaErrorInsufficientDriver.
    assert found["status"] in ([9] if torch.cuda.is_available() else [100, 35])


def targets_in(extension: Path) -> set[str]:
    """The machine code and PTX in a file, as the cuobjdump of the toolkit or of the triton package lists them."""
    import triton.backends.nvidia

    bundled = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    cuobjdump = str(bundled) if bundled.exists() else "cuobjdump"
    listed = subprocess.run(
        [cuobjdump, "--list-elf", "--list-ptx", str(extension)], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split(":")[-1].strip().split(".") for line in listed.splitlines() if " file " in line]
    return {
        next(part for part in name if part.startswith("sm_")).replace("sm_", "compute_" if "ptx" in name else "sm_")
        for name in names
    }
