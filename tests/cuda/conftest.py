"""Where the CUDA kernels can be tested: on the CPU through host_execution, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fused_resnet.ops.backends.cuda import launch as cuda_launch
from fused_resnet.ops.route import reasons, routes
from fused_resnet.ops.route.choose import use_backend
from tests import cpp
from tests.cuda.on_host import Host
from tests.cuda.on_host import host as load_host


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """The ``cuda`` backend on CPU tensors: every op inside ``use_backend("cuda")`` runs its kernels there."""
    if cpp.compiler() is None:
        pytest.skip("no C++ compiler")
    machine = load_host()
    machine.reset()
    monkeypatch.setattr(cuda_launch, "extension", machine.module)
    monkeypatch.setattr(cuda_launch, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(routes, "kept", {})
    reasons.unavailable.cache_clear()
    yield machine
    machine.reset()
    monkeypatch.undo()
    reasons.unavailable.cache_clear()


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device whose tensors the ``cuda`` backend takes, which is asked for. New memory is filled with NaN: what a
    kernel forgets to write is seen."""
    if request.param == "host":
        request.getfixturevalue("host")
    elif reasons.unavailable("cuda"):
        pytest.skip("; ".join(reasons.unavailable("cuda")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with use_backend("cuda"):
        yield torch.device("cpu" if request.param == "host" else "cuda")
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
