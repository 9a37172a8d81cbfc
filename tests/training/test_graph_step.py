"""``graph_step`` against a plain loop: uncaptured, replayed by a stand-in for CUDA graphs, and on the device.

The stand-in records the ATen calls of a step with the very tensors and numbers they got, and replays them. So on the
CPU too a learning rate is frozen, a replaced tensor is missed, and nothing in Python runs again.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_resnet
from fused_resnet.cuda_graph import graph_step as module_under_test
from fused_resnet.cuda_graph.graph_step import graph_step
from fused_resnet.cuda_graph.training_state import TrainingState, add_state, reset_state

CPU = torch.device("cpu")
Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, capturable=CAPTURABLE),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, capturable=CAPTURABLE),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, capturable=CAPTURABLE),
}
CAPTURABLE = False


class RecordedCalls(TorchDispatchMode):
    """In the place of ``CudaGraph``. A recording runs its calls and then takes their effects back, as if it had not."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.seen: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def warm_up(self, run: Callable[[], Tensor], times: int) -> None:
        for _ in range(times):
            run()

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        generator = torch.get_rng_state()
        try:
            with self:
                return run()
        finally:
            torch.set_rng_state(generator)
            for storage, saved in self.seen.values():
                storage.copy_(saved)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.seen.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures happen on the CPU, and the optimizers with ``capturable`` believe that it can."""
    monkeypatch.setattr(module_under_test, "CudaGraph", RecordedCalls)
    monkeypatch.setattr(module_under_test, "why_not_capture", lambda device: "")
    for name in ("adam", "rmsprop", "nadam", "rprop"):
        optimizers = importlib.import_module(f"torch.optim.{name}")
        monkeypatch.setattr(optimizers, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu"])
    monkeypatch.setitem(globals(), "CAPTURABLE", True)


def network(dropout: float = 0.0) -> nn.Module:
    block = fused_resnet.BasicBlock(8, 8)
    features = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), block, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*features, nn.Dropout(dropout), nn.Linear(8, 3))


def batches(count: int, device: torch.device = CPU) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(6, 3, 8, 8, device=device), torch.arange(6, device=device) % 3) for _ in range(count)]


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All values that a step may change, copied."""
    state = {"rng": torch.get_rng_state(), **{f"model.{k}": v for k, v in model.state_dict().items()}}
    saved = optimizer.state_dict()
    state |= {f"state.{p}.{k}": v for p, entries in saved["state"].items() for k, v in entries.items()}
    state |= {f"group.{i}.{k}": v for i, group in enumerate(saved["param_groups"]) for k, v in group.items()}
    state |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return copy.deepcopy(state)


