"""JSON schemas: as people write them, and as chance does."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def closed(properties: Schema, *, optional: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


TEXT: Schema = {"type": "string"}
WRITTEN: list[Schema] = [
    closed({"intent": {"enum": ["refund", "cancel", "question", "other"]}, "confidence": {"type": "number", "minimum": 0, "maximum": 1}}),
    closed({"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 150}, "email": {"type": "string", "format": "email"}}),
    closed({"street": TEXT, "city": TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"}, "country": {"const": "US"}}),
    closed({"title": {"type": "string", "maxLength": 40}, "tags": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4}}),
    closed({"date": {"type": "string", "format": "date"}, "at": {"type": "string", "format": "time"}, "all_day": {"type": "boolean"}}),
    closed({"id": {"type": "string", "format": "uuid"}, "parent": {"anyOf": [{"type": "string", "format": "uuid"}, {"type": "null"}]}}),
    closed({"steps": {"type": "array", "maxItems": 3, "items": closed({"explanation": TEXT, "output": TEXT})}, "final_answer": TEXT}),
    closed({"name": {"const": "get_weather"}, "arguments": closed({"city": TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}})}),
    {
        "type": "array",
        "items": closed({"text": TEXT, "label": {"enum": ["PER", "ORG", "LOC"]}, "start": {"type": "integer"}}),
        "maxItems": 3,
    },
    {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False, "minItems": 2},
    closed({"total": {"type": "number"}, "currency": {"type": "string", "pattern": "^[A-Z]{3}$"}, "note": TEXT}, optional=("note",)),
    {"type": "object", "properties": {"sku": TEXT, "price": {"type": "number", "exclusiveMinimum": 0}}, "required": ["sku"]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"anyOf": [closed({"ok": {"const": True}, "value": TEXT}), closed({"ok": {"const": False}, "error": TEXT})]},
    {
        "$defs": {"node": closed({"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}})},
        "$ref": "#/$defs/node",
    },
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Person",
        "description": "As pydantic writes it",
        "type": "object",
        "$defs": {"Pet": closed({"kind": {"enum": ["cat", "dog"]}, "name": {"title": "Name", "type": "string"}})},
        "properties": {
            "first": {"title": "First", "type": "string"},
            "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}, "maxItems": 2, "default": []},
            "favourite": {"anyOf": [{"$ref": "#/$defs/Pet"}, {"type": "null"}], "default": None},
        },
        "required": ["first"],
        "additionalProperties": False,
    },
    closed({"summary": {"type": "string", "minLength": 5, "maxLength": 60}, "score": {"type": "integer", "enum": [1, 2, 3, 4, 5]}}),
    closed({"Überschrift": TEXT, 'with "quotes"': {"type": "boolean"}, "日本": {"type": "null"}}),
    {"type": ["string", "integer", "null"]},
    {"enum": ["a", 1, None, True, {"x": [1, "y"]}]},
]


def generated(seed: int) -> Schema:
    """A schema of a few levels that some text fits."""
    return _any(random.Random(seed), 3)


def _any(rng: random.Random, depth: int) -> Schema:
    makers = (
        [_string, _integer, _number, _plain]
        if depth == 0
        else [_string, _integer, _number, _plain, _object, _object, _object, _array, _union]
    )
    return rng.choice(makers)(rng, depth)


def _plain(rng: random.Random, _: int) -> Schema:
    return rng.choice([{"type": "boolean"}, {"type": "null"}, {"const": "x y"}, {"enum": ["red", "green", 3, None]}, {"const": 0}])


def _string(rng: random.Random, _: int) -> Schema:
    least = rng.randint(0, 4)
    kinds: list[Schema] = [
        {},
        {"minLength": least, "maxLength": least + rng.randint(0, 12)},
        {"pattern": rng.choice(["^[a-z]+$", "^(a|bc)*d$", "^\\d{2,4}-\\w$", '^[^\\s"]{1,8}$', "^x?y{0,3}$"])},
        {"format": rng.choice(["date", "time", "date-time", "uuid", "ipv4", "email"])},
        {"maxLength": rng.randint(1, 30)},
    ]
    return {"type": "string", **rng.choice(kinds)}


def _integer(rng: random.Random, _: int) -> Schema:
    least = rng.randint(-1000, 1000)
    kinds: list[Schema] = [{}, {"minimum": least}, {"minimum": least, "maximum": least + rng.randint(0, 5000)}, {"multipleOf": 5}]
    return {"type": "integer", **rng.choice(kinds)}


def _number(rng: random.Random, _: int) -> Schema:
    least = round(rng.uniform(-10, 10), 2)
    kinds: list[Schema] = [{}, {"minimum": least, "maximum": least + 2.5}, {"exclusiveMinimum": least, "maximum": least + 100}]
    return {"type": "number", **rng.choice(kinds)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "a b", "ü", "x-1", "items", "nested", "0"], rng.randint(0, 5))
    made: Schema = {"type": "object", "properties": {name: _any(rng, depth - 1) for name in names}}
    made["required"] = [name for name in names if rng.random() < 0.6]
    if rng.random() < 0.7:
        made["additionalProperties"] = False
    return made


def _array(rng: random.Random, depth: int) -> Schema:
    made: Schema = {"type": "array", "items": _any(rng, depth - 1)}
    if rng.random() < 0.7:
        made["minItems"] = rng.randint(0, 2)
        made["maxItems"] = made["minItems"] + rng.randint(0, 3)
    return made


def _union(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
