"""Every question that the shapes of some networks ask, each once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fused_resnet.bench.result import INFERENCE, TRAINING_STEP
from fused_resnet.bench.sites import conv_sites
from fused_resnet.bench.suite.op_base import OpTask
from fused_resnet.bench.suite.op_conv_inference import ConvInferenceTask
from fused_resnet.bench.suite.op_conv_training import ConvTrainingTask
from fused_resnet.bench.suite.op_norm_step import NormStepTask
from fused_resnet.bench.suite.op_stem import StemTask
from fused_resnet.bench.suite.op_task import op_tasks
from fused_resnet.bench.tune.level_subject import LevelSubject
from fused_resnet.bench.tune.subject import BackendSubject, MethodSubject, Subject, TrainingTileSubject
from fused_resnet.ops.backends.native.conv import why_no_kernels
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.plan.plan_key import CHOSEN_OPS
from fused_resnet.ops.route.reasons import unavailable, why_not_device

MODES = {"inference": INFERENCE, "training": TRAINING_STEP}


@dataclass(frozen=True)
class Selection:
    """What is tuned; plain values, which go to other processes.

    Attributes:
        models: builders of this package.
        modes: "inference", "training".
        batch_sizes: a mode, and the batch sizes of it, each.
        dtypes: such as "float32".
    """

    models: tuple[str, ...]
    modes: tuple[str, ...]
    batch_sizes: tuple[tuple[str, tuple[int, ...]], ...]
    dtypes: tuple[str, ...]
    device: str
    image_size: int
    most_tiles: int | None = None
    """Of a kernel, beside the usual one; None for all: for a run that only shows that it runs."""


def subjects(selection: Selection, tiles: dict[Key, str]) -> list[Subject]:
    """The questions, in the order in which they are measured: convolutions and passes, the methods of a frozen network
    on the CPU, the tiles of the training convolutions, and the levels, in which those tiles are used."""
    found: dict[tuple[str, Key], Subject] = {}
    kinds: list[type] = [BackendSubject, MethodSubject, TrainingTileSubject, LevelSubject]
    for subject in sorted(_all(selection, tiles), key=lambda subject: kinds.index(type(subject))):
        found.setdefault((subject.op, subject.key), subject)
    return [*found.values()]


def _all(selection: Selection, tiles: dict[Key, str]) -> Iterator[Subject]:
    device = torch.device(selection.device)
    dtypes = [getattr(torch, name) for name in selection.dtypes]
    for mode in selection.modes:
        batch_sizes = dict(selection.batch_sizes)[mode]
        for task in op_tasks(selection.models, [MODES[mode]], batch_sizes, dtypes, device, selection.image_size):
            assert isinstance(task, OpTask)
            if (subject := _of_task(task, selection.most_tiles)) is not None:
                yield subject
            if isinstance(task, ConvInferenceTask) and device.type == "cpu":
                method = MethodSubject(task)
                if len(method.candidates()) > 1:
                    yield method
                method.release()
        triton = not why_not_device("triton", device)
        native = device.type == "cpu" and not why_no_kernels(torch.float32)
        if mode == "training" and (triton or native):
            places = {site: None for name in selection.models for site in conv_sites(name, selection.image_size)}
            # On the CPU the stem, whose input takes no gradient, stays at level 0.
            sites = [site for site in places if site.conv.sizes.groups == 1 and (triton or site.takes_gradient)]
            for site in sorted(sites, key=lambda site: not site.normed):  # of one shape the place that gains most
                for dtype in dtypes if triton else set(dtypes) & {torch.float32}:
                    yield from (LevelSubject(site, batch, dtype, device, tiles) for batch in batch_sizes)


def _of_task(task: OpTask, most_tiles: int | None) -> Subject | None:
    """None of what nobody chooses: a whole step; and of what no network runs on this device."""
    on_gpu = task.device.type == "cuda"
    if isinstance(task, NormStepTask):
        return None
    if isinstance(task, ConvTrainingTask):
        fused = task.site.conv.sizes.groups == 1 and not why_not_device("triton", task.device)
        return TrainingTileSubject(task, most_tiles) if fused else None
    if isinstance(task, StemTask) and not on_gpu:
        return None
    subject = BackendSubject(task, most_tiles)
    only_cuda = subject.op.endswith("_mask") or subject.op == "bn_stats_apply"  # as ``ops/route/routes.py`` has it
    if only_cuda and (unavailable("cuda") or not on_gpu):
        return None
    return subject if subject.op in CHOSEN_OPS else None
