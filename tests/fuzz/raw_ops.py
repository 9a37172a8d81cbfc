"""Generated calls of the ops as PyTorch's dispatcher has them, ``torch.ops.fused_resnet.*``, beside the plain PyTorch
of ``ops/reference``: arguments that fit, and some of which one does not."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from fused_resnet.arguments import PoolSettings
from fused_resnet.ops import reference
from fused_resnet.ops.route.packing import argument_names, packed
from fused_resnet.ops.schemas import SCHEMAS
from tests.fuzz import settings as generated
from tests.fuzz.call import Call, Surroundings, Tensors
from tests.fuzz.tensors import SMALL, Draw, image, one_in, tensor, values, wrap

DTYPES = st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float16, torch.float64])
VECTORS = {"mean": "weights", "invstd": "positive", "weight": "weights", "bias": "weights", "running_mean": "weights",
           "running_var": "positive", "sum_dz": "weights", "sum_dz_xhat": "weights", "scale": "positive",
           "shift": "weights"}  # fmt: skip
REQUIRED = ("mean", "invstd")
OPTIONAL_IN = {"conv_stats": REQUIRED, "conv_grad_input": REQUIRED, "conv_grad_weight": REQUIRED}
PAIRS = (("mean", "invstd"), ("sum_dz", "sum_dz_xhat"), ("running_mean", "running_var"))


def arguments_that_fit(draw: Draw, op: str) -> dict[str, Any]:
    """By the names of the schema. The vectors have the dtype of statistics, as the functions give them."""
    names, dtype = argument_names(op), draw(DTYPES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = generated.shape(draw, 3 if op == "stem" else draw(SMALL))
    given: dict[str, Any] = {"relu": draw(st.booleans()), "statistics": draw(st.booleans()),
                             "with_mask": False, "with_dz": draw(st.booleans()), "momentum": 0.1, "eps": 1e-5,
                             "count": float(max(1, math.prod(shape) // shape[1])), "pixel_scale": None,
                             "pixel_shift": None}  # fmt: skip
    if "with_mask" in names:
        given["with_mask"] = given["relu"] and draw(st.booleans())
    output, filters = shape, shape[1]
    if "conv_weight" in names:
        given["x"] = image(draw, shape, dtype)
        if op == "stem":
            weight = values(draw, (draw(SMALL), 3, 7, 7), "weights").to(dtype)
            moves: dict[str, Any] = {"stride": (2, 2), "padding": (3, 3), "dilation": (1, 1), "groups": 1}
        else:
            moves, weight = generated.conv(draw, dtype, shape)
        given |= {name: list(value) if isinstance(value, tuple) else value for name, value in moves.items()}
        given["conv_weight"], filters = weight, len(weight)
        size = [(shape[i + 2] + 2 * moves["padding"][i] - moves["dilation"][i] * (weight.shape[i + 2] - 1) - 1)
                // moves["stride"][i] + 1 for i in (0, 1)]  # fmt: skip
        output = (shape[0], filters, max(size[0], 1), max(size[1], 1))
    elif "kernel_size" in names:
        window = PoolSettings(*draw(st.sampled_from([((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)),
                                                     ((2, 3), (1, 2), (1, 0))])))  # fmt: skip
        given |= {name: list(value) for name, value in window._asdict().items()}
        size = [max(each, 1) for each in window.output_size(shape)]
        output = (*shape[:2], size[0], size[1])
        place = values(draw, output, "positive").mul(0) + draw(st.integers(0, 1))
        given["place"] = place.to(torch.uint8)
    for name in names:
        base = name.rstrip("2")
        if name in given:
            continue
        if base in VECTORS:
            channels = filters if base in ("scale", "shift") or ("conv" in op and "running" in base) else shape[1]
            given[name] = tensor(draw, (channels,), wide, VECTORS[base], 12 if "running" not in base else 0)
            needed = base in REQUIRED and base not in OPTIONAL_IN.get(op, ())
            if not needed and one_in(draw, 4):
                given[name] = None
        elif name == "mask":
            whole = torch.randint(256, reference.mask_shape(shape), generator=torch.Generator().manual_seed(3))
            given[name] = whole.to(torch.uint8)
        elif name == "coefficients":
            given[name] = None if one_in(draw, 3) else values(draw, (4, filters), "weights").to(wide)
        elif name in ("x", "x2", "out"):
            given[name] = None if name == "out" and draw(st.booleans()) else image(draw, shape, dtype)
        elif name in ("dz", "y", "grad_out"):
            given[name] = None if name == "y" and draw(st.booleans()) else image(draw, output, dtype)
        elif name == "residual":
            of = shape if op == "conv_grad_input" else output
            given[name] = None if draw(st.booleans()) else image(draw, of, dtype)
        else:
            raise KeyError(f"{op}: {name}")
    for pair in PAIRS:
        if pair[0] in names and (given[pair[0]] is None or given[pair[1]] is None):
            given |= dict.fromkeys(pair)
    if "y" in names and given["coefficients"] is None:
        given["y"] = None
    return {name: given[name] for name in names}


def spoil(draw: Draw, op: str, given: dict[str, Any]) -> None:
    """Something about one argument that does not fit."""
    name = draw(st.sampled_from(sorted(name for name, value in given.items() if isinstance(value, (Tensor, list)))))
    value = given[name]
    if isinstance(value, list):
        given[name] = draw(st.sampled_from([[], [1], [0, 0], [1, 2, 3], [-1, 1], [99, 99]]))
        return
    ways = [
        lambda: None,
        lambda: value[:0],
        lambda: value[None],
        lambda: value.flatten()[:1],
        lambda: torch.tensor(0.5),
        lambda: torch.cat([value, value]),
        lambda: value.to("meta"),
        lambda: value.to(draw(st.sampled_from([torch.int64, torch.complex64, torch.float64, torch.bool]))),
        lambda: value if written_by(op) else wrap("TwoTensor", value),  # which runs an op twice
    ]
    given[name] = ways[draw(st.integers(0, len(ways) - 1))]()


def written_by(op: str) -> tuple[str, ...]:
    schema = getattr(torch.ops.fused_resnet, op).default._schema
    return tuple(each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write)


@st.composite
def calls(draw: Draw) -> Call:
    op = draw(st.sampled_from(sorted(SCHEMAS)))
    given = arguments_that_fit(draw, op)
    fits = not one_in(draw, 4)
    if not fits:
        spoil(draw, op, given)
    tensors: Tensors = dict(given)
    inference = not any(isinstance(value, TwoTensor) for value in given.values()) and one_in(draw, 3)
    arms = Surroundings(
        grad="inference_mode" if inference else "no_grad",
        backend=draw(st.sampled_from(["auto", "auto", "native", "reference"])),
        threads=draw(st.sampled_from([1, 1, 2])),
    )
    x = given.get("x")
    pixels = x.numel() // x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] else 1
    return Call(
        op,
        lambda named: getattr(torch.ops.fused_resnet, op)(*named.values()),
        lambda named: getattr(reference, op)(*packed(op, list(named.values()))),
        tensors,
        written=tuple(name for name in written_by(op) if isinstance(tensors[name], Tensor)),
        settings={"fits": fits},
        surroundings=arms,
        terms=max(1, pixels),
        taps=max(99, pixels),
        spoiled=not fits,
    )


CALLS = calls()
