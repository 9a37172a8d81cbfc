"""benchmarks/cpu_speed.py on very little work: it runs, and its numbers hang together."""

from __future__ import annotations

import json

import pytest

from benchmarks import cpu_speed
from fused_resnet.bench.contenders import FROZEN, FUSED, PLAIN_FORMATS


def test_it_writes_every_contender_and_the_machine(tmp_path, capsys):
    path = tmp_path / "new" / "result.json"
    words = ["--model", "resnet18", "--size", "32", "--rounds", "1", "--inference-batches", "1", "2"]
    cpu_speed.main([*words, "--training-batch", "2", "--output", str(path)])
    results = json.loads(path.read_text())
    assert results["machine"]["threads"] >= 1
    assert [(entry["mode"], entry["batch_size"]) for entry in results["measured"]] == [
        ("inference", 1),
        ("inference", 2),
        ("training", 2),
    ]
    for entry in results["measured"]:
        expected = {*PLAIN_FORMATS, FUSED} | ({FROZEN} if entry["mode"] == "inference" else set())
        assert set(entry["seconds"]) == set(entry["speedup"]) == expected
        for name, timing in entry["seconds"].items():
            assert len(timing["samples"]) == 1
            for plain in PLAIN_FORMATS:
                quotient = entry["seconds"][plain]["median"] / timing["median"]
                assert entry["speedup"][name][plain] == pytest.approx(quotient)
        for name, difference in entry.get("relative_difference", {}).items():
            assert difference < 1e-4, name
    assert "inference, batch 2" in capsys.readouterr().out
