"""Statistics shared by ranks: what they compute together equals one process that has all their images."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fused_resnet.ops import BatchNorm, bn_act, bn_act_dual
from fused_resnet.ops.synchronize import statistics_over_ranks, sums_over_ranks
from tests.accuracy import assert_at_most_twice
from tests.ops.step import (
    BUFFERS,
    FORMATS,
    dual_inputs,
    make_cotangent,
    make_inputs,
    pytorch_bn_act,
    pytorch_bn_act_dual,
    step,
    widen,
)
from tests.ranks import counted_collectives, on_ranks

CHANNELS = 5


class Case(NamedTuple):
    """One call of ``bn_act``, or of ``bn_act_dual``, whose batch is divided among the ranks."""

    images: tuple[int, ...]
    """How many each of three ranks has; of two ranks, the first has the last two's too."""
    dtype: torch.dtype = torch.float32
    memory_format: str = "nhwc"
    residual: bool = False
    dual: bool = False
    activation: str | None = "relu"
    size: tuple[int, int] = (4, 3)
    offset: float = 0.0
    momentum: float = 0.1
    training: bool = True
    wanted: tuple[str, ...] | None = None

    def inputs(self) -> dict[str, Tensor | None]:
        torch.manual_seed(1)
        shape = (sum(self.images), CHANNELS, *self.size)
        settings = (self.dtype, FORMATS[self.memory_format])
        inputs = dual_inputs(shape, *settings) if self.dual else make_inputs(shape, *settings, residual=self.residual)
        return {name: t + self.offset if name in ("x", "x2") and t is not None else t for name, t in inputs.items()}

    def call(self, plain: bool = False, process_group: Any = None):
        """The function of named tensors, ours or PyTorch's."""
        settings = {"training": self.training, "momentum": self.momentum}
        if not self.dual:
            function = pytorch_bn_act if plain else bn_act

            def single(activation=self.activation, **named):
                group = {} if plain else {"process_group": process_group}
                return function(**named, activation=activation, **settings, **group)

            return single

        def dual(activation=self.activation, **named):
            vectors = ("weight", "bias", "running_mean", "running_var")
            norms = [
                BatchNorm(*(named[n + s] for n in vectors), **settings, process_group=process_group) for s in ("", "2")
            ]
            function = pytorch_bn_act_dual if plain else bn_act_dual
            return function(named["x"], norms[0], named["x2"], norms[1], activation=activation)

        return dual

    def rows(self, rank: int, ranks: int) -> slice:
        images = self.images if ranks == 3 else (self.images[0], sum(self.images[1:]))
        return slice(sum(images[:rank]), sum(images[: rank + 1]))

    def expects(self) -> list[str]:
        """The collectives of every rank."""
        norms = 2 if self.dual else 1
        wants_x = self.wanted is None or "x" in self.wanted
        return (["all_gather"] * norms + ["all_reduce"] * norms * wants_x) if self.training else []


FLOAT64 = torch.float64
CASES = {
    "float32 nhwc": Case((2, 3, 1), residual=True),
    "float32 nchw": Case((1, 4, 2), memory_format="nchw"),
    "float64 nhwc": Case((3, 1, 2), FLOAT64, residual=True),
    "float64 nchw": Case((1, 1, 4), FLOAT64, "nchw"),
    "bfloat16": Case((2, 2, 3), torch.bfloat16, residual=True),
    "no activation": Case((2, 2, 3), residual=True, activation=None),
    "an empty batch": Case((2, 0, 3), residual=True),
    "an empty batch first": Case((0, 3, 1)),
    "an empty batch in float64": Case((0, 3, 1), FLOAT64, residual=True),
    "no image at all": Case((0, 0, 0), residual=True),
    "one image in all": Case((0, 1, 0)),
    "one value per rank": Case((1, 1, 1), FLOAT64, size=(1, 1)),
    "dual nhwc": Case((2, 3, 1), dual=True),
    "dual nchw float64": Case((2, 3, 1), FLOAT64, "nchw", dual=True),
    "dual with an empty batch": Case((2, 0, 1), dual=True),
    "mean far larger than deviation": Case((2, 1, 3), offset=1e4),
    "mean far larger than deviation in float64": Case((2, 1, 3), FLOAT64, offset=1e8),
    "momentum 1": Case((2, 3, 1), momentum=1.0),
    "eval": Case((2, 3, 1), training=False, residual=True),
    "only the weights want gradients": Case((2, 3, 1), wanted=("weight", "bias")),
    "no gradients": Case((2, 3, 1), wanted=()),
}


def cotangent_of(case: Case) -> Tensor:
    torch.manual_seed(2)
    return make_cotangent(case.call(plain=True), case.inputs())


