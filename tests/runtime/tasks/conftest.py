from __future__ import annotations

import pytest

from server.core import Task
from tests.runtime.tasks.models import Reference, reference


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("embedder"), Task.FEATURE_EXTRACTION, [])


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("classifier"), Task.TEXT_CLASSIFICATION, ["north", "south", "east"])


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("tagger"), Task.TOKEN_CLASSIFICATION, ["O", "B-name", "I-name", "place"])


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("reader"), Task.QUESTION_ANSWERING, [])


@pytest.fixture(scope="session")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("ranker"), Task.TEXT_RANKING, ["relevance"])
