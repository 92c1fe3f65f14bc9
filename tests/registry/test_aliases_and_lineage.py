"""Aliases move together, models are written once, and every way of a row into an answer can be walked, both ways."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import pytest

from server.errors import AlreadyExists, InvalidArgument
from server.registry import lineage
from server.registry.registry import CHALLENGER, CHAMPION, SHADOW, Adapter, ModelRecord, Registry
from server.settings import RegistryConfig


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    opened = Registry(RegistryConfig(url=registry_url))
    yield opened
    opened.close()


@pytest.fixture
def skill() -> str:
    return f"skill-{uuid.uuid4().hex[:12]}"


def test_aliases_are_moved_and_taken_away(registry: Registry, skill: str) -> None:
    assert registry.aliases(skill) == {}
    registry.set_alias(skill, CHALLENGER, "2")
    registry.set_aliases(skill, {CHAMPION: "2", CHALLENGER: "", SHADOW: "3"})
    assert registry.aliases(skill) == {CHAMPION: "2", SHADOW: "3"}
    with pytest.raises(InvalidArgument, match="champion, challenger, shadow"):
        registry.set_alias(skill, "best", "2")


def test_a_promotion_has_no_moment_between(registry: Registry, skill: str) -> None:
    """Whoever looks sees one state or the other: champion and shadow always name the same version."""
    done = threading.Event()
    seen: list[dict[str, str]] = []

    def look() -> None:
        while not done.is_set():
            seen.append(registry.aliases(skill))

    registry.set_aliases(skill, {CHAMPION: "0", SHADOW: "0"})
    watching = threading.Thread(target=look)
    watching.start()
    movers = [
        threading.Thread(target=lambda n=n: [registry.set_aliases(skill, {CHAMPION: f"{n}-{i}", SHADOW: f"{n}-{i}"}) for i in range(15)])
        for n in range(2)
    ]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join()
    done.set()
    watching.join()
    assert seen and all(found[CHAMPION] == found[SHADOW] for found in seen)
    assert registry.aliases(skill)[CHAMPION].endswith("-14")


def test_a_row_is_followed_to_what_was_made_of_it_and_back(registry: Registry, skill: str) -> None:
    job = registry.start_job(skill, "train")
    rows = [(f"{skill}-{number}", number % 2 == 1) for number in range(4)]
    dataset = registry.add_dataset(job, 7, "f" * 64, rows, {"read": 9})
    registry.add_adapter(Adapter(skill, "1", "lora", "base@1", "0" * 64, {"accuracy": 0.9}, job))
    encoder = ModelRecord(f"{skill}-encoder", "1", "local", skill, "base@1", "1" * 64, {}, job)
    registry.add_model(encoder)
    registry.set_alias(skill, CHAMPION, "1")
    (found,) = lineage.of_interaction(registry, f"{skill}-1")
    assert (found.skill, found.job, found.dataset, found.held_out) == (skill, job, dataset, True)
    assert (found.versions, found.models, found.aliases) == (("1",), (f"{skill}-encoder@1",), {CHAMPION: "1"})
    (back,) = lineage.of_version(registry, skill, "1")
    assert (back.dataset, back.table_version, back.train_rows, back.held_out_rows) == (dataset, 7, 2, 2)
    assert lineage.interactions_of(registry, back.dataset) == rows and lineage.report_of(registry, dataset) == {"read": 9}
    assert lineage.of_interaction(registry, "nothing") == [] == lineage.of_version(registry, skill, "2")
    with pytest.raises(AlreadyExists):
        registry.add_model(encoder)
    assert registry.models(skill=skill, kind="local") == [encoder] and registry.models(skill=skill, kind="provider") == []