def run_cases(rank: int) -> dict[str, Any]:
    """On one rank: each case on its rows, and what was called meanwhile."""
    ranks, group, results = dist.get_world_size(), dist.group.WORLD, {}
    for name, case in CASES.items():
        rows, cotangent = case.rows(rank, ranks), cotangent_of(case)
        # It runs float64 anyway, so that ranks which ask for it and ranks which do not have to agree on what is called.
        backend = "reference" if case.dtype == FLOAT64 and rank == 0 else "auto"
        mine = {k: t[rows] if t is not None and t.dim() == 4 else t for k, t in case.inputs().items()}
        with counted_collectives() as calls:
            results[name] = step(
                case.call(process_group=group), mine, cotangent[rows], wanted=case.wanted, backend=backend
            )
        results[name]["calls"] = calls
    results["create_graph"] = _refusal(lambda: _create_graph(group))
    results["torch.func"] = _refusal(lambda: _torch_func(group))
    results["merge"] = _merge(rank, group)
    results["half"] = _half(rank, group)
    return results


def _refusal(function) -> str:
    with pytest.raises(NotImplementedError) as raised:
        function()
    return str(raised.value)


def _create_graph(group: Any) -> None:
    x = torch.randn(2, CHANNELS, 3, 3, requires_grad=True)
    out = bn_act(x, None, None, None, None, training=True, process_group=group)
    torch.autograd.grad(out.square().sum(), x, create_graph=True)


def _torch_func(group: Any) -> None:
    x = torch.randn(2, CHANNELS, 3, 3)
    torch.func.grad(lambda x: bn_act(x, None, None, None, None, training=True, process_group=group).sum())(x)


LARGE = 2**24 + 1  # the first whole number that float32 does not have


def _merge(rank: int, group: Any) -> dict[str, Tensor]:
    """The seam itself, with counts that no tensor of a test has: LARGE, then 2 of each rank, but none of the last."""
    count = LARGE if rank == 0 else 0 if rank == dist.get_world_size() - 1 else 2
    mean, invstd = torch.full((2,), rank + 1.0), torch.tensor([float("inf"), 1.0])
    if count == 0:
        mean, invstd = mean * float("nan"), invstd * float("nan")
    norm = BatchNorm(None, None, torch.zeros(2), torch.zeros(2), True, 1.0, 0.25, group)
    merged = dict(zip(("mean", "invstd", "share"), statistics_over_ranks(mean, invstd, count, norm), strict=True))
    sums = torch.ones(2), torch.tensor([1.0, 2.0])
    over_ranks = dict(zip(("dz", "dz_xhat"), sums_over_ranks(sums, merged["share"], group), strict=True))
    assert sums[0].tolist() == [1, 1] and sums[1].tolist() == [1, 2]
    return {**merged, **over_ranks, "running_mean": norm.running_mean, "running_var": norm.running_var}


def _half(rank: int, group: Any) -> list[Tensor]:
    """Running variances behind a pass whose first norm alone is shared, rank 0 without images."""
    x = torch.ones(0 if rank == 0 else 2, CHANNELS, 2, 2)
    shared, alone = (BatchNorm(None, None, torch.ones(CHANNELS), torch.ones(CHANNELS), True) for _ in range(2))
    bn_act_dual(x, shared._replace(process_group=group), x, alone)
    return [shared.running_var, alone.running_var]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(request.param, run_cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_equal_one_process(name, ranks):
    case = CASES[name]
    inputs, cotangent, plain = case.inputs(), cotangent_of(case), case.call(plain=True)
    baseline = step(plain, inputs, cotangent, wanted=case.wanted)
    exact = step(plain, widen(inputs), cotangent, wanted=case.wanted)
    # Nothing is more exact than float64: 1e-13 is a few hundred of its roundings. A large mean's own rounding to the
    # dtype of statistics is allowed for; what a formula that squares it would lose is ten thousand times more.
    scale = 1 + case.offset
    magnitude = case.offset or None
    for key, want in exact.items():
        parts = [result[name][key] for result in ranks]
        if key.rstrip("2") in BUFFERS:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{key} differs between ranks"
            actual = parts[0]
        else:
            actual = torch.cat(parts) if want.dim() == 4 else torch.stack(parts).sum(0)
        if case.dtype == FLOAT64:
            error, limit = (actual - want).abs().max(), 1e-13 * scale * (1 + want.abs().max())
            assert error <= limit, f"{key}: {error} > {limit}"
        else:
            terms = cotangent.numel() // CHANNELS if want.dim() == 1 and key not in BUFFERS else 1
            assert_at_most_twice(actual, baseline[key], want, what=key, terms=terms, magnitude=magnitude)
    for result in ranks:
        assert result[name]["calls"] == case.expects()


@pytest.mark.parametrize("name", ["float64 nhwc", "dual nchw float64", "an empty batch in float64"])
def test_gradients_of_weight_and_bias_are_those_of_the_ranks_own_images(name, ranks):
    """Their sum is right also where every rank has its share of the whole: they are linear in the cotangent, so that of
    one rank's images alone gives what one rank should have."""
    case, cotangent = CASES[name], cotangent_of(CASES[name])
    for rank, result in enumerate(ranks):
        alone, rows = torch.zeros_like(cotangent), case.rows(rank, len(ranks))
        alone[rows] = cotangent[rows]
        expected = step(case.call(plain=True), case.inputs(), alone)
        keys = [key for key in expected if key.startswith(("gradient of weight", "gradient of bias"))]
        assert len(keys) == (4 if case.dual else 2)
        for key in keys:
            torch.testing.assert_close(result[name][key], expected[key], rtol=1e-12, atol=1e-12)


def test_memory_format_and_dtype_are_kept(ranks):
    for name in ("float32 nhwc", "float64 nhwc", "bfloat16"):
        for key in ("output", "gradient of x", "gradient of residual"):
            tensors = [result[name][key] for result in ranks]
            assert {tensor.dtype for tensor in tensors} == {CASES[name].dtype}
            assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)


