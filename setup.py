"""Compiles csrc/ into ``fused_resnet._C``; everything else about the package stands in pyproject.toml.

FUSED_RESNET_BUILD says what to compile:

======== ============================================================================================
auto     (default) C++, and CUDA where there is an nvcc; a pure Python package where there is no compiler
auto-cpu the same without CUDA, also where there is an nvcc
cuda     C++ and CUDA, or an error that says what is missing
cpu      C++ only, or an error that says what is missing
none     nothing: a pure Python package, which runs on Triton and ATen
======== ============================================================================================

CXX and CUDA_HOME name the compilers, CXXFLAGS and LDFLAGS are added to theirs, MAX_JOBS bounds how many run at once.
No header of PyTorch is used, so one build works with every PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CHOICES = ("auto", "auto-cpu", "cuda", "cpu", "none")

COMPILE_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-falign-loops=64"]  # aligned: an eighth faster where two threads share a core
# Every csrc/cpu/*/*.cpp is compiled once per row; the widest one that the processor has is chosen when _C is imported.
# Linked in this order: of an inline function that several rows define, the linker keeps the first, narrowest one.
CPU_CAPABILITIES = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": [*("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"), *AVX2],
}
CPU_CAPABILITIES["avx512_bf16"] = [*CPU_CAPABILITIES["avx512"], "-mavx512bf16"]
# target: the virtual architecture it is compiled from. The last one is PTX, for chips younger than this list.
CUDA_TARGETS = {
    "sm_80": "compute_80",
    "sm_86": "compute_86",
    "sm_89": "compute_89",
    "sm_90a": "compute_90a",
    "compute_90": "compute_90",
}


@dataclass(frozen=True)
class Toolchain:
    cxx: list[str]
    nvcc: str | None


def find_toolchain(choice: str) -> tuple[Toolchain | None, str]:
    """What to compile with, or None and the reason; an explicit choice that cannot be met ends the build."""
    if choice not in CHOICES:
        sys.exit(f"FUSED_RESNET_BUILD must be one of {', '.join(CHOICES)}; got {choice!r}")
    if choice == "none":
        return None, "FUSED_RESNET_BUILD=none"
    cxx = shlex.split(os.environ.get("CXX", "")) or [next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")]
    missing = [f"the Python package {name}" for name in ("ninja", "pybind11") if not importlib.util.find_spec(name)]
    if sys.platform == "win32":
        missing.append("a platform other than Windows (csrc is written for gcc and clang)")
    elif not shutil.which(cxx[0]):
        missing.append(f"a C++ compiler (no {cxx[0]!r}; CXX names another)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python.h (Debian's python3-dev)")
    nvcc, complaint = find_nvcc(cxx) if choice in ("auto", "cuda") and not missing else (None, "")
    if choice == "cuda" and nvcc is None:
        missing.append(complaint or "nvcc")
    if not missing:
        if nvcc is None and choice == "auto":
            print(f"fused_resnet: without CUDA kernels, missing: {complaint}", file=sys.stderr)
        return Toolchain(cxx, nvcc), ""
    if choice in ("auto", "auto-cpu"):
        return None, "missing: " + "; ".join(missing)
    sys.exit(f"FUSED_RESNET_BUILD={choice} cannot be done, missing: " + "; ".join(missing))


def find_nvcc(cxx: list[str]) -> tuple[str | None, str]:
    """An nvcc that works with this C++ compiler and knows every target, or None and what is missing."""
    home = os.environ.get("CUDA_HOME")
    candidates = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        return None, "nvcc (looked in CUDA_HOME, PATH and /usr/local/cuda)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_runtime.h>\n#include <string>\n__global__ void probe() {}\n")
        command = [nvcc, *nvcc_flags(cxx), "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode == 0 and static_runtime(nvcc) is None:
        return None, f"libcudart_static.a beside {nvcc}"
    if probe.returncode == 0:
        return nvcc, ""
    says = (probe.stderr or probe.stdout).strip().splitlines() or ["nothing"]
    complaint = f"an nvcc that compiles for {', '.join(CUDA_TARGETS)} with {host_compiler(cxx)}"
    return None, f"{complaint} ({nvcc} says: {says[-1]})"


def cuda_sources() -> list[Path]:
    return sorted(CSRC.glob("cuda/*.cu"))


def object_name(source: Path) -> str:
    """Below the build folder, without what comes after the dot."""
    return source.relative_to(CSRC).with_suffix("").as_posix()


def cuda_home(nvcc: str) -> Path:
    """The toolkit's folder, as nvcc itself tells it: the file on PATH may be a link or a wrapper elsewhere."""
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", "unused.o"], capture_output=True, text=True, check=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if top is None:
        raise CompileError(f"`{nvcc} --dryrun` does not say where its toolkit lies")
    return Path(top[1].strip()).resolve()


