"""The condition that a result was measured in: the name of its file, and whether two are the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from fused_resnet.bench.machine import device_name
from fused_resnet.bench.result import MODEL, Result

MOST_NAMES = 3
"""So many models are named in a file's name; of more, only the number."""
MOST_BATCH_SIZES = 4
MACHINE = ("device", "device_type", "threads", "python", "torch", "cuda", "cudnn", "triton", "packages", "commit")
"""The facts that must agree."""
ARGUMENTS = ("dry", "seed")


def file_name(
    device: torch.device,
    threads: int,
    models: Sequence[str],
    levels: Sequence[str],
    batch_sizes: Mapping[str, Sequence[int]],
    dtypes: Sequence[str],
    image_size: int,
) -> str:
    """Such as "cpu_float32_resnet50_inference_b1_b8_training-step_b16_224px_2threads", without an ending.

    Args:
        threads: of PyTorch; told on the CPU only.
        levels: told unless it is only "model".
        batch_sizes: by mode.
    """
    on_gpu = device.type == "cuda"
    where = re.sub(r"^nvidia[ -]", "", device_name(device), flags=re.IGNORECASE) if on_gpu else "cpu"
    named = [_slug(name) for name in models] if len(models) <= MOST_NAMES else [f"{len(models)}models"]
    parts = [_slug(where), *dtypes, *named, *(level for level in levels if list(levels) != [MODEL])]
    for mode, sizes in batch_sizes.items():
        parts.append(mode.replace(" ", "-"))
        parts += [f"b{size}" for size in sizes] if len(sizes) <= MOST_BATCH_SIZES else [f"b{sizes[0]}-{sizes[-1]}"]
    return "_".join([*parts, f"{image_size}px", *([] if on_gpu else [f"{threads}threads"])])


def differences(before: Result, now: Result) -> list[str]:
    """Why no measurement of the one may stand in the other; empty for the same machine, versions, arguments and commit.

    A modified checkout is no commit: two of them may differ.
    """
    if str(now.machine.get("commit")).endswith("-dirty"):
        return ["a modified checkout"]
    facts = [("machine", name) for name in MACHINE] + [("arguments", name) for name in ARGUMENTS]
    return [f"another {name}" for of, name in facts if getattr(before, of).get(name) != getattr(now, of).get(name)]


def _slug(name: str) -> str:
    """Letters, digits, dots, dashes and underscores only, for the name of a file."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "model"