def assert_same(got: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert got[name] == value, name
        elif tolerance and value.is_floating_point():
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        else:
            assert torch.equal(got[name], value), name


def assert_trains_alike(make: Make, expect_captured: bool, experienced: bool = False, dropout: float = 0.0) -> None:
    model, data = network(dropout), batches(6)
    optimizer = make(model.parameters())
    if experienced:
        eager_step(model, optimizer, *data[5])
    twin = copy.deepcopy(model)
    twin_optimizer = make(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, other in zip(twin.parameters(), model.parameters(), strict=True):
        parameter.grad = None if other.grad is None else other.grad.clone()
    before = everything(model, optimizer)
    step = graph_step(model, F.cross_entropy, optimizer, data[0])
    assert_same(everything(model, optimizer), before)
    assert step.captured is expect_captured
    losses, generator = [], torch.get_rng_state()
    for images, labels in data[:5]:
        losses.append(step(images, labels))
    ours = everything(model, optimizer)
    torch.set_rng_state(generator)
    expected = [eager_step(twin, twin_optimizer, images, labels) for images, labels in data[:5]]
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert len(set(losses)) == 5
    assert not losses[0].requires_grad
    assert_same(ours, everything(twin, twin_optimizer))
    assert step.captures == expect_captured


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_on_the_cpu_a_step_is_the_plain_step(make: Make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_trains_alike(make, expect_captured=False, dropout=0.5)


@pytest.mark.parametrize("experienced", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_replayed_step_is_the_plain_step(recorded: None, make: Make, experienced: bool):
    assert_trains_alike(make, expect_captured=True, experienced=experienced, dropout=0.5)


def test_the_step_says_why_it_is_not_captured():
    model = network()
    step = graph_step(model, F.cross_entropy, OPTIMIZERS["sgd"](model.parameters()), batches(1)[0])
    assert (step.captured, step.captures) == (False, 0)
    assert step.reason == "the example is on cpu; CUDA graphs need a CUDA device"


@pytest.mark.parametrize("experienced", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_restoring_leaves_no_trace_and_no_new_address(make: Make, experienced: bool):
    model, (batch, other) = network(dropout=0.5), batches(2)
    optimizer = make(model.parameters())
    if experienced:
        eager_step(model, optimizer, *batch)
    before = everything(model, optimizer)
    values = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    values += [v for entries in optimizer.state.values() for v in entries.values()]
    addresses = [value.data_ptr() for value in values]
    state = TrainingState(list(model.modules()), optimizer, CPU)
    for _ in range(2):
        for _ in range(3):
            eager_step(model, optimizer, *other)
        optimizer.param_groups[0]["lr"] = 7.0
        created = state.restore()
        assert_same(everything(model, optimizer), before)
    again = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    again += [v for entries in optimizer.state.values() for v in entries.values()]
    assert all(one is two for one, two in zip(again, values, strict=True))
    assert [value.data_ptr() for value in again] == addresses
    assert len(created) == (0 if experienced or make is OPTIMIZERS["sgd"] else len(list(model.parameters())))


@pytest.mark.parametrize("make", [OPTIMIZERS["nesterov"], OPTIMIZERS["adamw"]], ids=["nesterov", "adamw"])
def test_reset_state_gives_a_fresh_optimizers_next_step(make: Make):
    model, data = network(), batches(2)
    twin = copy.deepcopy(model)
    optimizer, fresh = make(model.parameters()), make(twin.parameters())
    before = TrainingState(list(model.modules()), optimizer, CPU)
    eager_step(model, optimizer, *data[0])
    created = before.restore()
    reset_state(optimizer, created, before)
    assert not optimizer.state
    add_state(optimizer, created)
    for batch in data:
        eager_step(model, optimizer, *batch)
        eager_step(twin, fresh, *batch)
    assert_same(everything(model, optimizer), everything(twin, fresh))
    assert all(optimizer.state[p][name] is v for p, entries in created.items() for name, v in entries.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: torch.optim.NAdam(p, capturable=True),
        lambda p: torch.optim.Rprop(p, capturable=True),
    ],
    ids=["dampening", "nadam", "rprop"],
)
def test_state_that_does_not_start_from_zeros_needs_a_step_first(recorded: None, make: Make):
    model, (batch,) = network(), batches(1)
    optimizer = make(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="Take one step without graph_step first"):
        graph_step(model, F.cross_entropy, optimizer, batch)
    assert_same(everything(model, optimizer), before)
    assert_trains_alike(make, expect_captured=True, experienced=True)


def replayed_and_plain(make: Make) -> tuple[Any, ...]:
    model = network()
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    step = graph_step(model, F.cross_entropy, optimizer, batches(1)[0])
    return step, model, optimizer, twin, twin_optimizer


def freeze_first(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        entries["momentum_buffer"] += 1
    optimizer.load_state_dict(state)


def replace_buffer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model[1].running_mean = torch.ones(8)  # type: ignore[index,union-attr]


def add_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    group = optimizer.param_groups[0]
    optimizer.add_param_group({"params": [group["params"].pop()], "lr": 0.01})


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "lr": lambda model, optimizer: optimizer.param_groups[0].update(lr=0.3),
    "weight_decay": lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.1),
    "mode": lambda model, optimizer: model[2].eval(),
    "requires_grad": freeze_first,
    "loaded state": load_state,
    "buffer": replace_buffer,
    "moved": lambda model, optimizer: setattr(model[0].weight, "data", model[0].weight.data.clone() + 1),
    "group": add_group,
}


@pytest.mark.parametrize("first", [True, False], ids=["before the first step", "in training"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_graph_has_frozen_may_change(recorded: None, change: Callable[[Any, Any], object], first: bool):
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["momentum"])
    data = batches(5)
    for index, batch in enumerate(data):
        if index == (0 if first else 2):
            change(model, optimizer)
            change(twin, twin_optimizer)
        assert torch.equal(step(*batch), eager_step(twin, twin_optimizer, *batch))
        assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    loads_nothing = first and change is load_state
    assert step.captures == (1 if loads_nothing else 2)


def test_new_values_in_place_need_no_new_graph(recorded: None):
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["momentum"])
    weights = network().state_dict()
    for batch in batches(2):
        model.load_state_dict(weights)
        twin.load_state_dict(weights)
        assert torch.equal(step(*batch), eager_step(twin, twin_optimizer, *batch))
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    assert step.captures == 1


def test_a_scheduler_works_and_does_not_complain(recorded: None):
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["nesterov"])
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (optimizer, twin_optimizer)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(4):
            assert torch.equal(step(*batch), eager_step(twin, twin_optimizer, *batch))
            for schedule in schedules:
                schedule.step()
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))


