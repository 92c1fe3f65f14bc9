"""`python -m trainer.hosted SKILL --provider NAME`: what a fine-tuning would send and cost, as one line of JSON; it sends nothing."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

# Before NumPy: see trainer/__main__.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: told; 1: it would be refused, and standard error says why."""
    parser = argparse.ArgumentParser(prog="trainer.hosted", description=__doc__)
    parser.add_argument("skill")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--config", help="TOML file, as for the server")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; repeatable")
    options = parser.parse_args(arguments)

    from server.config import load_config
    from server.errors import UnderstudyError
    from server.registry.registry import Registry
    from trainer.context import JobContext
    from trainer.hosted.run import plan

    try:
        config = load_config(options.config, flags=dict(text.partition("=")[::2] for text in options.set))
        spec = {"provider": options.provider, "model": options.model, "epochs": options.epochs}
        registry = Registry(config.registry)
        with tempfile.TemporaryDirectory() as folder:
            made = plan(config, options.skill, JobContext("plan", Path(folder)), spec, datetime.now(UTC), registry)
        registry.close()
    except UnderstudyError as error:
        print(f"understudy finetune: {error.message}", file=sys.stderr)
        return 1
    print(json.dumps({"words": made.in_words(), "model": made.model, "worst_usd": made.estimate.worst_micro_usd / 1e6}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
