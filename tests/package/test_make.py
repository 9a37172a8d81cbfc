"""The Makefile: what a command installs and compiles, first and after another one. Nothing is run (``make -n``)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_GPU, A_GPU = "GPU=", "GPU=/dev/nvidia0"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.fixture
def would_do(tmp_path: Path) -> Callable[..., str]:
    """``would_do(stamps, *words)``: the commands of ``make *words`` where these stamps, and no others, lie."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "fused_resnet/version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("requirements", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))

    def would_do(stamps: tuple[str, ...], *words: str) -> str:
        folder = tmp_path / "env" / "make"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for age, name in enumerate(sorted(stamps)):
            (folder / name).touch()
            os.utime(folder / name, (1.1e9 + age, 1.1e9 + age))
        variables = {name: value for name, value in os.environ.items() if name not in ("FUSED_RESNET_BUILD", "VENV")}
        command = ["make", "-n", "VENV=env", *words]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout

    return would_do


def installs(text: str) -> list[str]:
    return [line.rpartition(" -r ")[2] for line in text.splitlines() if " -r requirements/" in line]


def compiles(text: str) -> list[str]:
    return [line.partition(" ")[0] for line in text.splitlines() if line.startswith("FUSED_RESNET_BUILD=")]


@pytest.mark.parametrize(("gpu", "build"), [(NO_GPU, "auto-cpu"), (A_GPU, "auto")])
def test_the_demo_installs_and_compiles_what_it_uses(would_do, gpu, build):
    text = would_do((), "demo", gpu)
    assert installs(text) == ["requirements/demo.txt"]
    assert compiles(text) == [f"FUSED_RESNET_BUILD={build}"]
    assert "-m fused_resnet demo" in text


def test_what_was_asked_for_is_compiled(would_do):
    assert compiles(would_do((), "demo", NO_GPU, "FUSED_RESNET_BUILD=none")) == ["FUSED_RESNET_BUILD=none"]


def test_a_second_demo_does_nothing_but_run(would_do):
    text = would_do(("packages-demo", "ready-auto-cpu"), "demo", NO_GPU)
    assert not installs(text) and not compiles(text)
    assert "-m fused_resnet demo" in text


@pytest.mark.parametrize("words", [["build"], ["build", "demo"]])
def test_other_commands_after_the_demo_install_and_compile_the_rest(would_do, words):
    text = would_do(("packages-demo", "ready-auto-cpu"), *words, NO_GPU)
    assert installs(text) == ["requirements/dev.txt"]
    assert compiles(text) == ["FUSED_RESNET_BUILD=auto"]


def test_the_demo_undoes_nothing(would_do):
    text = would_do(("packages-demo", "packages-dev", "ready-auto"), "demo", NO_GPU)
    assert not installs(text) and not compiles(text)


def test_changed_sources_are_compiled_and_changed_requirements_installed(would_do, tmp_path):
    stamps = ("packages-dev", "ready-auto")
    assert not compiles(would_do(stamps, "build"))
    os.utime(tmp_path / "csrc" / "norm.h", (1.2e9, 1.2e9))
    assert compiles(would_do(stamps, "build")) and not installs(would_do(stamps, "build"))
    os.utime(tmp_path / "requirements" / "demo.txt", (1.2e9, 1.2e9))
    assert installs(would_do(stamps, "build")) == ["requirements/dev.txt"]


def test_the_documentation_needs_neither_torch_nor_a_compiler(would_do):
    text = would_do((), "docs")
    assert installs(text) == ["requirements/docs.txt"] and not compiles(text)
    assert "torch" not in (ROOT / "requirements" / "docs.txt").read_text().split("\n", 1)[1].lower()