def test_two_steps_of_one_model_share_its_state(recorded: None):
    """Such as one for the last, smaller batch: each makes state for itself, and whichever runs first decides."""
    step, model, optimizer, twin, twin_optimizer = replayed_and_plain(OPTIMIZERS["momentum"])
    batch = batches(1)[0]
    small = tuple(tensor[:4] for tensor in batch)
    step_small = graph_step(model, F.cross_entropy, optimizer, small)
    for run, inputs in ((step, batch), (step_small, small), (step, batch), (step_small, small)):
        assert torch.equal(run(*inputs), eager_step(twin, twin_optimizer, *inputs))
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    assert (step.captures, step_small.captures) == (1, 2)


def test_losses_and_new_gradients_are_kept_apart(recorded: None):
    step, model, optimizer, *_ = replayed_and_plain(OPTIMIZERS["sgd"])
    first, second = batches(2)
    loss = step(*first)
    value = loss.item()
    gradient = model[0].weight.grad
    step(*second)
    assert loss.item() == value
    assert model[0].weight.grad is gradient  # static, as documented
    optimizer.param_groups[0]["lr"] = 0.2
    step(*second)
    assert model[0].weight.grad is not gradient


@pytest.mark.parametrize("fake", [False, True], ids=["uncaptured", "replayed"])
def test_a_call_like_no_example_is_refused_and_trains_nothing(fake: bool, request: pytest.FixtureRequest):
    if fake:
        request.getfixturevalue("recorded")
    step, model, optimizer, *_ = replayed_and_plain(OPTIMIZERS["momentum"])
    images, labels = batches(1)[0]
    before = everything(model, optimizer)
    for call, error, match in [
        ((images[:4], labels), ValueError, r"images must have the example's shape, .*\[6, 3, 8, 8\].*; got .*\[4, 3"),
        (
            (images.double(), labels),
            ValueError,
            "images must have the example's dtype, torch.float32; got torch.float64",
        ),
        ((images, labels.int()), ValueError, "labels must have the example's dtype, torch.int64; got torch.int32"),
        ((images, labels.to("meta")), ValueError, "labels must have the example's device, cpu; got meta"),
        ((images, [0, 1]), TypeError, "labels must be a tensor; got list"),
    ]:
        with pytest.raises(error, match=match):
            step(*call)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("fake", [False, True], ids=["uncaptured", "replayed"])
def test_other_memory_formats_are_brought_to_the_examples(fake: bool, request: pytest.FixtureRequest):
    if fake:
        request.getfixturevalue("recorded")
    seen = []
    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].stride()))
    optimizer, other = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    images, labels = batches(1)[0]
    channels_last = images.contiguous(memory_format=torch.channels_last)
    step = graph_step(model, F.cross_entropy, optimizer, (channels_last, labels))
    assert torch.equal(step(images, labels), eager_step(twin, other, channels_last, labels))
    assert_same(everything(model, optimizer), everything(twin, other))
    assert set(seen) == {channels_last.stride()}


@pytest.mark.parametrize("fake", [False, True], ids=["uncaptured", "replayed"])
def test_autocast_and_a_loss_with_parameters(fake: bool, request: pytest.FixtureRequest):
    if fake:
        request.getfixturevalue("recorded")

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            self.calls.add_(1)
            return F.cross_entropy(logits * self.scale, labels)

    model, loss_fn, data = network(), Scaled(), batches(3)
    twin, twin_loss = copy.deepcopy(model), copy.deepcopy(loss_fn)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):  # whose casts the step must not take for its own
        step = graph_step(model, loss_fn, optimizer, data[0], autocast_dtype=torch.bfloat16)
    for images, labels in data:
        twin.zero_grad()
        twin_loss.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin_loss(twin(images), labels)
        loss.backward()
        twin_optimizer.step()
        assert torch.equal(step(images, labels), loss)
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer))
    assert loss_fn.calls == 3
    assert torch.equal(loss_fn.scale.grad, twin_loss.scale.grad)


