"""`python -m fused_resnet`: the commands, and what `info` tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import fused_resnet
from fused_resnet.__main__ import COMMANDS, main
from fused_resnet.ops.route import reasons


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["info", "--frobnicate"]])
def test_an_unknown_command_or_option_ends_with_usage(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: python -m fused_resnet" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert COMMANDS[command][1] in capsys.readouterr().out.replace("\n", " ")


def test_info_agrees_with_the_package(capsys):
    with fused_resnet.use_backend("reference"):
        assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fused_resnet"]["version"] == fused_resnet.__version__
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["backends"] == {name: reasons.unavailable(name) for name in reasons.MODULES}
    assert facts["extension"]["built"] == (facts["backends"]["native"] == [])
    assert facts["requested_backend"] == "reference"
    assert len(facts["cuda_devices"]) == torch.cuda.device_count()


def test_info_as_text_gives_every_reason(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in reasons.MODULES:
        for reason in reasons.unavailable(name):
            assert reason in text
    assert "reference" in text


def test_info_shows_the_environment_and_imports_nothing_that_only_the_demo_needs():
    code = (
        "import sys; from fused_resnet.__main__ import main; main(['info', '--json']);"
        "print([name for name in ('rich', 'matplotlib', 'sklearn') if name in sys.modules], file=sys.stderr)"
    )
    variables = {"FUSED_RESNET_BACKEND": "reference", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip().endswith("[]")
    facts = json.loads(done.stdout)
    assert facts["requested_backend"] == "reference"
    assert facts["environment"].items() >= variables.items()
