"""Generated calls of the public functions of ``fused_resnet.ops``."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet.ops import BatchNorm, ConvNorm, bn_act, bn_act_dual, conv_bn_act, conv_bn_act_pool, residual_block
from tests.fuzz import settings as generated
from tests.fuzz.call import Call, Tensors
from tests.fuzz.tensors import DTYPES, SMALL, Draw, image, one_in
from tests.ops.step import pytorch_bn_act, pytorch_bn_act_dual
from tests.ops.test_conv_bn_act import pytorch_conv_bn_act

MIXED = "mixed dtype|needs_dynamic_casting|[Ee]xpected.*scalar type|same dtype|dtype of"
"""PyTorch's errors for dtypes that do not go together there."""
VECTORS = ("weight", "bias", "running_mean", "running_var")
RUNNING = VECTORS[2:]
REFUSALS = (
    r"must have dtype float64|at least one channel|must not be empty|at least one pixel|must be given when|x's device"
)
"""What PyTorch computes with and these functions do not: other dtypes, no channels, no weights, meta and others."""


def norm_of(tensors: Tensors, suffix: str, settings: dict[str, Any]) -> BatchNorm:
    return BatchNorm(*(tensors[name + suffix] for name in VECTORS), **settings)


@st.composite
def bn_act_calls(draw: Draw) -> Call:
    shape, dtype, settings = generated.shape(draw), draw(DTYPES), generated.norm_settings(draw)
    tensors: Tensors = {"x": image(draw, shape, dtype), **generated.vectors(draw, shape[1], dtype)}
    if draw(st.booleans()):
        tensors["residual"] = image(draw, shape, draw(DTYPES) if one_in(draw, 8) else dtype)
    names = ("x", "weight", "bias", "residual")
    generated.odd_dtype(draw, tensors, names)
    generated.misplace(draw, tensors, names)
    settings["activation"] = draw(st.sampled_from(["relu", "relu", None]))
    return Call(
        "bn_act",
        lambda given: bn_act(**given, **settings),
        lambda given: pytorch_bn_act(**given, **settings),
        tensors,
        written=RUNNING if settings["training"] else (),
        wanted=generated.wanted(draw, tensors, names),
        settings=settings,
        surroundings=generated.surroundings(draw),
        terms=max(1, shape[0] * shape[2] * shape[3]),
        refusals=REFUSALS,
        extends=MIXED,
    )


@st.composite
def bn_act_dual_calls(draw: Draw) -> Call:
    shape, dtype = generated.shape(draw), draw(DTYPES)
    tensors: Tensors = {}
    settings = {suffix: generated.norm_settings(draw) for suffix in ("", "2")}
    for suffix in settings:
        of = draw(DTYPES) if suffix and one_in(draw, 12) else dtype
        tensors["x" + suffix] = image(draw, shape, of)
        tensors |= {name + suffix: vector for name, vector in generated.vectors(draw, shape[1], of).items()}
    names = ("x", "weight", "bias", "x2", "weight2", "bias2")
    generated.odd_dtype(draw, tensors, names)
    generated.misplace(draw, tensors, names)
    activation = draw(st.sampled_from(["relu", "relu", None]))

    def call(function: Any, given: Tensors) -> Tensor:
        norms = [norm_of(given, suffix, each) for suffix, each in settings.items()]
        return function(given["x"], norms[0], given["x2"], norms[1], activation=activation)

    return Call(
        "bn_act_dual",
        lambda given: call(bn_act_dual, given),
        lambda given: call(pytorch_bn_act_dual, given),
        tensors,
        written=tuple(name + suffix for suffix, each in settings.items() if each["training"] for name in RUNNING),
        wanted=generated.wanted(draw, tensors, names),
        settings={**settings, "activation": activation},
        surroundings=generated.surroundings(draw),
        terms=max(1, shape[0] * shape[2] * shape[3]),
        refusals=REFUSALS,
        extends=MIXED,
    )


@st.composite
def conv_bn_act_calls(draw: Draw) -> Call:
    shape, dtype = generated.shape(draw), draw(DTYPES)
    x = image(draw, shape, dtype)
    settings, weight = generated.conv(draw, draw(DTYPES) if one_in(draw, 20) else dtype, shape)
    vectors = generated.vectors(draw, len(weight), dtype, tracked=True)
    tensors: Tensors = {"x": x, "conv_weight": weight, **vectors}
    if draw(st.booleans()):
        size = [(shape[i + 2] + 2 * settings["padding"][i] - settings["dilation"][i] * (weight.shape[i + 2] - 1) - 1)
                // settings["stride"][i] + 1 for i in (0, 1)]  # fmt: skip
        result = (shape[0], len(weight), max(size[0], 1), max(size[1], 1))
        tensors["residual"] = image(draw, result, draw(DTYPES) if one_in(draw, 8) else dtype)
    names = ("x", "conv_weight", "weight", "bias", "residual")
    generated.odd_dtype(draw, tensors, names)
    generated.misplace(draw, tensors, names)
    settings |= {
        "eps": draw(st.sampled_from([1e-5, 1e-3])),
        "activation": draw(st.sampled_from(["relu", "relu", None])),
    }
    with_gradients = draw(st.booleans())
    return Call(
        "conv_bn_act",
        lambda given: conv_bn_act(**given, **settings),
        lambda given: pytorch_conv_bn_act(**given, **settings),
        tensors,
        wanted=generated.wanted(draw, tensors, names) if with_gradients else (),
        settings=settings,
        surroundings=generated.surroundings(draw),
        terms=max(1, shape[0] * shape[2] * shape[3]),
        taps=max(1, weight[:1].numel()),
        refusals=REFUSALS,
        extends=MIXED,
    )


def pytorch_link(x: Tensor, link: ConvNorm) -> Tensor:
    """What ``residual_block``'s docstring says a link is."""
    y = F.conv2d(x, link.conv_weight, None, *link.settings)
    norm = link.norm
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, *norm[4:7])


