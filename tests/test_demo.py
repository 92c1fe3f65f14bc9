"""The whole loop, as `make demo` runs it: real server, real trainer process, a teacher over real HTTP."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import demo
from bench.demo import BASE, ROOT, Data, Demo
from server.runtime.pull import pull
from server.runtime.repository import Repository


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the starter model: the checkout's own where it is there."""
    if (ROOT / "models" / BASE).is_dir():
        return ROOT / "models"
    root = tmp_path_factory.mktemp("models")
    pull("starter", Repository(root))
    return root


async def test_the_loop_closes_on_our_own_examples(tmp_path: Path, models: Path) -> None:
    said: list[str] = []
    outcome = await demo.run(Demo(demo.example(), tmp_path, models), said.append)
    before, after, teacher = outcome["before"], outcome["after"], outcome["teacher_alone"]
    assert before["local_share"] == 0 and before["failed"] == after["failed"] == 0
    assert after["local_share"] >= 0.6
    assert after["accuracy"] >= teacher["accuracy"]
    assert after["usd_per_thousand"] < 0.5 * teacher["usd_per_thousand"]
    assert outcome["take_over_s"] < 10, "without a restart"
    assert "SIMULATION" in "\n".join(said)


async def test_the_loop_closes_on_real_requests(tmp_path: Path, models: Path) -> None:
    data = demo.banking77()
    if data is None:
        pytest.skip("Banking77 is not at hand; UNDERSTUDY_SHARED or ../shared would hold data/banking77")
    part = Data("a part of Banking77", data.train[:2500], data.test[::12])
    outcome = await demo.run(Demo(part, tmp_path, models), lambda text: None)
    assert outcome["after"]["local_share"] >= 0.6
    assert outcome["after"]["accuracy"] >= outcome["teacher_alone"]["accuracy"]
