"""A lake with interactions of a skill "intent", for tests of training."""

from __future__ import annotations

import random
import time
from pathlib import Path

from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import INTERACTIONS

WORDS = {
    "card": ["card", "lost", "found", "who"],
    "password": ["password", "reset", "how", "i"],
    "transfer": ["money", "transfer", "late", "where"],
}


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    """Different texts with the label that their words tell."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label = rng.choice(sorted(WORDS))
        found[" ".join(rng.choice(WORDS[label]) for _ in range(rng.randint(3, 8))) + " " + rng.choice("abcdefghijklm")] = label
    return list(found.items())


def fill(lake: Path, rows: list[tuple[str, str]], **more: object) -> None:
    """Records the rows as answered by a teacher "big"."""
    key = IdKey.open(lake / "id.key")
    log = Log(table.log_folder(lake, INTERACTIONS))
    base = {"skill": "intent", "input_kind": "text", "training_allowed": True, "source_model": "big", **more}
    for text, label in rows:
        log.append([{"time_ns": time.time_ns(), "interaction_id": key.new(), "input": text, "teacher_label": label, **base}])
    log.close()
    table.convert(lake, INTERACTIONS)
