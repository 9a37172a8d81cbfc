"""Several processes on this machine as the ranks of one gloo group, and the collectives that each of them called."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVES = {
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "all_reduce": "all_reduce",
    **dict.fromkeys(("all_to_all", "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "scatter"), "other"),
}


def on_ranks(ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns in each of as many new processes; an error in one is an error here.

    Starting them costs seconds: let one function run many cases. It is found by its name in its module, so the module
    must not need what only pytest brings. A rank that waits for one that never comes fails after half a minute.
    """
    multiprocessing.set_forkserver_preload(["fused_resnet", __name__])  # imported once, not by every rank
    mp.start_processes(_run, (ranks, function, str(folder), arguments), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def _run(rank: int, ranks: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=30))
    try:
        torch.save(function(rank, *arguments), f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """A list to which every call of a collective in ``torch.distributed`` adds its kind."""
    calls: list[str] = []

    def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(COLLECTIVES[name])
            return collective(*args, **kwargs)

        return call

    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    for name, collective in originals.items():
        setattr(dist, name, counted(name, collective))
    try:
        yield calls
    finally:
        for name, collective in originals.items():
            setattr(dist, name, collective)
