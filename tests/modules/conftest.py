"""What tests of blocks share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from fused_resnet.modules import whole_block
from fused_resnet.ops.route.routes import BlockRoute


@pytest.fixture
def whole(monkeypatch) -> list[str]:
    """The ``memory`` of every block that has run whole."""
    ran: list[str] = []
    run = whole_block.run

    def counted(route: BlockRoute, *arguments: Any) -> Tensor:
        if route.chain:
            ran.append("efficient" if route.efficient else "default")
        return run(route, *arguments)

    monkeypatch.setattr(whole_block, "run", counted)
    return ran
