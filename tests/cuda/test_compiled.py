"""The kernels as nvcc compiled them into fused_resnet._C: registers, spills, and the instructions that matter.

Registers are compared with registers.json, of one release of the compiler. After a change that is meant:
``python -m tests.cuda.test_compiled --write``.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("registers.json")
CONVOLUTIONS = Path(__file__).parents[2] / "csrc" / "cuda" / "conv.cu"
CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90a")
READ = "sm_80"  # whose instructions are counted; the other chips' differ in names and order
REWRITE = "If that is meant: python -m tests.cuda.test_compiled --write"

REGISTERS_OF_A_CHIP = 65536
# Threads that share a multiprocessor's registers; a convolution's block and the stem's are further down.
THREADS = {
    "avgpool_kernel": 1024,
    "bn_apply_kernel": 1024,
    "bn_finalize_kernel": 1024,
    "bn_finalize_sums_kernel": 1024,
    "bn_grad_apply_kernel": 1024,
    "bn_grad_stats_kernel": 1024,
    "bn_stats_apply_kernel": 512,
    "bn_stats_kernel": 1024,
    "conv_finish_kernel": 1024,
    "stem_kernel": 512,
}
HALVES = ("Half", "BFloat16")
# Type and elements for each thread, of 16 bytes or of 8, and one by one.
OF_16_BYTES = ("Half, 8", "BFloat16, 8", "float, 4")
OF_4 = ("Half, 4", "BFloat16, 4", "float, 4")
OF_1 = ("Half, 1", "BFloat16, 1", "float, 1")


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    local: int


def conv_tiles() -> list[str]:
    """Such as ConvTile<128, 64, 2, 2, 3>, those that conv.cu has."""
    return re.findall(r"using \w+ = (ConvTile<[^>]*>);", CONVOLUTIONS.read_text())


def expected_kernels() -> set[str]:
    names = {"bn_finalize_sums_kernel", *(f"bn_finalize_kernel<{type_}>" for type_ in (*HALVES, "float"))}
    names |= {f"avgpool_kernel<{vector}>" for vector in (*OF_16_BYTES, *OF_1)}
    names |= {f"bn_stats_kernel<{vector}>" for vector in (*OF_16_BYTES, *OF_1)}
    names |= {f"bn_stats_apply_kernel<{vector}>" for vector in (*OF_16_BYTES, *OF_1)}
    for vector in (*OF_4, *OF_1):
        names |= {f"bn_apply_kernel<{vector}, (Residual){kind}>" for kind in range(3)}
        names |= {f"bn_grad_stats_kernel<{vector}, (Mask){kind}>" for kind in range(4)}
        names |= {f"bn_grad_apply_kernel<{vector}, (Mask){kind}>" for kind in (0, 1, 3)}
    names |= {f"conv_bn_act_kernel<{half}, {tile}>" for half, tile in product(HALVES, conv_tiles())}
    for half in HALVES:
        names |= {f"conv_finish_kernel<{half}>", f"stem_kernel<{half}, {half}>", f"stem_kernel<{half}, unsigned char>"}
    return names


def most_registers(kernel: str) -> int:
    """That a thread may have, so that as many blocks as are meant to share a multiprocessor."""
    tile = re.search(r"ConvTile<([^>]*)>", kernel)
    if tile is None:
        return min(255, REGISTERS_OF_A_CHIP // THREADS[kernel.partition("<")[0]])
    _, _, warps_down, warps_across, _ = (int(number) for number in tile[1].split(","))
    return min(255, REGISTERS_OF_A_CHIP // (32 * warps_down * warps_across))


def readable(mangled: str) -> str:
    """bn_stats_kernel<Half, 8> of the name in the library; the name itself if it is none of C++."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    address = demangle(mangled.encode(), None, None, ctypes.byref(ctypes.c_int()))
    if not address:
        return mangled
    name = ctypes.string_at(address).decode().replace("fused_resnet::", "").replace("> >", ">>")
    found = re.match(r"(?:void )?(\w+(?:<.*?>)?)\(", name)
    return found[1] if found else name


def cuobjdump(*options: str) -> str:
    """What it says of fused_resnet._C. It comes with triton; the CUDA toolkit's own is as good."""
    import triton

    import fused_resnet._C as extension

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([path, *options, extension.__file__], capture_output=True, text=True, check=True).stdout


def compiler_release() -> str | None:
    """Of the ptxas that wrote the machine code: 13.0, V13.0.88. It signs what it makes, from CUDA 12.9 or so on."""
    found = set(re.findall(r"Tool Version: Cuda compilation tools, release (\S+, \S+)", cuobjdump("-elf")))
    return found.pop() if len(found) == 1 else None


@cache
def resources() -> dict[str, dict[str, Resources]]:
    """Of every kernel on every chip."""
    found: dict[str, dict[str, Resources]] = {}
    chip = kernel = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if line.startswith("arch = "):
            chip = line.split()[-1]
        elif named := re.match(r"\s*Function (\w+):", line):
            kernel = readable(named[1])
        elif "REG:" in line:
            usage = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", line)}
            found.setdefault(kernel, {})[chip] = Resources(usage["REG"], usage["STACK"], usage["LOCAL"])
    return found


