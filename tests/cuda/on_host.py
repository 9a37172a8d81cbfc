"""``fused_resnet._C.cuda`` whose kernels run on the CPU (host_execution), in the place of the built one."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests import cpp
from tests.cuda import host_build

NAME = "_C_on_host"
SOURCES = [
    *sorted((cpp.CSRC / "cuda").glob("*.cu")),
    cpp.CSRC / "bindings" / "cuda.cpp",
    cpp.CSRC / "bindings" / "types.cpp",
    Path(__file__).parent / "host_module.cpp",
]


@dataclass(frozen=True)
class Launch:
    """One launch that passed the runtime's checks."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    stream: int
    cooperative: bool
    device: int


class Host:
    """The machine that the kernels run on, as a test sets it up and asks it afterwards."""

    def __init__(self, module: ModuleType, library: Any) -> None:
        self.module = module
        self.library = library
        self.reset()

    def reset(self) -> None:
        """An H200, and another; errors thrown; an order of threads that is always the same."""
        self.set_device(132, 232448, 233472, 9, 0)
        self.library.host_execution_set_device_count(2)
        self.library.host_execution_throw_errors(1)
        self.skip_launches(False)
        self.set_seed(0)
        self.library.host_execution_clear_launches()

    def set_seed(self, seed: int) -> None:
        """The order in which threads and blocks run follows from this."""
        self.library.host_execution_set_seed(ctypes.c_uint64(seed))

    def set_device(
        self, multiprocessors: int, shared_per_block: int, shared_per_multiprocessor: int, major: int, minor: int
    ) -> None:
        """Of devices that no kernel has asked for yet: properties_of (csrc/cuda/launch.h) remembers its answer."""
        self.library.host_execution_set_device(
            multiprocessors, shared_per_block, shared_per_multiprocessor, major, minor
        )

    def fail_next_launch(self, error: int) -> None:
        """The next launch returns this cudaError_t and runs nothing."""
        self.library.host_execution_fail_next_launch(error)

    def skip_launches(self, skip: bool) -> None:
        """While set, launches are checked and recorded, but nothing runs."""
        self.library.host_execution_skip_launches(int(skip))

    def launches(self) -> list[Launch]:
        """Those since the last call of this."""
        found = []
        values = (ctypes.c_int64 * 10)()
        for index in range(self.library.host_execution_launch_count()):
            self.library.host_execution_launch(ctypes.c_int64(index), values)
            x, y, z, bx, by, bz, shared_bytes, stream, cooperative, device = values
            found.append(Launch((x, y, z), (bx, by, bz), shared_bytes, stream, bool(cooperative), device))
        self.library.host_execution_clear_launches()
        return found


@functools.cache
def host() -> Host:
    """Compiled the first time (half a minute), and loaded."""
    import pybind11

    path = host_build.build(
        SOURCES,
        output=f"{NAME}.so",
        shared=True,
        include=[Path(pybind11.get_include()), Path(sysconfig.get_path("include"))],
        definitions=["FUSED_RESNET_CUDA=1"],
    )
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    library.host_execution_launch_count.restype = ctypes.c_int64
    return Host(module, library)
