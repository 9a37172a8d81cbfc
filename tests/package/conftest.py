"""A clean copy of the sources, and environments to install it into."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("benchmarks", "csrc", "docs", "fused_resnet", "kernels", "packaging", "requirements", "tests"),
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", ".clang-format", "mkdocs.yml"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"),
)
# What a shell of the person who runs the tests must not leak into the builds.
BUILD_VARIABLES = ("FUSED_RESNET_BUILD", "FUSED_RESNET_BACKEND", "CXX", "CUDA_HOME", "LDFLAGS", "PYTHONPATH")


@pytest.fixture(scope="session")
def copy_sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a copy of the repository without anything that was built in it."""

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("sources")
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(ROOT / name, folder / name)
        return folder

    return copy


@pytest.fixture(scope="session")
def sources(copy_sources: Callable[[], Path]) -> Path:
    return copy_sources()


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run(command, cwd, **variables)``: with the variables of a fresh shell, and the compiler at its fastest."""

    def run(command: list[object], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in BUILD_VARIABLES}
        # As in pip's isolated builds, the ninja program is found on PATH.
        environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment["PATH"]])
        environment["CXX"] = f"{sys.executable} {Path(__file__).with_name('cached_compiler.py')} c++"
        environment["CXXFLAGS"] = "-O0"
        environment["FUSED_RESNET_BUILD"] = "cpu"  # nvcc takes a minute: for tests that ask for it
        return subprocess.run(
            [str(word) for word in command], cwd=cwd, env=environment | variables, capture_output=True, text=True
        )

    return run


@pytest.fixture
def environment(tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> Environment:
    return Environment(tmp_path / "environment", run)


class Environment:
    """A fresh virtual environment that sees the packages of the running one, but no editable install in them."""

    def __init__(self, folder: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        venv.create(folder, symlinks=os.name != "nt")
        self.folder = folder
        self.python = folder / "bin" / "python"
        self._run = run
        (site_packages,) = folder.glob("lib/python*/site-packages")
        # A path in a .pth file is searched for packages, while .pth files in that path are not read in turn.
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site_packages / "packages_of_the_tests.pth").write_text("\n".join(sorted(paths)))

    def pip_install(self, what: Path, *flags: str, **variables: str) -> None:
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
        done = self._run(
            [sys.executable, "-m", "pip", "--python", self.python, "install", *offline, *flags, what],
            self.folder,
            **variables,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def python_prints(self, *words: str) -> str:
        """What Python prints for these arguments, started outside the sources."""
        done = self._run([self.python, *words], self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def info(self) -> dict[str, object]:
        return json.loads(self.python_prints("-m", "fused_resnet", "info", "--json"))
