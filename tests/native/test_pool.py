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


# ThreadSanitizer does not follow forks of a program with threads.
@pytest.mark.parametrize(("sanitizer", "rounds", "forks"), [("thread", 3000, 0), ("address,undefined", 5000, 40)])
def test_the_sanitizers_find_nothing_in_the_pool(sanitizer: str, rounds: int, forks: int, tmp_path: Path) -> None:
    program = tmp_path / "stress"
    flags = ["-std=gnu11", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, *SOURCES, "-o", str(program), "-lpthread"], check=True)
    done = subprocess.run([str(program), str(rounds), str(forks)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "no finding" in done.stdout, done.stderr[-3000:]


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
