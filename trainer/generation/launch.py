"""A training job over several processes: `accelerate launch --config_file trainer/accelerate/fsdp.yaml -m trainer.generation.launch SKILL`.

Every process reads the same rows and trains its share of each batch; the first one keeps the job in the registry, exports, proves and
publishes. The folder names the job: started again with the same one, it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from server.config import load_config
from server.errors import SkillNotFound, UnderstudyError, near_names
from trainer.context import JobContext

_JOB = "job.json"
_LONG_S = 600.0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: published; 1: trained and not published, or an error, which is told."""
    parser = argparse.ArgumentParser(prog="trainer.generation.launch", description=__doc__)
    parser.add_argument("skill")
    parser.add_argument("--config", default=None, help="understudy.toml; without, as the server finds it")
    parser.add_argument("--folder", type=Path, default=None, help="of the job; without, training.path/launch-SKILL")
    parser.add_argument("--spec", default="{}", help='JSON, such as {"method": "lora", "batch": 64}; see docs/training_generation.md')
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        return _run(options)
    except UnderstudyError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    from server.registry.registry import Registry
    from trainer.generation.run import train

    config = load_config(options.config)
    settings = config.skills.get(options.skill)
    if settings is None:
        raise SkillNotFound(f"There is no skill {options.skill!r}; {near_names(options.skill, list(config.skills))}", skill=options.skill)
    main_process = int(os.environ.get("RANK", "0")) == 0
    folder = options.folder or Path(config.training.path) / f"launch-{options.skill}"
    registry = Registry(config.registry)
    job = _job(registry, folder, options.skill) if main_process else _wait_for_job(folder)
    context = JobContext(
        job,
        folder / "work",
        deadline=time.monotonic() + settings.train_budget_s,
        checkpoint_s=config.training.checkpoint_s,
        log=logging.getLogger(__name__).info,
        metric=(lambda name, step, value: logging.getLogger(__name__).info("%s %d %.6g", name, step, value)) if main_process else _quiet,
    )
    spec: dict[str, Any] = {"seed": 0, **json.loads(options.spec)}
    state, plain, text = "failed", {}, ""
    try:
        report = train(config, options.skill, context, spec)
        state, plain = report.state, report.to_json()
    except UnderstudyError as error:
        text = error.message
        raise
    finally:
        if main_process:
            registry.end_job(job, state, report=plain, error=text)
            (folder / _JOB).unlink(missing_ok=True)
        registry.close()
    if main_process:
        print(json.dumps(plain))
    return 0 if state == "succeeded" or not main_process else 1


def _job(registry: Any, folder: Path, skill: str) -> str:
    """The job of an earlier attempt whose folder this is, else a new one."""
    path = folder / _JOB
    folder.mkdir(parents=True, exist_ok=True)
    job = str(json.loads(path.read_text())["job"]) if path.is_file() else registry.start_job(skill, "train")
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"job": job, "launch": _launch()}))
    part.replace(path)
    return job


def _wait_for_job(folder: Path) -> str:
    """What the first process wrote down for this very launch."""
    end = time.monotonic() + _LONG_S
    while time.monotonic() < end:
        try:
            found = json.loads((folder / _JOB).read_text())
            if found["launch"] == _launch():
                return str(found["job"])
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"the first process did not begin a job in {folder} within {_LONG_S:g} s")


def _launch() -> str:
    """What all processes of one launch on one machine have in common, and no other launch has: the launcher."""
    return f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}:{os.getppid()}"


def _quiet(*_: object) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
