"""A call of ours and the same call in plain PyTorch: equal results by the accuracy rule, or an error in both."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fused_resnet.ops import BackendError, use_backend, use_fusion_level
from fused_resnet.ops.route import routes
from tests.accuracy import assert_at_most_twice
from tests.fuzz.tensors import described
from tests.modules.compare import TOLERANCE

Tensors = dict[str, Any]
NEARBY = 48
"""Ways to round, by which one sees how far a result can be known that is a difference of large numbers."""


@dataclass(frozen=True)
class Surroundings:
    """What PyTorch and the user have set around a call."""

    grad: str = "enabled"
    autocast: torch.dtype | None = None
    default_dtype: torch.dtype = torch.float32
    backend: str = "auto"
    level: int | None = None
    threads: int = 1
    fewest: int = 0
    """Elements of an activation that is worth a pass of ours (``routes.FEWEST_ELEMENTS``)."""

    @contextlib.contextmanager
    def around(self, ours: bool) -> Iterator[None]:
        before = torch.get_default_dtype(), torch.get_num_threads(), routes.FEWEST_ELEMENTS
        with contextlib.ExitStack() as stack:
            stack.enter_context({"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(
                self.grad, torch.enable_grad)())  # fmt: skip
            if self.autocast is not None:
                stack.enter_context(torch.autocast("cpu", self.autocast, cache_enabled=False))
            if ours:
                stack.enter_context(use_backend(self.backend))
                stack.enter_context(use_fusion_level(self.level))
            torch.set_default_dtype(self.default_dtype)
            torch.set_num_threads(self.threads)
            routes.FEWEST_ELEMENTS = self.fewest
            try:
                yield
            finally:
                torch.set_default_dtype(before[0])
                torch.set_num_threads(before[1])
                routes.FEWEST_ELEMENTS = before[2]


@dataclass(repr=False)
class Call:
    """Two functions of the same named arguments, of which they read and write nothing else."""

    name: str
    ours: Callable[[Tensors], Any]
    plain: Callable[[Tensors], Any]
    tensors: Tensors
    written: tuple[str, ...] = ()
    """Names of tensors that a call may write to."""
    wanted: tuple[str, ...] = ()
    """Names of those that require a gradient."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else was drawn, to be told."""
    surroundings: Surroundings = Surroundings()
    terms: int = 1
    """How many numbers are added up in an element of the gradient of a parameter, or of a statistic."""
    taps: int = 1
    """How many in an element of an output."""
    refusals: str | None = None
    """A pattern of the errors that ours documents and plain PyTorch does not raise."""
    spoiled: bool = False
    """Whether an argument may not fit: then ours may refuse what plain PyTorch makes something of."""
    extends: str | None = None
    """A pattern of PyTorch's errors for mixes of dtypes that ours takes, as PyTorch does where all are float64."""

    def __post_init__(self) -> None:
        self._changes: dict[str, float] | None = None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """As hypothesis prints it."""
        printer.text(str(self))

    def __repr__(self) -> str:
        settings = [f"{key}={value!r}" for key, value in self.settings.items()]
        tensors = [f"{key}={described(value)}" for key, value in self.tensors.items()]
        return "\n    ".join([self.name, *settings, *tensors, f"wanted={self.wanted}", str(self.surroundings)])

    def check(self) -> None:
        """Raises AssertionError where the two differ."""
        theirs, ours = (
            self._outcome(function, self.tensors, self.surroundings.around(function is self.ours))
            for function in (self.plain, self.ours)
        )
        if isinstance(ours, Exception):
            self._check_error(ours, theirs)
            return
        on_meta = any(isinstance(each, Tensor) and each.is_meta for each in self.tensors.values())
        exact = None if on_meta else self._exact(self._wide())
        if isinstance(theirs, Exception):
            takes = self.extends is not None and re.search(self.extends, str(theirs)) and isinstance(exact, dict)
            assert takes, f"accepted; PyTorch: {type(theirs).__name__}: {theirs}"
            self._check_alone(ours, exact)
            return
        assert list(ours) == list(theirs), f"results {list(ours)}, not {list(theirs)}"
        for name, result in ours.items():
            self._check_like(name, result, theirs[name])
        if on_meta:
            return
        assert isinstance(exact, dict), f"float64 raises {exact!r}"
        for name, result in ours.items():
            self._check_numbers(name, plain(result), plain(theirs[name]), plain(exact[name]))

    def _check_alone(self, ours: Tensors, exact: Tensors) -> None:
        """Where there is no PyTorch's own: what is rounded to the coarsest dtype of all."""
        assert list(ours) == list(exact), f"results {list(ours)}, not {list(exact)}"
        dtypes = {t.dtype for t in self.tensors.values() if isinstance(t, Tensor) and t.is_floating_point()}
        dtypes |= {self.surroundings.autocast or torch.float32}
        coarsest = max(dtypes - {torch.float64} | {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)
        for name, result in ours.items():
            rounded = exact[name].to(coarsest)
            self._check_numbers(name, plain(result).to(coarsest), rounded, plain(exact[name]))

    def _check_error(self, ours: Exception, theirs: Any) -> None:
        words = f"{type(ours).__name__}: {ours}"
        if isinstance(ours, BackendError) and self.surroundings.backend != "auto":
            return
        if self.spoiled:
            assert isinstance(ours, (RuntimeError, TypeError)), f"raises {words}"
            return
        if self.refusals is not None and isinstance(ours, (TypeError, ValueError)):
            assert isinstance(theirs, Exception) or re.search(self.refusals, str(ours)), f"refused: {words}"
            return
        assert isinstance(theirs, Exception), f"raises {words}"
        assert isinstance(ours, type(theirs)), f"raises {words}; PyTorch {type(theirs).__name__}: {theirs}"

    def _check_like(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        for what in ("shape", "dtype", "device", "requires_grad"):
            found, expected = getattr(ours, what), getattr(theirs, what)
            assert found == expected, f"{name}: {what} is {found}, not {expected}"
        kept = isinstance(ours, TwoTensor) and type(theirs) is Tensor  # by an add in place, which keeps the left type
        assert type(ours) is type(theirs) or kept, f"{name}: {type(ours).__name__}, not {type(theirs).__name__}"
        assert ours.is_inference() == theirs.is_inference(), f"{name}: is_inference is {ours.is_inference()}"

    def _check_numbers(self, name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs), f"{name}: {ours}, not {theirs}"
            return
        summed = not name.startswith("output") and (ours.dim() == 1 or "conv" in name)
        arguments = {"what": name, "terms": max(self.terms, self.taps) if summed else self.taps}
        ours, theirs, exact = _within(ours, theirs, exact)
        overflown = ours.isfinite() & exact.isfinite() & ~theirs.isfinite()  # PyTorch's sums of 3e38, and not ours
        theirs = torch.where(overflown, exact.to(theirs.dtype), theirs)
        if ours.dtype == torch.float64 and torch.equal(ours.isfinite(), exact.isfinite()):  # no better is known
            known = TOLERANCE[torch.float64] * exact.abs().max().item() if exact.numel() else 0.0
            if ours.numel() == 0 or (ours - exact).abs().max() <= known:
                return
        try:
            assert_at_most_twice(ours, theirs, exact, **arguments)
        except AssertionError as error:
            if self._changes is None:
                self._changes = self._nearby()
            if (change := self._changes.get(name)) is None:
                raise error from None
            out = exact.abs() + 2 * change > torch.finfo(ours.dtype).max  # which may be infinite, or not
            ours, theirs, exact = ours[~out], theirs[~out], exact[~out]
            largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
            magnitude = max(largest, 2 * change / torch.finfo(ours.dtype).eps)  # PyTorch's own may be small by luck
            assert_at_most_twice(ours, theirs, exact, **arguments, magnitude=magnitude)

    def _nearby(self) -> dict[str, float]:
        """The most that each exact result changes where what it is made of, and every result on the way, is rounded up
        or down by chance."""
        dtypes = {t.dtype for t in self.tensors.values() if isinstance(t, Tensor) and t.is_floating_point()}
        dtypes |= {dtype for dtype in (self.surroundings.autocast, self.settings.get("dtype")) if dtype is not None}
        unit = max(torch.finfo(dtype).eps for dtype in dtypes)
        exact = self._exact(self._wide())
        most = dict.fromkeys(exact, 0.0)
        for seed in range(NEARBY):
            rounding = Rounding(unit, seed)
            found = self._exact({name: rounding.rounded(value) for name, value in self._wide().items()}, rounding)
            if not isinstance(found, dict):
                return {}
            for name, result in found.items():
                change = (plain(result) - plain(exact[name])).abs()
                change = change[change.isfinite()]
                most[name] = max(most[name], change.max().item() if change.numel() else 0.0)
        return most

    def _wide(self) -> Tensors:
        return {
            name: plain(value).double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in self.tensors.items()
        }

    def _exact(self, tensors: Tensors, rounding: Rounding | None = None) -> Any:
        with torch.inference_mode(False), torch.set_grad_enabled(self.surroundings.grad == "enabled"):
            around = contextlib.nullcontext() if rounding is None else rounding
            return self._outcome(self.plain, tensors, around)

    def _outcome(self, function: Callable[[Tensors], Any], tensors: Tensors, around: Any) -> Any:
        """Every result by its name, or the error. What may not be written to is as it was."""
        given: Tensors = {}
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or (name not in self.written and name not in self.wanted):
                given[name] = value
            else:
                given[name] = value.detach().clone() if name in self.written else value.detach().requires_grad_()
        versions = {
            name: value._version for name, value in given.items() if _counts(value) and name not in self.written
        }
        try:
            with around:
                found = function(given)
                outputs = found if isinstance(found, (tuple, list)) else [found]
                results = {f"output {index}": output for index, output in enumerate(outputs)}
                if outputs[0].requires_grad:
                    results |= _gradients(outputs[0], {name: given[name] for name in self.wanted})
        except Exception as error:  # compared with the other's
            return error
        for name, version in versions.items():
            assert given[name]._version == version, f"{name} was written to"
        return results | {f"{name} afterwards": given[name] for name in self.written if isinstance(given[name], Tensor)}


def plain(value: Tensor) -> Tensor:
    """The numbers, without a subclass."""
    if isinstance(value, TwoTensor):
        return value.a
    with torch.inference_mode(False):
        value = value.detach().as_subclass(Tensor)
        return value.clone() if value.is_inference() else value


class Rounding(TorchDispatchMode):
    """What every op writes is rounded up or down by chance (Parker, Monte Carlo Arithmetic, 1997)."""

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        self._unit, self._generator = unit, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if any(result.alias_info is not None for result in func._schema.returns):
            return found
        return tree_map_only(Tensor, self.rounded, found)

    def rounded(self, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        signs = torch.randint(-1, 2, tensor.shape, generator=self._generator)
        return tensor + tensor * signs * self._unit


def _within(ours: Tensor, theirs: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three without what is infinite or NaN alike in the first two (where PyTorch's convolution leaves
    out what it pads with, float64 may have a NaN for it), and without what is about as large as their
    dtype can hold, which rounding makes infinite or not."""
    largest = 0.9 * torch.finfo(ours.dtype).max
    out = (exact.abs() > largest) & (ours.abs() > 0.5 * largest) & (ours.sign() == exact.sign())
    out |= (ours == theirs) & (ours.isinf() | ~exact.isfinite()) | ours.isnan() & theirs.isnan()
    return (ours, theirs, exact) if not out.any() else (ours[~out], theirs[~out], exact[~out])


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _gradients(output: Tensor, leaves: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    whole = torch.randint(-96, 97, output.shape, generator=generator)  # 32nds are the same in every dtype
    cotangent = (whole / 32).to(output.device, output.dtype)
    if isinstance(output, TwoTensor):
        cotangent = TwoTensor(cotangent, cotangent.clone())
    found = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    return {f"gradient of {name}": grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
