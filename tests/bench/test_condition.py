"""The condition of a result: the name of its file, and when a run may go on with an earlier one."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.bench.report.condition import file_name, reasons_to_start_anew
from fused_resnet.bench.result import INFERENCE, MODEL, TRAINING_STEP, Result


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cpu_float32_resnet50_inference_b1_b8_training-step_b16_224px_2threads"),
        ({"level": ["op", "model"]}, "cpu_float32_resnet50_op_model_inference_b1_b8_training-step_b16_224px_2threads"),
        ({"model": ["a.b:c", "timm:x"], "batch_size": {}}, "cpu_float32_a.b-c_timm-x_224px_2threads"),
        ({"model": list("abcd"), "batch_size": {INFERENCE: [1]}}, "cpu_float32_4models_inference_b1_224px_2threads"),
        ({"device": "cuda"}, "H100-80GB-HBM3_float32_resnet50_inference_b1_b8_training-step_b16_224px"),
    ],
)  # fmt: skip
def test_names_of_files(changes, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    asked = {
        "device": "cpu", "model": ["resnet50"], "level": [MODEL], "dtype": ["float32"], "image_size": 224,
        "batch_size": {INFERENCE: [1, 8], TRAINING_STEP: [16]},
    }  # fmt: skip
    assert file_name(asked | changes, 2) == expected


@pytest.mark.parametrize(
    ("fact", "value"), [("commit", "def"), ("torch", "2.11"), ("threads", 1), ("packages", {"timm": "2"})]
)
def test_conditions_differ_by_every_fact(fact, value):
    facts = {"commit": "abc", "torch": "2.13", "threads": 2, "packages": {"timm": "1"}, "load_average": 0.1}
    before = Result(facts, {"seed": 0}, {}, [])
    assert reasons_to_start_anew(before, Result(facts | {"load_average": 0.9, "date": "x"}, {"seed": 0}, {}, [])) == []
    assert reasons_to_start_anew(before, Result(facts | {fact: value}, {"seed": 0}, {}, [])) == [f"another {fact}"]
    assert reasons_to_start_anew(before, Result(facts | {fact: value}, {"seed": 1}, {}, [])) == [
        f"another {fact}",
        "another seed",
    ]
    dirty = Result(facts | {"commit": "abc-dirty"}, {"seed": 0}, {}, [])
    assert reasons_to_start_anew(dirty, dirty) == ["a modified checkout"]
