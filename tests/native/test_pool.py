"""The threads that operators share: every task once, no data race, the same bits, forks, and no work while there is nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT / "tests" / "native" / "stress_pool.c"), str(ROOT / "native" / "kernels" / "pool.c")]


def run_python(code: str) -> str:
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def stress(program: Path, sanitizer: str, rounds: int, forks: int) -> None:
    flags = ["-std=gnu11", "-O1", "-g", *([f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else [])]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *SOURCES, "-o", str(program), "-lpthread"], check=True)
    done = subprocess.run([str(program), str(rounds), str(forks)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "no finding" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(("sanitizer", "rounds"), [("thread", 3000), ("address,undefined", 5000)])
def test_the_sanitizers_find_nothing_in_the_pool(sanitizer: str, rounds: int, tmp_path: Path) -> None:
    stress(tmp_path / "stress", sanitizer, rounds, forks=0)


def test_every_child_has_a_pool_of_its_own_while_others_use_theirs(tmp_path: Path) -> None:
    """Without sanitizers: their allocator's locks do not survive a fork beside another thread's malloc, glibc's do."""
    stress(tmp_path / "stress", "", rounds=20000, forks=400)


# One prompt and one decode step of an operator large enough to be split.
STEP = """
import numpy as np
from server.runtime import kernels
def step():
    random = np.random.default_rng(1)
    feeds = {"x": random.standard_normal((400, 1152)).astype(np.float32), "row_scale": None, "bias": None}
    return kernels.run_op("GatedAct", feeds, ["y"], {})[0]
alone = step()
kernels.share_threads(3)
assert np.array_equal(step(), alone)
"""


def test_the_pool_changes_no_bit() -> None:
    run_python(STEP)


def test_a_child_that_was_forked_after_a_run_has_a_pool_of_its_own() -> None:
    fork = """
import os
child = os.fork()
if not child:
    os._exit(0 if np.array_equal(step(), alone) else 3)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(step(), alone)
"""
    run_python(STEP + fork)


def test_an_idle_pool_burns_nothing() -> None:
    idle = """
import time
time.sleep(0.02)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    assert float(run_python(STEP + idle)) < 0.01


def test_the_threads_outlive_every_session() -> None:
    """ONNX Runtime closes the library with the last session that uses it; the workers still stand in its code."""
    again = """
import gc
for _ in range(3):
    step()
    gc.collect()
assert np.array_equal(step(), alone)
"""
    run_python(STEP + again)
