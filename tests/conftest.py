"""What every test stands on: a fixed seed, a reason where there is no GPU, and an importable torchvision."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

SECONDS_PER_TEST = 300


def missing_torchvision_ops() -> torch.library.Library | None:
    """Defines the two C++ ops that torchvision's Python code refers to, if torchvision's own library cannot be loaded.

    That is so where its wheel was built for CUDA and torch was not. The ops have no code: what calls them fails, and
    the classification models call neither. They last as long as the library that is returned.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    for path in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(path)
            return None
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    library.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library


TORCHVISION_OPS = missing_torchvision_ops()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # pytest-xdist has a worker on every core: more threads only wait for each other
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_cuda = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if "package" in item.path.parts:
            item.add_marker(pytest.mark.xdist_group("package"))
        if config.pluginmanager.hasplugin("timeout") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SECONDS_PER_TEST))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
