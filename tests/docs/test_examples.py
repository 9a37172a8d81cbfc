"""What README and the documentation show works: Python is run, commands are parsed, links lead somewhere."""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from fused_resnet.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_A_GPU = "# needs a GPU\n"
WITH_DOCTESTS = [path for path in sorted((ROOT / "fused_resnet").rglob("*.py")) if ">>> " in path.read_text()]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a page in this language, each with the number of its first line."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match[1] == language]
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


def commands() -> list[str]:
    lines = {line for page in PAGES for _, text in blocks(page, "") for line in text.splitlines()}
    return sorted(
        line.partition("  #")[0].strip() for line in lines if re.match(r"(python -m fused_resnet|make) ", line)
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page):
    pytest.importorskip("torchvision")
    names: dict[str, object] = {}
    for line, text in blocks(page, "python"):
        if text.startswith(NEEDS_A_GPU) and not torch.cuda.is_available():
            continue
        exec(compile("\n" * (line - 1) + text, page, "exec"), names)


def test_examples_are_found():
    assert len(blocks(ROOT / "README.md", "python")) >= 2 and len(blocks(ROOT / "docs" / "guide.md", "python")) >= 6
    assert len(commands()) >= 8 and WITH_DOCTESTS


@pytest.mark.parametrize("path", WITH_DOCTESTS, ids=lambda path: path.stem)
def test_the_examples_of_docstrings_run(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_is_one_that_there_is(line):
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(COMMANDS[words[3]][0]).add_arguments(parser)
    parser.parse_args(words[4:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_there_are(page):
    folder = page.parent
    for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]*)?\)", page.read_text()):
        if "://" not in target:
            assert (folder / target).exists(), target
