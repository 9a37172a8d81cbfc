"""The documentation site: it builds without a warning, and its API page holds every public name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_resnet

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "index.html").read_text()
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        assert f'id="{name}"' in page


def test_the_api_page_holds_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    shown = set(re.findall(r"\w+", text))
    named_by_depth = {f"cifar_{kind}{depth}" for kind in ("resnet", "plain") for depth in (32, 44, 56, 110)}
    modules = {"models", "modules", "ops", "__version__"}
    assert {*fused_resnet.__all__, *fused_resnet.ops.__all__} - modules - named_by_depth <= shown


def test_readme_tells_the_version():
    assert f"**Status: {fused_resnet.__version__}," in (ROOT / "README.md").read_text()