@cache
def instructions(chip: str) -> dict[str, list[str]]:
    """Of every kernel, in their order, such as LDG.E.128.CONSTANT."""
    parts = re.split(r"Function : (\w+)", cuobjdump("-sass", "-arch", chip))
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    return {readable(name): line.findall(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def table() -> dict[str, dict[str, int]]:
    return {
        kernel: {chip: used.registers for chip, used in sorted(chips.items())}
        for kernel, chips in sorted(resources().items())
    }


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    extension = pytest.importorskip("fused_resnet._C", reason="fused_resnet._C is not built")
    if not hasattr(extension, "cuda"):
        pytest.skip("fused_resnet._C was built without CUDA")
    pytest.importorskip("triton", reason="cuobjdump comes with triton")
    missing = set(CHIPS) - set(extension.build_info()["cuda_targets"].split())
    if missing:
        pytest.skip(f"fused_resnet._C was built without {', '.join(sorted(missing))}")


def test_every_kernel_is_there_for_every_chip() -> None:
    assert len(conv_tiles()) >= 3
    assert set(resources()) == expected_kernels()
    lacking = {kernel: sorted(set(CHIPS) - set(chips)) for kernel, chips in resources().items()}
    assert not {kernel: chips for kernel, chips in lacking.items() if chips}


def test_nothing_is_spilled() -> None:
    spilled = {
        (kernel, chip): used
        for kernel, chips in resources().items()
        for chip, used in chips.items()
        if used.stack or used.local
    }
    assert not spilled
    local = {
        kernel: sorted({name for name in names if re.match(r"(LDL|STL)\b", name)})
        for kernel, names in instructions(READ).items()
    }
    assert not {kernel: names for kernel, names in local.items() if names}


def test_registers_leave_room_for_the_blocks() -> None:
    for kernel, chips in resources().items():
        for chip, used in chips.items():
            assert used.registers <= most_registers(kernel), f"{kernel} takes {used.registers} on {chip}"


def test_registers_are_those_of_the_table() -> None:
    written = json.loads(TABLE.read_text())
    if compiler_release() != written["release"]:
        pytest.skip(f"compiled by release {compiler_release()}, but the table is of {written['release']}")
    before, now = written["registers"], table()
    changes = [
        f"{kernel} on {chip}: {old} in the table, now {new}"
        for kernel in sorted({*before, *now})
        for chip in CHIPS
        if (old := before.get(kernel, {}).get(chip)) != (new := now.get(kernel, {}).get(chip))
    ]
    assert not changes, "\n".join(["registers have changed:", *changes, REWRITE])


def count(kernel: str, pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in instructions(READ)[kernel])


def test_convolutions_use_tensor_cores_and_asynchronous_copies() -> None:
    for half, tile in product(HALVES, conv_tiles()):
        kernel = f"conv_bn_act_kernel<{half}, {tile}>"
        suffix = r"\.BF16" if half == "BFloat16" else ""
        pixels, filters, warps_down, warps_across, _ = (int(n) for n in tile[len("ConvTile<") : -1].split(","))
        products = pixels // warps_down // 16 * (filters // warps_across // 8) * 4  # of a step of 64 channels
        fragments = 4 * (pixels // warps_down + filters // warps_across) // 16
        assert count(kernel, rf"HMMA\.16816\.F32{suffix}") >= products, kernel
        assert count(kernel, r"LDSM\.16\.M88\.4") >= fragments, kernel
        assert count(kernel, r"LDGSTS\.E\.BYPASS.*\.128.*") > 0, kernel
        assert count(kernel, r"STG\.E\.128.*") > 0 and count(kernel, r"STG\.E(\.U16)?") == 0, kernel


def test_the_stem_uses_tensor_cores() -> None:
    for half, pixels in product(HALVES, ("unsigned char", None)):
        kernel = f"stem_kernel<{half}, {pixels or half}>"
        # 2 x 8 products of 14 steps, 16 columns deep.
        assert count(kernel, r"HMMA\.16816\.F32(\.BF16)?") >= 2 * 8 * 14, kernel
        assert count(kernel, r"STG\.E\.128.*") > 0, kernel


def test_nothing_is_read_before_the_launch_in_front_has_ended() -> None:
    """From sm_90 on a kernel starts while that one still runs, which the CPU does not show (launch.h, device.cuh)."""
    for kernel, names in instructions("sm_90a").items():
        waits = [place for place, name in enumerate(names) if name.startswith("ACQBULK")]
        memory = [place for place, name in enumerate(names) if re.match(r"(LDG|LDGSTS|LD|STG|ST|ATOMG?|RED)\b", name)]
        if kernel.startswith("bn_stats_apply_kernel"):  # a cooperative launch does not start early
            assert not waits, kernel
        else:
            assert len(waits) == 1 and waits[0] < memory[0], kernel


@pytest.mark.parametrize("name", ["bn_stats_kernel", "bn_stats_apply_kernel"])
def test_statistics_load_16_bytes(name: str) -> None:
    for vector in OF_16_BYTES:
        # Four rows before anything is computed with them, and a shift.
        assert count(f"{name}<{vector}>", r"LDG\.E(\.\w+)*\.128(\.\w+)*") >= 5, vector


@pytest.mark.parametrize(("name", "kinds"), [("bn_apply_kernel", range(3)), ("bn_grad_apply_kernel", (0, 1, 3))])
def test_elementwise_passes_move_vectors(name: str, kinds: range | tuple[int, ...]) -> None:
    enumeration = "Residual" if name == "bn_apply_kernel" else "Mask"
    for vector, kind in product(OF_4, kinds):
        kernel, width = f"{name}<{vector}, ({enumeration}){kind}>", 128 if vector.startswith("float") else 64
        rows = 2 if vector.startswith("float") else 4
        assert count(kernel, rf"LDG\.E(\.\w+)*\.{width}(\.\w+)*") >= rows, kernel
        assert count(kernel, rf"STG\.E(\.\w+)*\.{width}(\.\w+)*") >= rows, kernel
        assert count(kernel, r"STG\.E\.U16") == 0, kernel


def write() -> None:
    """The table, a line for each kernel."""
    lines = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(chips)}" for kernel, chips in table().items())
    release = json.dumps(compiler_release())
    TABLE.write_text(f'{{\n  "release": {release},\n  "registers": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
