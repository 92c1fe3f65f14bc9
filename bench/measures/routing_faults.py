"""Bars `faults` and `secrets` of routing: the tests that hold them, run here and counted. Providers are real HTTP servers on loopback."""

from __future__ import annotations

from bench.harness import Row, row_of, tests_pass

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
            tests_pass("the whole server, both wire formats", "tests/routing/test_faults_end_to_end.py"),
            tests_pass("each provider by itself", "tests/providers/test_faults.py"),
            tests_pass("the cascade's own rules", "tests/routing/test_cascade.py"),
        ],
    )


def secrets() -> Row:
    return row_of(
        "secrets",
        SECRETS,
        [
            tests_pass("logs, lake, and process list of the whole server", "tests/routing/test_faults_end_to_end.py", "-k", "key"),
            tests_pass("logs at debug level, errors, reprs and tracebacks of both libraries", "tests/providers/test_secrets.py"),
            tests_pass("logs, lake and metrics of skills", "tests/routing/test_skill_rpcs.py"),
        ],
    )
