"""Bars `faults` and `secrets` of routing: the tests that hold them, run here and counted. Providers are real HTTP servers on loopback."""

from __future__ import annotations

import re
import subprocess
import sys

from bench.harness import ROOT, Row, part, row_of

FAULTS = (
    "provider that refuses, stalls before or between tokens, sends 429/500/529, cuts the stream, sends garbage or zero tokens: the next"
    " candidate's answer or one clear error within the deadline; nothing duplicated, nothing switched after the first token, the circuit"
    " opens and closes again"
)
SECRETS = "no key in any log, row, metric, error or process list"


def faults() -> Row:
    return row_of(
        "faults",
        FAULTS,
        [
            _tests("the whole server, both wire formats", "tests/routing/test_faults_end_to_end.py"),
            _tests("each provider by itself", "tests/providers/test_faults.py"),
            _tests("the cascade's own rules", "tests/routing/test_cascade.py"),
        ],
    )


def secrets() -> Row:
    return row_of(
        "secrets",
        SECRETS,
        [
            _tests("logs, lake, and process list of the whole server", "tests/routing/test_faults_end_to_end.py", "-k", "key"),
            _tests("logs at debug level, errors, reprs and tracebacks of both libraries", "tests/providers/test_secrets.py"),
            _tests("logs, lake and metrics of skills", "tests/routing/test_skill_rpcs.py"),
        ],
    )


def _tests(name: str, *arguments: str) -> dict[str, object]:
    """Runs pytest; met when every test passed and there was one at least."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    met = done.returncode == 0 and counts.get("passed", 0) > 0
    return part(name, "every test passes", counts, met, tests=" ".join(arguments), problems=[] if met else [done.stdout[-1500:]])
