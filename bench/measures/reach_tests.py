"""Bars of the ways in that ask for behaviour: each is measured by the tests that hold it, against real processes."""

from __future__ import annotations

import subprocess
from typing import Any

from bench.harness import ROOT, Row, part, row_of, tests_pass

SDKS = (
    "the official OpenAI SDKs' chat, stream, tools, structured output, embeddings and models calls work unchanged for local models and for "
    "routed skills; LiteLLM and LangChain clients too"
)
CONFORMANCE = "schemathesis over all REST operations: no 5xx, no undocumented status; `buf lint` and `buf breaking` clean"
CLIENTS = "Python, Go, TypeScript, Java and Rust green against one server process"
CONSOLE = "every page's main action done in a real browser by a test; first paint < 1 s, bundle < 300 kB gzipped; no serious finding of axe"
SECURITY = "1,000 hostile HTTP requests are each refused cleanly, the process alive; no endpoint without its role (a test walks them all)"
MOST_BUNDLE_KB = 300


def sdks() -> Row:
    """The official SDKs for Python and Node, LiteLLM and LangChain."""
    return row_of("sdks", SDKS, [tests_pass("SDKs against the gateway", "tests/gateway/openai_clients")])


def conformance() -> Row:
    """The document, schemathesis, and buf."""
    document = tests_pass("the document is current and true of every operation", "tests/gateway/test_openapi_document.py")
    fuzzed = tests_pass("examples and schemathesis over every operation", "tests/gateway/test_openapi_conformance.py")
    return row_of(
        "conformance", CONFORMANCE, [document, fuzzed, _made("buf lint and the other linters", "lint"), _made("buf breaking", "breaking")]
    )


def clients() -> Row:
    """Each client's own test runner, and the Python client's tests."""
    return row_of("clients", CLIENTS, [tests_pass("five languages", "tests/clients")])


def console() -> Row:
    """Pages in Chromium, axe, the bundle."""
    from tests.console.console_browser import bundle_bytes

    kilobytes = round(sum(bundle_bytes().values()) / 1e3, 1)
    return row_of(
        "console",
        CONSOLE,
        [
            tests_pass("each page's main action", "tests/console/test_console_pages.py"),
            tests_pass("axe in both themes, keyboard, 360 px", "tests/console/test_console_access.py"),
            tests_pass("first paint within a second, median of 5 loads", "tests/console/test_console_speed.py"),
            part("bundle, kB gzipped", f"< {MOST_BUNDLE_KB}", kilobytes, kilobytes < MOST_BUNDLE_KB),
        ],
    )


def security() -> Row:
    """What strangers send, and what each role may call."""
    return row_of(
        "security",
        SECURITY,
        [
            tests_pass("1,000 hostile requests", "tests/gateway/test_gateway_hostile.py"),
            tests_pass("every method, without a key and with one of each role", "tests/api", "-k", "auth"),
        ],
    )


def _made(name: str, target: str) -> dict[str, Any]:
    done = subprocess.run(["make", target], cwd=ROOT, capture_output=True, text=True)
    return part(
        name,
        "exit 0",
        done.returncode,
        done.returncode == 0,
        problems=[] if not done.returncode else [done.stdout[-800:] + done.stderr[-800:]],
    )
