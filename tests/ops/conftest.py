"""One thread, unless a test says otherwise: on cases this small, threads mostly wait for each other."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...
