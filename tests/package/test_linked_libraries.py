"""What the extension needs of the system: little, and of OpenMP the one runtime that torch has loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fused_resnet

SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}
SYSTEM |= {"libstdc++.so.6", "libgcc_s.so.1"}
OPENMP = "libgomp.so.1"
MAPPED = """
import fused_resnet, fused_resnet._C
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}), sep="\\n")
"""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc"),
    pytest.mark.skipif(not list(Path(fused_resnet.__file__).parent.glob("_C*.so")), reason="_C is not built"),
]


def test_the_extension_needs_the_system_and_openmp_only():
    """What a manylinux wheel may need; CUDA's runtime is linked into it, and its driver is loaded when it is used."""
    dynamic = pytest.importorskip("elftools.elf.elffile")
    (extension,) = Path(fused_resnet.__file__).parent.glob("_C*.so")
    with extension.open("rb") as stream:
        section = dynamic.ELFFile(stream).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in section.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
    assert needed <= SYSTEM | {OPENMP}


def test_one_openmp_runtime_is_in_the_process():
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True)
    (path,) = done.stdout.split()
    assert Path(path).name.startswith("libgomp")
