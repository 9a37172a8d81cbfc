"""All that a training step changes, saved and put back where it was, the optimizer's state included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CreatedState = dict[Any, dict[str, Any]]
"""Entries of ``optimizer.state`` that a step has added, by parameter and name."""


class TrainingState:
    """All that a training step changes, saved; ``restore`` puts it back, every tensor at its address.

    Saved are parameters and buffers, gradients, the optimizer's state and hyperparameters, and torch's default random
    generators of the CPU and of ``device``.
    """

    def __init__(self, modules: list[nn.Module], optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._state = optimizer.state
        self._device = device
        live: list[dict[str, Any]] = [*optimizer.param_groups, *optimizer.state.values()]
        live += [entries for module in modules for entries in (module._parameters, module._buffers)]
        self._entries = [(entries, dict(entries)) for entries in live]
        self._had = set(optimizer.state)
        parameters = parameters_of(modules, optimizer)
        self._gradients = [(parameter, parameter.grad) for parameter in parameters]
        tensors = [value for entries in live for value in entries.values() if isinstance(value, Tensor)]
        tensors += parameters
        tensors += [gradient for _, gradient in self._gradients if gradient is not None]
        unique = {id(tensor): tensor for tensor in tensors}
        self._values = [(tensor, tensor.detach().clone()) for tensor in unique.values()]
        self._generators = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self) -> CreatedState:
        """Puts everything back; any number of times. Returns the optimizer's state that was not there, now removed."""
        created = {key: self._state.pop(key) for key in list(self._state) if key not in self._had}
        owners = {id(entries): key for key, entries in self._state.items()}
        for entries, saved in self._entries:
            new = {name: value for name, value in entries.items() if saved.get(name) is None and value is not None}
            if new and id(entries) in owners:
                created[owners[id(entries)]] = new
            entries.clear()
            entries.update(saved)
        for tensor, value in self._values:
            tensor.copy_(value)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        cpu, cuda = self._generators
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)
        return created


def add_state(optimizer: torch.optim.Optimizer, created: CreatedState) -> None:
    """Puts entries into the optimizer's state where there are none."""
    for key, entries in created.items():
        state = optimizer.state[key]
        state.update({name: value for name, value in entries.items() if state.get(name) is None})


def remove_state(optimizer: torch.optim.Optimizer, created: CreatedState) -> None:
    """Undoes ``add_state``."""
    for key, entries in created.items():
        kept = {name: v for name, v in optimizer.state.pop(key, {}).items() if v is not entries.get(name)}
        if kept:
            optimizer.state[key] = kept


def reset_state(optimizer: torch.optim.Optimizer, created: CreatedState, before: TrainingState) -> None:
    """Makes the created state zeros, once a first step is seen to be the same from zeros as from no state at all.

    It is for SGD and Adam, not for SGD with dampening or NAdam: ValueError there. Leaves everything as ``before``.
    """

    def first_step() -> tuple[CreatedState, list[Tensor]]:
        for parameter in created:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        stepped = [parameter.detach().clone() for parameter in created]
        return before.restore(), stepped

    expected_state, expected = first_step()
    zeroed = [value for entries in created.values() for value in entries.values() if isinstance(value, Tensor)]
    for tensor in zeroed:
        tensor.zero_()
    add_state(optimizer, created)
    state, stepped = first_step()
    pairs = [(state[key][name], value) for key, entries in expected_state.items() for name, value in entries.items()]
    same = all(torch.equal(*pair) for pair in zip(stepped, expected, strict=True))
    if not same or not all(torch.equal(ours, fresh) for ours, fresh in pairs if isinstance(fresh, Tensor)):
        raise ValueError(
            f"optimizer must have its state before the capture: the first step of {type(optimizer).__name__}, as it is "
            "set, differs from one with a state of zeros. Take one step without graph_step first"
        )
    for tensor in zeroed:
        tensor.zero_()


def parameters_of(modules: list[nn.Module], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter of the modules and the optimizer, once."""
    found = [p for module in modules for p in module._parameters.values() if p is not None]
    found += [p for group in optimizer.param_groups for p in group["params"]]
    return list({id(p): p for p in found}.values())
