"""What we do to the process we are in, and it to us: a fork leaves no lock behind, and kill -9 no half of a plan."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from fused_resnet.ops.plan import measured_plan
from tests.ops.step import NEEDS_NATIVE

pytestmark = [NEEDS_NATIVE, pytest.mark.skipif(sys.platform != "linux", reason="limits and forks of Linux")]

FORKS = """
import os, signal, threading, torch
import fused_resnet
torch.set_num_threads(1)
def taken(elements):
    return empty_strided((1, 1, 1, elements), (elements, elements, elements, 1), torch.float32)
from fused_resnet.ops.backends.native.memory import LARGE
from fused_resnet.ops.backends.native.norm import empty_strided
kept = [taken(LARGE // 4 + 16 * i) for i in range(200)]
del kept  # all of which every request looks through while it holds the lock
block = fused_resnet.BasicBlock(16, 16).to(memory_format=torch.channels_last)
x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
def churn():  # whose kernels ask for memory without Python's lock
    while not done.is_set():
        block(x).sum().backward()
done = threading.Event()
threads = [threading.Thread(target=churn, daemon=True) for _ in range(2)]
[thread.start() for thread in threads]
for _ in range(150):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        taken(LARGE // 4)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the child waits for ever"
done.set()
[thread.join() for thread in threads]
print("survived")
"""


def test_a_child_of_a_busy_process_lives():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout.strip() == "survived", done.stderr[-2000:]


DECISIONS = """
import sys
from pathlib import Path
import torch
from fused_resnet.ops.plan import measured_plan
torch.set_num_threads(int(sys.argv[3]))  # a plan is of as many
for i in range(10_000):
    measured_plan.record("thing", (int(sys.argv[1]), i), "fast", {"fast": 1.0}, path=Path(sys.argv[2]))
    print(int(sys.argv[1]), i, flush=True)
"""


def test_what_was_recorded_outlives_kill_9(tmp_path):
    """Of two that write the same plan, one is killed at any time: each decision that either has told is there."""
    plan, told = tmp_path / "plan.json", set()
    for attempt in range(6):
        names = [str(2 * attempt), str(2 * attempt + 1)]
        command = [sys.executable, "-W", "ignore", "-c", DECISIONS]
        writers = [
            subprocess.Popen(
                [*command, name, str(plan), str(torch.get_num_threads())],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in names
        ]
        for writer in writers:
            assert writer.stdout.readline()  # it has begun
        time.sleep(0.03 * attempt)
        for writer in writers:
            writer.kill()
            told |= {tuple(map(int, line.split())) for line in writer.communicate()[0].splitlines() if " " in line}
        known = measured_plan.decisions(path=plan)
        assert {("thing", key) for key in told} <= known.keys()
    assert len(told) > 12
