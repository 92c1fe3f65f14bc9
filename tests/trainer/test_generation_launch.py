"""Training on several processes: accelerate takes the configurations that come with the project, and one launch shares its job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.registry.registry import Registry
from server.settings import RegistryConfig
from trainer.generation import launch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "trainer" / "accelerate").glob("*.yaml"))
KINDS = {"cpu": "MULTI_CPU", "multi_gpu": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configuration(path: Path) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    found = config_args.load_config_from_file(str(path))  # refuses keys that it does not know
    assert found.distributed_type == KINDS[path.stem]
    assert found.num_processes == 2
    if found.distributed_type == "FSDP":
        assert found.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT", "the best weights are gathered by it"
    if found.distributed_type == "DEEPSPEED":
        assert found.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_every_configuration_is_one_that_the_page_tells_of() -> None:
    page = (ROOT / "docs" / "training_generation.md").read_text()
    assert {path.stem for path in CONFIGS} == set(KINDS)
    assert all(f"`{path.name}`" in page for path in CONFIGS)


def test_processes_of_a_launch_share_a_job_and_a_later_launch_takes_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(RegistryConfig(url=f"sqlite:///{tmp_path / 'registry.db'}"))
    monkeypatch.setenv("MASTER_PORT", "1")
    job = launch._job(registry, tmp_path / "job", "orders")
    assert launch._wait_for_job(tmp_path / "job") == job
    monkeypatch.setenv("MASTER_PORT", "2")
    monkeypatch.setattr(launch, "_LONG_S", 0.0)
    with pytest.raises(TimeoutError, match="did not begin a job"):
        launch._wait_for_job(tmp_path / "job")  # what an earlier launch left is not this one's
    assert launch._job(registry, tmp_path / "job", "orders") == job
    assert [one.id for one in registry.jobs("orders")] == [job]
    registry.close()


def test_what_cannot_be_launched_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "understudy.toml"
    config.write_text(f"[registry]\nurl = {json.dumps(f'sqlite:///{tmp_path}/r.db')}\n")
    assert launch.main(["nobody", "--config", str(config)]) == 1
    assert "SKILL_NOT_FOUND" in capsys.readouterr().err