def static_runtime(nvcc: str) -> Path | None:
    folders = (cuda_home(nvcc) / folder for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"))
    return next((path for folder in folders if (path := folder / "libcudart_static.a").exists()), None)


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def quoted(words: list[str]) -> str:
    """The words for a shell, as a value in a ninja file."""
    return shlex.join(words).replace("$", "$$")


class BuildWithNinja(build_ext):
    """Writes a build.ninja beside the objects, so that a second build compiles only what changed, and runs it."""

    toolchain: Toolchain | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools would throw the objects away
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extension(self, ext: Extension) -> None:
        assert self.toolchain is not None
        folder = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.write_rules(folder / "build.ninja", target, self.toolchain)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [sys.executable, "-m", "ninja", "-C", str(folder), *jobs, *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command).returncode:
            raise CompileError(
                "fused_resnet._C does not compile; the compiler's message is above. "
                "FUSED_RESNET_BUILD=none installs the package without it."
            )

    def write_rules(self, path: Path, target: Path, toolchain: Toolchain) -> None:
        import pybind11
        from ninja.ninja_syntax import Writer

        cxx = toolchain.cxx
        machine = output_of([*cxx, "-dumpmachine"])
        dispatch = re.match(r"x86_64|amd64", machine) is not None
        openmp = openmp_flags(cxx)
        definitions = {
            "FUSED_RESNET_VERSION": f'"{self.distribution.get_version()}"',
            "FUSED_RESNET_COMPILER": f'"{output_of([*cxx, "--version"]).splitlines()[0]}"',
            "FUSED_RESNET_CUDA_TARGETS": f'"{" ".join(CUDA_TARGETS) if toolchain.nvcc else ""}"',
        }
        if dispatch:
            definitions["FUSED_RESNET_X86_DISPATCH"] = "1"
        includes = [pybind11.get_include(), *{sysconfig.get_path("include"), sysconfig.get_path("platinclude")}]
        link = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []), *openmp]
        libraries: list[str] = []
        cuda_flags: list[str] = []
        if toolchain.nvcc:
            home = cuda_home(toolchain.nvcc)
            runtime = static_runtime(toolchain.nvcc)
            assert runtime is not None
            definitions["FUSED_RESNET_CUDA"] = "1"
            includes.append(str(home / "include"))
            libraries = [str(runtime), "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
            cuda_flags = nvcc_flags(cxx)
        cxx_flags = [*COMPILE_FLAGS, *openmp, f"-I{CSRC}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        # Only what says what was built is compiled with these, so that a build with CUDA finds the kernels for the CPU
        # that a build without it has compiled.
        binding_flags = [
            *(word for folder in includes for word in ("-isystem", folder)),
            *(f"-D{name}={value}" for name, value in definitions.items()),
        ]
        with path.open("w") as stream:
            rules = Writer(stream)
            compiler = quoted(cxx)
            link += shlex.split(os.environ.get("LDFLAGS", ""))
            rules.rule(
                "cxx",
                f"{compiler} {quoted(cxx_flags)} $flags -MMD -MF $out.d -c $in -o $out",
                description="compile $out",
                depfile="$out.d",
            )
            rules.rule(
                "nvcc",
                f"{toolchain.nvcc} {quoted(cuda_flags)} -MMD -MF $out.d -c $in -o $out",
                description="compile $out",
                depfile="$out.d",
            )
            rules.rule("link", f"{compiler} {quoted(link)} -o $out $in {quoted(libraries)}", description="link $out")
            objects = [
                *(
                    rules.build(
                        f"{object_name(source)}.o", "cxx", str(source), variables={"flags": quoted(binding_flags)}
                    )
                    for folder in ("bindings", "cpu")
                    for source in sorted(CSRC.glob(f"{folder}/*.cpp"))
                ),
                *(
                    rules.build(
                        f"{object_name(source)}.{capability}.o",
                        "cxx",
                        str(source),
                        variables={"flags": quoted([f"-DCPU_CAPABILITY={capability}", *flags])},
                    )
                    for capability, flags in CPU_CAPABILITIES.items()
                    if capability == "baseline" or dispatch
                    for source in sorted(CSRC.glob("cpu/*/*.cpp"))
                ),
                *(
                    rules.build(f"{object_name(source)}.o", "nvcc", str(source))
                    for source in cuda_sources()
                    if toolchain.nvcc
                ),
            ]
            rules.build(str(target), "link", [name for outputs in objects for name in outputs])


def nvcc_flags(cxx: list[str]) -> list[str]:
    targets = [f"--generate-code=arch={virtual},code={target}" for target, virtual in CUDA_TARGETS.items()]
    host = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    return [*("-O3", "-std=c++17", "-lineinfo", "-ccbin", host_compiler(cxx)), *targets, *host, f"-I{CSRC}"]


def host_compiler(cxx: list[str]) -> str:
    """The compiler among the words of CXX, such as `ccache g++ -m64`."""
    return [word for word in cxx if not word.startswith("-")][-1]


def openmp_flags(cxx: list[str]) -> list[str]:
    """-fopenmp where the compiler can link it (Apple's clang cannot); the kernels are single-threaded without."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        probe = [*cxx, "-fopenmp", str(source), "-o", str(Path(folder, "probe"))]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return ["-fopenmp"]
    print(f"fused_resnet: {shlex.join(cxx)} has no OpenMP; the CPU kernels will run on one thread", file=sys.stderr)
    return []


def main() -> None:
    toolchain, reason = find_toolchain(os.environ.get("FUSED_RESNET_BUILD") or "auto")
    BuildWithNinja.toolchain = toolchain
    if toolchain is None:
        print(f"fused_resnet: nothing is compiled ({reason}); the package runs on Triton and ATen", file=sys.stderr)
    sources = [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.c*")) if path.suffix in (".cpp", ".cu")]
    setup(
        # kernels/ is a folder of its own in the repository and a part of the package once installed; the top-level name
        # `kernels` belongs to another project.
        packages=[*find_packages(include=["fused_resnet", "fused_resnet.*"]), "fused_resnet.kernels"],
        package_dir={"fused_resnet.kernels": "kernels"},
        ext_modules=[Extension("fused_resnet._C", sources)] if toolchain else [],
        cmdclass={"build_ext": BuildWithNinja},
    )


if __name__ == "__main__":
    main()