class Failing(nn.Module):
    """Fails at the call of this number."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at = 0, at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise ArithmeticError("no more")
        return x


@pytest.mark.parametrize(("at", "what"), [(2, "the warm-up"), (4, "the capture")])
def test_a_failed_capture_leaves_no_trace_and_can_be_tried_again(recorded: None, at: int, what: str):
    model, data = nn.Sequential(network(0.5), Failing(at)), batches(2)
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=f"{what} of graph_step failed.*ArithmeticError: no more") as failure:
        graph_step(model, F.cross_entropy, optimizer, data[0])
    assert isinstance(failure.value.__cause__, ArithmeticError)
    assert_same(everything(model, optimizer), before)

    step = graph_step(model, F.cross_entropy, optimizer, data[0])
    step(*data[0])
    model[1].at = model[1].calls + at
    optimizer.param_groups[0]["lr"] = 0.3
    in_the_graph = {id(parameter.grad) for parameter in model.parameters()}
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=f"{what} of graph_step failed"):
        step(*data[1])
    assert_same(everything(model, optimizer), before)
    assert (step.captured, step.reason) == (False, "the last capture failed")
    assert in_the_graph.isdisjoint(id(parameter.grad) for parameter in model.parameters())  # whose memory is given back
    step(*data[1])
    assert (step.captured, step.reason, step.captures) == (True, "", 2)


class HostCount(torch.optim.SGD):
    """Counts in its hyperparameters, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        super().step()


class ReplacesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x


@pytest.mark.parametrize(
    ("make", "extra", "match"),
    [
        (lambda p: torch.optim.Adam(p), nn.Identity(), r"make it as Adam\(..., capturable=True\)"),
        (lambda p: HostCount(p, lr=0.1), nn.Identity(), "must not change its hyperparameters in a step"),
        (lambda p: torch.optim.SGD(p, lr=0.1), ReplacesBuffer(), "must update its tensors in place"),
    ],
    ids=["not capturable", "counts on the host", "replaces a buffer"],
)
def test_what_no_graph_can_do_is_refused(recorded: None, make: Make, extra: nn.Module, match: str):
    model, (batch,) = nn.Sequential(network(), extra), batches(1)
    optimizer = make(model.parameters())
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=match):
        graph_step(model, F.cross_entropy, optimizer, batch)
    assert_same(everything(model, optimizer), before)


def test_state_on_the_host_is_refused(recorded: None):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["step"] = 1  # type: ignore[index]
    with pytest.raises(ValueError, match="must keep its state on cpu; SGD has 'step' on the host"):
        graph_step(model, F.cross_entropy, optimizer, batches(1)[0])


@pytest.mark.parametrize("fake", [False, True], ids=["uncaptured", "replayed"])
def test_a_cumulative_average_is_refused_in_training_only(fake: bool, request: pytest.FixtureRequest):
    if fake:
        request.getfixturevalue("recorded")
    model, (batch,) = network(), batches(1)
    model[1].momentum = None  # type: ignore[index,union-attr]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match="a BatchNorm in training must have a momentum; got BatchNorm2d"):
        graph_step(model, F.cross_entropy, optimizer, batch)
    model[1].eval()  # type: ignore[index,union-attr]
    step = graph_step(model, F.cross_entropy, optimizer, batch)
    step(*batch)
    model[1].train()  # type: ignore[index,union-attr]
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="must have a momentum"):
        step(*batch)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": print}, TypeError, "model must be a torch.nn.Module; got builtin_function_or_method"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a torch.optim.Optimizer; got float"),
        ({"example": torch.zeros(2)}, TypeError, "example must be a tuple of two tensors"),
        ({"example": (torch.zeros(2), 3)}, TypeError, "example must be a tuple of two tensors"),
        (
            {"example": (torch.zeros(2, device="meta"), torch.zeros(2))},
            ValueError,
            "example's labels must be on .* meta",
        ),
        ({"autocast_dtype": torch.float16}, ValueError, "float16 needs a GradScaler"),
        ({"warmup": 0}, ValueError, "warmup must be a positive integer; got 0"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], error: type[Exception], match: str):
    model = network()
    arguments = {"model": model, "optimizer": OPTIMIZERS["sgd"](model.parameters()), "example": batches(1)[0]}
    with pytest.raises(error, match=match):
        graph_step(**{"loss_fn": F.cross_entropy, **arguments, **change})


