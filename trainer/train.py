"""One training job of a skill, whatever its task: rows of the lake go in; where it is better than what serves, a new version comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.config import Config
from server.errors import InvalidArgument, SkillNotFound, near_names
from trainer.context import JobContext
from trainer.report import Report

CLASSIFYING = ("text-classification", "zero-shot-classification")
ENCODING = ("token-classification", "text-ranking", "sentence-similarity", "feature-extraction")
WRITING = ("text-generation", "translation", "summarization", "question-answering", "table-question-answering", "fill-mask")


def train(config: Config, skill: str, context: JobContext, spec: Mapping[str, Any]) -> Report:
    """Trains a student by the method that fits the skill's task, proves it and publishes it.

    `spec` says what this job does otherwise than the skill's settings: "method", "seed", "search", "trials", "hub_repo". The job's row in
    the registry (`context.job`) must be there: versions and data sets refer to it.

    Raises:
        SkillNotFound, FailedPrecondition: no such skill, or something is missing that it needs.
        TooLittleData: with the count and the minimum.
        InvalidArgument: an unknown method or a base that does not fit; says what is allowed.
        Cancelled: somebody cancelled the job.
    """
    settings = config.skills.get(skill)
    if settings is None:
        raise SkillNotFound(f"There is no skill {skill!r} in the configuration; {near_names(skill, list(config.skills))}", skill=skill)
    if settings.task in CLASSIFYING:
        from trainer.classify.run import train as run
    elif settings.task in ENCODING:
        from trainer.encoders.run import train as run
    elif settings.task in WRITING:
        from trainer.generation.run import train as run
    else:
        raise InvalidArgument(f"No student is trained for the task {settings.task!r}; {', '.join(CLASSIFYING + ENCODING + WRITING)} are.")
    return run(config, skill, context, spec)