def pytorch_conv_bn_act_pool(x: Tensor, link: ConvNorm, **pooling: Any) -> Tensor:
    """What ``conv_bn_act_pool``'s docstring says it equals."""
    return F.max_pool2d(F.relu(pytorch_link(x, link)), **pooling)


def link_of(tensors: Tensors, suffix: str, settings: dict[str, Any]) -> ConvNorm:
    norm = {key: settings[key] for key in ("training", "momentum", "eps")}
    moves = {key: settings[key] for key in ("stride", "padding", "dilation", "groups")}
    return ConvNorm(tensors["conv_weight" + suffix], norm_of(tensors, suffix, norm), **moves)


@st.composite
def conv_bn_act_pool_calls(draw: Draw) -> Call:
    shape, dtype = generated.shape(draw), draw(DTYPES)
    settings, weight = generated.conv(draw, dtype, shape)
    settings |= generated.norm_settings(draw)
    vectors = generated.vectors(draw, len(weight), dtype)
    tensors: Tensors = {"x": image(draw, shape, dtype), "conv_weight": weight, **vectors}
    kernel = draw(st.sampled_from([3, 3, 2, (1, 3), (2, 5)]))
    pooling = {"kernel_size": kernel, "stride": draw(st.sampled_from([2, 1, (2, 3)]))}
    pooling["padding"] = draw(st.sampled_from([0, 1] if isinstance(kernel, int) else [0, (0, 1)]))
    names = ("x", "conv_weight", "weight", "bias")
    generated.odd_dtype(draw, tensors, names)
    generated.misplace(draw, tensors, names)
    return Call(
        "conv_bn_act_pool",
        lambda given: conv_bn_act_pool(given["x"], link_of(given, "", settings), **pooling),
        lambda given: pytorch_conv_bn_act_pool(given["x"], link_of(given, "", settings), **pooling),
        tensors,
        written=RUNNING if settings["training"] else (),
        wanted=generated.wanted(draw, tensors, names),
        settings={**settings, **{"pool_" + key: value for key, value in pooling.items()}},
        surroundings=generated.surroundings(draw),
        terms=max(1, shape[0] * shape[2] * shape[3]),
        taps=max(1, weight[:1].numel()),
        refusals=REFUSALS,
        extends=MIXED,
    )


def pytorch_residual_block(x: Tensor, chain: list[ConvNorm], shortcut: ConvNorm | None) -> Tensor:
    """What ``residual_block``'s docstring says it equals."""
    h = x
    for index, link in enumerate(chain):
        h = pytorch_link(F.relu(h) if index else h, link)
    return F.relu(h + (x.to(h.dtype) if shortcut is None else pytorch_link(x, shortcut)))


@st.composite
def residual_block_calls(draw: Draw) -> Call:
    projects, memory = draw(st.booleans()), draw(st.sampled_from(["default", "default", "efficient"]))
    stride = draw(st.sampled_from([(1, 1), (2, 2)])) if projects else (1, 1)
    wide = st.sampled_from([generated.FEWEST_CHANNELS, 17, 24])
    shape, dtype = generated.shape(draw, draw(SMALL if stride == (1, 1) else wide)), draw(DTYPES)
    tensors: Tensors = {"x": image(draw, shape, dtype)}
    settings: dict[str, dict[str, Any]] = {}
    before = shape[1]
    links = draw(st.integers(1, 3))
    ends = draw(SMALL) if projects else shape[1]
    for index in [*range(links), *(["s"] if projects else [])]:
        suffix, channels = str(index), shape[1] if index == "s" else before
        filters = ends if index in ("s", links - 1) else draw(SMALL)
        kernel = 1 if index == "s" else draw(st.sampled_from([3, 3, 1]))
        settings[suffix] = {
            "stride": stride if index in ("s", 0) else (1, 1),
            "padding": (kernel // 2, kernel // 2),
            "dilation": (1, 1),
            "groups": 1,
        } | generated.norm_settings(draw)
        weight = image(draw, (filters, channels, kernel, kernel), dtype, "weights")
        tensors["conv_weight" + suffix] = weight
        tensors |= {name + suffix: vector for name, vector in generated.vectors(draw, filters, dtype).items()}
        before = filters
    chain, shortcut = [str(index) for index in range(links)], "s" if projects else None
    names = tuple(name for name in tensors if "running" not in name)
    generated.odd_dtype(draw, tensors, names)
    generated.misplace(draw, tensors, names)

    def call(function: Any, given: Tensors, **more: Any) -> Tensor:
        made = {suffix: link_of(given, suffix, each) for suffix, each in settings.items()}
        return function(given["x"], [made[suffix] for suffix in chain], made.get(shortcut), **more)

    return Call(
        "residual_block",
        lambda given: call(residual_block, given, memory=memory),
        lambda given: call(pytorch_residual_block, given),
        tensors,
        written=tuple(name + suffix for suffix, each in settings.items() if each["training"] for name in RUNNING),
        wanted=generated.wanted(draw, tensors, names),
        settings={**settings, "memory": memory},
        surroundings=generated.surroundings(draw),
        terms=max(1, shape[0] * shape[2] * shape[3]),
        taps=99,
        refusals=REFUSALS,
        extends=MIXED,
    )


CALLS = st.one_of(
    bn_act_calls(), bn_act_dual_calls(), conv_bn_act_calls(), conv_bn_act_pool_calls(), residual_block_calls()
)
