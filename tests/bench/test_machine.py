"""The facts in a result file."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from fused_resnet.bench import machine


def test_facts_are_json_and_name_the_versions():
    facts = machine.machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device"] == facts["cpu"]
    assert facts["cores"] >= 1


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_of_the_checkout_that_tracks_the_file(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        machine.subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    source = tmp_path / "machine.py"
    source.write_text("1\n")
    monkeypatch.setattr(machine, "REPOSITORY_FILE", source)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None
    git("init", "-q")
    assert machine.commit() is None  # inside a checkout that does not track it, as an installed package may be
    git("add", ".")
    git("commit", "-qm", "one")
    assert re.fullmatch(r"[0-9a-f]{40}", machine.commit())
    source.write_text("2\n")
    assert re.fullmatch(r"[0-9a-f]{40}-dirty", machine.commit())
