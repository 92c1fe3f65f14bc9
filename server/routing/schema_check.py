"""Whether an answer matches a skill's JSON Schema. Nothing is fetched: a reference out of the schema is an error of the schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from server.errors import InvalidArgument
from server.routing.prompting import unfenced

MAX_PROBLEM_CHARACTERS = 200


@lru_cache(maxsize=256)
def checker(schema: str) -> Callable[[str], str]:
    """A function that says what is wrong with a text, or "" where it is JSON that matches.

    Raises InvalidArgument for text that is no JSON Schema.
    """
    from jsonschema import exceptions, validators
    from referencing import Registry

    parsed = json.loads(schema)
    kind = validators.validator_for(parsed, default=validators.Draft202012Validator)
    try:
        kind.check_schema(parsed)
    except exceptions.SchemaError as error:
        message = f"json_schema is no JSON Schema: {error.message[:MAX_PROBLEM_CHARACTERS]}. Mend it at /{'/'.join(map(str, error.path))}."
        raise InvalidArgument(message, field="json_schema") from None
    validator: Any = kind(parsed, registry=Registry())

    def problem(text: str) -> str:
        try:
            value = json.loads(unfenced(text))
        except (ValueError, RecursionError):
            return "not JSON"
        try:
            wrong = next(validator.iter_errors(value), None)
        except Exception as error:  # a reference that leads nowhere, an expression that this library does not know
            return f"JSON that cannot be checked ({type(error).__name__})"
        if wrong is None:
            return ""
        # The message may hold the user's text: it goes to the model and to the caller, never into a log.
        return f"JSON that does not match the schema at /{'/'.join(map(str, wrong.absolute_path))} ({wrong.validator})"

    return problem