def test_no_second_derivative_and_no_transforms(ranks):
    for result in ranks:
        assert "create_graph must be False" in result["create_graph"]
        assert "process_group must be None inside torch.func" in result["torch.func"]


def test_merge_of_large_counts_zero_variance_and_a_rank_that_counts_nothing(ranks):
    means, counts = [1.0, 2.0][: len(ranks) - 1], [LARGE, 2][: len(ranks) - 1]
    total = sum(counts)
    mean = sum(m * n for m, n in zip(means, counts, strict=True)) / total
    spread = sum(n * (m - mean) ** 2 for m, n in zip(means, counts, strict=True))
    m2 = torch.tensor([spread, spread + total], dtype=FLOAT64)  # of variance 0 and 1 within each rank
    for result, count in zip(ranks, [*counts, 0], strict=True):
        merged = result["merge"]
        assert merged["share"].item() == count / total
        torch.testing.assert_close(merged["mean"], torch.full((2,), mean), rtol=1e-7, atol=0)
        torch.testing.assert_close(merged["invstd"], torch.rsqrt(m2 / total + 0.25).float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(merged["running_mean"], torch.full((2,), mean), rtol=1e-7, atol=0)
        torch.testing.assert_close(merged["running_var"], (m2 / (total - 1)).float(), rtol=1e-6, atol=0)
        of_ranks = torch.tensor([[1.0, 1.0], [1.0, 2.0]]) * len(ranks) * (count / total)
        torch.testing.assert_close(torch.stack([merged["dz"], merged["dz_xhat"]]), of_ranks)


def test_a_pass_whose_norms_are_not_both_shared(ranks):
    """The images are constant: the variance decays, but that of a rank alone without images stays."""
    for rank, result in enumerate(ranks):
        for variance, expected in zip(result["half"], (0.9, 1.0 if rank == 0 else 0.9), strict=True):
            torch.testing.assert_close(variance, torch.full((CHANNELS,), expected))


@pytest.mark.parametrize("group", ["world", 1, torch.zeros(1)])
def test_refuses_what_is_no_process_group(group):
    x, norm = torch.randn(2, CHANNELS, 3, 3), BatchNorm(None, None, None, None, True)
    with pytest.raises(TypeError, match=r"^process_group must be a torch.distributed.ProcessGroup or None; got"):
        bn_act(x, *norm[:4], training=True, process_group=group)
    with pytest.raises(TypeError, match=r"^process_group2 must be"):
        bn_act_dual(x, norm, x, norm._replace(process_group=group))


def test_one_rank_shares_with_nobody(tmp_path):
    """As if there were no group: nn.BatchNorm2d's refusal of one value, a second derivative, no collective."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        group, x = dist.group.WORLD, torch.randn(2, CHANNELS, 3, 3, dtype=FLOAT64, requires_grad=True)
        with counted_collectives() as calls:
            out = bn_act(x, None, None, None, None, training=True, process_group=group)
            torch.testing.assert_close(out, F.relu(F.batch_norm(x, None, None, training=True)))
            torch.autograd.grad(out.square().sum(), x, create_graph=True)
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                bn_act(x[:1, :, :1, :1], None, None, None, None, training=True, process_group=group)
        assert calls == []
    finally:
        dist.destroy_process_group()
