"""What every test stands on: a fixed seed, a reason where there is no GPU, and an importable torchvision."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fused_resnet.bench.suite.torchvision_ops import missing_torchvision_ops
from fused_resnet.ops.route import routes
from tests import build_cache

SECONDS_PER_TEST = 300
# What shares a fixture that takes long: one worker of pytest-xdist runs each of these. Marks of xdist_group do nothing
# with pytest-xdist 3.8 and pytest 9.2: the first writes them into a name that the second does not read.
TOGETHER = ("tests/package/", "tests/modules/test_synchronize.py", "tests/ops/test_synchronize.py")
NO_PLANS = tempfile.mkdtemp(prefix="fused_resnet_tests_")
os.environ["FUSED_RESNET_CACHE_DIR"] = NO_PLANS  # not the plan that somebody measured on this machine
atexit.register(shutil.rmtree, NO_PLANS, ignore_errors=True)

missing_torchvision_ops()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # pytest-xdist has a worker on every core: more threads only wait for each other
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    else:
        build_cache.prune()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)

    return Scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if config.pluginmanager.hasplugin("timeout") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SECONDS_PER_TEST))


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers for every test, and no route that an earlier one, which had replaced a function, has kept; the
    tests' activations are small, and run as large ones do."""
    torch.manual_seed(0)
    monkeypatch.setattr(routes, "FEWEST_ELEMENTS", 0)
    routes.kept.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On images this small, threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
