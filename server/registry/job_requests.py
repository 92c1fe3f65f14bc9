"""What may be asked of the trainer: checked where a job is made, so that whoever asks is told at once and not by a failed job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from server.config import Config
from server.errors import FailedPrecondition, InvalidArgument, SkillNotFound, TooLittleData, near_names
from server.registry.jobs import KINDS
from server.settings import SkillConfig

METHODS: tuple[str, ...] = get_args(SkillConfig.model_fields["method"].annotation)
PROVIDERS = ("openai", "local")
KEYS = ("method", "seed", "hub_repo", "provider", "search", "model", "epochs", "max_cost_usd")
MOST_SEED = (1 << 31) - 1
MAX_VALUE = 256  # characters


def checked_spec(config: Config, skill: str, kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a job without what is empty; keys that only one kind of job or method knows are left for it to check.

    Raises:
        SkillNotFound: with near names.
        InvalidArgument: unknown kind or method, a seed out of range; with what is allowed.
        FailedPrecondition: the skill has no base to learn on.
    """
    if skill not in config.skills:
        raise SkillNotFound(
            f"There is no skill {skill[:128]!r} in the configuration; {near_names(skill, list(config.skills))}", skill=skill
        )
    if kind not in KINDS:
        raise InvalidArgument(f"kind is {kind[:64]!r}; expected one of {', '.join(KINDS)}.", field="kind")
    found = {key: value for key, value in spec.items() if value not in ("", None)}
    for key, value in found.items():
        if not isinstance(value, str | int | float | bool):
            raise InvalidArgument(f"{key[:64]} is {type(value).__name__}; expected a text, a number, or true or false.", field=key[:64])
        if isinstance(value, str) and len(value) > MAX_VALUE:
            raise InvalidArgument(f"{key[:64]} has over {MAX_VALUE} characters.", field=key[:64], limit=MAX_VALUE)
    method = found.get("method", "auto")
    if method not in METHODS:
        raise InvalidArgument(f"method is {str(method)[:64]!r}; expected one of {', '.join(METHODS)}.", field="method")
    if method == "auto":
        found.pop("method", None)
    seed = found.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MOST_SEED:
        raise InvalidArgument(f"seed is {str(seed)[:32]!r}; expected a whole number from 0 to {MOST_SEED}.", field="seed")
    settings = config.skills[skill]
    if kind == "train" and not settings.base and not settings.student_model:
        message = f"The skill {skill!r} has no base to learn on. Set skills.{skill}.base to a model of the repository."
        raise FailedPrecondition(message, skill=skill)
    return found


def enough(config: Config, skill: str, rows: int) -> None:
    """Raises TooLittleData where the lake has fewer rows of a skill than it is trained on."""
    minimum = config.skills[skill].min_rows
    if rows < minimum:
        message = f"{skill!r} has {rows} rows with an answer that may be trained on; {minimum} are needed."
        raise TooLittleData(f"{message} Let more traffic pass, or lower min_rows.", count=rows, minimum=minimum, skill=skill)
