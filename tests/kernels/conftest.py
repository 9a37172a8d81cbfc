"""Where the Triton kernels can be tested in this process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

try:
    import triton

    from tests.kernels.compiled import chip, compile_launches  # noqa: F401
except ImportError:  # on a platform that has none
    collect_ignore_glob = ["test_*.py"]


def versions(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def why_no_device() -> str | None:
    """The reason why no kernel can run here, or None."""
    if triton.knobs.runtime.interpret:
        if versions(triton.__version__) < (3, 7) and versions(np.__version__) >= (2, 4):
            return f"the interpreter of triton {triton.__version__} is broken on numpy {np.__version__} (>= 2.4)"
        return None
    if torch.cuda.is_available():
        return None
    return "no CUDA device, and TRITON_INTERPRET=1 was not set before triton was imported"


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device the kernels run on. New memory is filled with NaN: what a kernel forgets to write is seen."""
    if reason := why_no_device():
        pytest.skip(reason)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["tf32"])
def fp32_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """How float32 matrices may be multiplied: TF32, or what the test asks for with an indirect parameter."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before
