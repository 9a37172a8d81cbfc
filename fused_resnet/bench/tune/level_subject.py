"""At which level a convolution trains."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fused_resnet.bench.options import dtype_name
from fused_resnet.bench.passes import why_wrong
from fused_resnet.bench.sites import ConvSite
from fused_resnet.bench.suite.op_base import terms_of_products
from fused_resnet.bench.suite.op_conv_training import ConvTrainingInputs
from fused_resnet.bench.suite.task import Prepared
from fused_resnet.bench.tune.level_step import LevelStep
from fused_resnet.bench.tune.subject import Result, Subject, choosing, empty_image, with_batch, with_tiles
from fused_resnet.ops.plan import measured_plan, plan_key
from fused_resnet.ops.plan.plan_file import Key
from fused_resnet.ops.route.choose import use_backend
from fused_resnet.ops.route.fusion_level import highest_level, training_level
from fused_resnet.ops.route.reasons import unavailable
from fused_resnet.ops.route.request import use_fusion_level


class LevelSubject(Subject):
    """Candidates are "0" to the highest level of the device, where the kernels take the convolution.

    Args:
        site: the convolution and its place.
        tiles: those that were found to be fastest so far, as in a plan; looked at when a candidate is made ready.
    """

    op = measured_plan.LEVEL

    def __init__(
        self, site: ConvSite, batch_size: int, dtype: torch.dtype, device: torch.device, tiles: dict[Key, str]
    ) -> None:
        self.site, self.batch_size, self.dtype, self.device = site, batch_size, dtype, device
        place = ", behind a norm" if site.normed else ""
        self.title = f"training level {site.conv}{place} x {batch_size} {dtype_name(dtype)}"
        self.compiles = not unavailable("triton")
        self._tiles = tiles

    def make_key(self) -> Key:
        shapes = (self.site.conv.input_shape(1), self.site.conv.weight_shape)
        x, weight = (empty_image(shape, self.dtype, self.device) for shape in shapes)
        return with_batch(plan_key.level_key(x, weight, self.site.conv.settings), self.batch_size)

    def heuristic(self) -> str:
        x, weight = self._inputs.x, self._inputs.weight
        with use_backend("auto"), use_fusion_level(None):
            return str(training_level(x, weight, *self._inputs.settings))

    def candidates(self) -> dict[str, Callable[[], Prepared]]:
        with use_backend("auto"):
            levels = range(highest_level(self._inputs.x) + 1) if self.heuristic() != "0" else (0,)
        return {str(level): functools.partial(self._prepare, level) for level in levels}

    def why_wrong(self, prepared: Prepared) -> str | None:
        depth, values = self._inputs.weight[0].numel(), self._inputs.behind.values
        results = zip(self._exact.items(), prepared.results(), strict=True)
        for (name, right), ours in results:
            assert ours is not None
            terms = terms_of_products(self.dtype, depth)
            terms *= 1 if name in ("y", "grad_input") else values
            if wrong := why_wrong(ours, self._baseline[name], right, terms, self._magnitude(name)):
                return f"{name}: {wrong}"
        return None

    def release(self) -> None:
        for name in ("_inputs", "_step", "_exact", "_baseline"):
            self.__dict__.pop(name, None)

    @functools.cached_property
    def _inputs(self) -> ConvTrainingInputs:
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return ConvTrainingInputs(self.site, self.batch_size, self.dtype, self.device)

    @functools.cached_property
    def _step(self) -> LevelStep:
        return LevelStep(self._inputs, self.site.takes_gradient, self.dtype)

    @functools.cached_property
    def _exact(self) -> dict[str, Tensor]:
        with use_backend("reference"):
            return LevelStep(self._inputs, self.site.takes_gradient, torch.float64).results(0)

    @functools.cached_property
    def _baseline(self) -> dict[str, Tensor]:
        """PyTorch's own operations."""
        with use_backend("reference"):
            return self._step.results(0)

    def _prepare(self, level: int) -> Prepared:
        step, chooser = self._step, choosing(self._tiles) if self._tiles else None

        def in_tiles(call: Callable[[], Result]) -> Callable[[], Result]:
            return call if unavailable("triton") else with_tiles(chooser, call)

        run = in_tiles(lambda: step.run(level))
        run()
        return Prepared(run=run, results=in_tiles(lambda: [*step.results(level).values()]))

    def _magnitude(self, name: str) -> float | None:
        """Of what is rounded, where that is not the result: y, whose deviation and mean are rounded with it."""
        y, mean, invstd = (self._exact[each] for each in ("y", "mean", "invstd"))
        if name == "mean":
            return y.abs().max().item()
        return (invstd * (1 + mean.abs() * invstd)).max().item() if name == "invstd" else None