def test_a_closure_and_a_loss_per_image_are_refused():
    model, (batch,) = network(), batches(1)
    with pytest.raises(ValueError, match="optimizer must step without a closure; got LBFGS"):
        graph_step(model, F.cross_entropy, torch.optim.LBFGS(model.parameters()), batch)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = graph_step(model, lambda out, labels: F.cross_entropy(out, labels, reduction="none"), optimizer, batch)
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar tensor; got shape \(6,\)"):
        step(*batch)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_on_the_device_a_replay_is_the_plain_step(
    monkeypatch: pytest.MonkeyPatch, make: Make, autocast_dtype: torch.dtype | None
):
    monkeypatch.setitem(globals(), "CAPTURABLE", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = torch.device("cuda", torch.cuda.current_device())
    model = network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = make(model.parameters()), make(twin.parameters())
    data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches(5, device)]
    before = {"cuda": torch.cuda.get_rng_state(device), **everything(model, optimizer)}
    step = graph_step(model, F.cross_entropy, optimizer, data[0], autocast_dtype=autocast_dtype)
    assert (step.captured, step.reason) == (True, "")
    assert_same({"cuda": torch.cuda.get_rng_state(device), **everything(model, optimizer)}, before)
    # cuDNN may sum weight gradients in another order; Adam's first steps make lr of the smallest of gradients.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if autocast_dtype is None else {"rtol": 3e-2, "atol": 3e-2}
    for index, (images, labels) in enumerate(data):
        if index == 3:
            for group in (*optimizer.param_groups, *twin_optimizer.param_groups):
                group["lr"] *= 0.5
        twin_optimizer.zero_grad()
        with torch.autocast("cuda", autocast_dtype, enabled=autocast_dtype is not None):
            expected = F.cross_entropy(twin(images), labels)
        expected.backward()
        twin_optimizer.step()
        torch.testing.assert_close(step(images, labels), expected.detach(), **tolerance)
    assert_same(everything(model, optimizer), everything(twin, twin_optimizer), **tolerance)
    assert step.captures == 2


@pytest.mark.gpu
def test_on_the_device_dropout_draws_anew_at_every_replay():
    device = torch.device("cuda", torch.cuda.current_device())
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).to(device)
    anchor = nn.Parameter(torch.zeros((), device=device))
    batch = (torch.ones(6, 3, 8, 8, device=device), torch.zeros((), device=device))
    step = graph_step(model, lambda out, _: out.mean() + anchor, torch.optim.SGD([anchor], lr=0.0), batch)
    assert len({step(*batch).item() for _ in range(4)}) > 1


@pytest.mark.gpu
def test_on_the_device_a_synchronising_step_fails_and_leaves_no_trace():
    device = torch.device("cuda", torch.cuda.current_device())
    model = network().to(device)
    optimizer = OPTIMIZERS["nesterov"](model.parameters())
    batch = batches(1, device)[0]
    before, stream = everything(model, optimizer), torch.cuda.current_stream(device)

    def loss_fn(out: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(out, labels) * (2.0 if out.sum().item() > 0 else 1.0)

    with pytest.raises(RuntimeError, match="the capture of graph_step failed"):
        graph_step(model, loss_fn, optimizer, batch)
    assert torch.cuda.current_stream(device) == stream
    assert_same(everything(model, optimizer), before)


@pytest.mark.gpu
def test_on_the_device_a_tensor_learning_rate_needs_no_new_graph():
    device = torch.device("cuda", torch.cuda.current_device())
    model = network().to(device)
    rate = torch.tensor(0.1, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=True)
    batch = batches(1, device)[0]
    step = graph_step(model, F.cross_entropy, optimizer, batch)
    step(*batch)
    rate.zero_()
    weights = copy.deepcopy(list(model.parameters()))
    step(*batch)
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert step.captures == 1
