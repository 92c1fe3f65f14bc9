"""Settings: sources, their order, and what a wrong one says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.config import Config, known_keys, load_config
from server.core import Task
from server.errors import InvalidArgument
from server.settings import ProviderConfig

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "understudy.toml"
    path.write_text(text)
    return path


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, "[server]\nport = 1\ngrace_s = 1\nmax_items = 1\n")
    environ = {"UNDERSTUDY_SERVER__PORT": "2", "UNDERSTUDY_SERVER__GRACE_S": "2"}
    config = load_config(file, flags={"server.port": 3}, environ=environ)
    assert (config.server.port, config.server.grace_s, config.server.max_items) == (3, 2.0, 1)
    assert config.server.host == Config().server.host


def test_lists_and_tables_come_from_text_too() -> None:
    environ = {"UNDERSTUDY_MODELS__LOAD": "a, b@2", "UNDERSTUDY_MODELS__DEFAULT": '{"text-ranking": "ranker"}'}
    config = load_config(environ=environ, flags={"runtime.execution_providers": '["X"]'})
    assert config.models.load == ["a", "b@2"]
    assert config.models.default == {Task.TEXT_RANKING: "ranker"}
    assert config.runtime.execution_providers == ["X"]


def test_a_variable_reaches_a_skill_whose_name_it_cannot_spell(tmp_path: Path) -> None:
    file = write(tmp_path, '[skills.support-intent]\nlabels = ["a", "b"]\nbase = "m"\n')
    config = load_config(file, environ={"UNDERSTUDY_SKILLS__SUPPORT_INTENT__DELIVER_BAR": "0.5"})
    assert config.skills["support-intent"].deliver_bar == 0.5


@pytest.mark.parametrize(
    ("text", "field", "place", "says"),
    [
        ("[server]\nprot = 1\n", "server.prot", ":2", "'port'"),
        ("[sever]\nport = 1\n", "sever", ":1", "'server'"),
        ("[server]\nport = 70000\n", "server.port", ":2", "65535"),
        ("[server.tls]\ncert_file = 'x'\n", "server.tls", ":1", "both"),
        ("[providers.p]\nbase_urll = 'x'\n", "providers.p.base_urll", ":2", "'base_url'"),
        ("[skills.s]\nteacher = 'nobody/m'\n", "", "", "'nobody'"),
        ("[skills.s]\nteacher = 'm'\n", "skills.s.teacher", ":2", "provider/model"),
        ("[models]\ndefault = {translating = 'x'}\n", "models.default.translating", ":2", "feature-extraction"),
    ],
)
def test_wrong_settings_are_named_with_their_place(tmp_path: Path, text: str, field: str, place: str, says: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InvalidArgument) as caught:
        load_config(file, environ={})
    assert caught.value.metadata["field"] == field
    assert says in caught.value.message
    if place:
        assert f"{file}{place}" in caught.value.message


def test_wrong_variables_and_flags_are_named() -> None:
    with pytest.raises(InvalidArgument, match=r"UNDERSTUDY_SERVER__PROT.*'port'"):
        load_config("/dev/null", environ={"UNDERSTUDY_SERVER__PROT": "1"})
    with pytest.raises(InvalidArgument, match=r"flag serve\.port.*'server'"):
        load_config("/dev/null", environ={}, flags={"serve.port": 1})


def test_a_file_that_is_named_must_be_there_and_be_toml(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load_config(tmp_path / "absent.toml", environ={})
    with pytest.raises(InvalidArgument, match="is not TOML"):
        load_config(write(tmp_path, "[server"), environ={})


@pytest.mark.parametrize(
    "text",
    [
        "[providers.p]\napi_key = 'sk-secret-value'\n",
        "[providers.p]\nbase_url = 'https://sk-secret-value@host/v1'\n",
        "[registry]\nurl = 'postgresql://me:sk-secret-value@host/db'\n",
    ],
)
def test_secrets_are_refused_and_never_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match="_env") as caught:
        load_config(write(tmp_path, text), environ={})
    assert "sk-secret-value" not in f"{caught.value!r} {caught.value.message} {caught.value.metadata}"


def test_secrets_come_from_their_places(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    assert ProviderConfig(api_key_env="KEY").read_api_key({"KEY": "from-env"}) == "from-env"
    assert ProviderConfig(api_key_file=str(tmp_path / "key")).read_api_key({}) == "from-file"
    assert ProviderConfig().read_api_key({}) == ""
    with pytest.raises(InvalidArgument, match="KEY, which is not set"):
        ProviderConfig(api_key_env="KEY").read_api_key({})


def test_nothing_changes_after_the_start() -> None:
    with pytest.raises(ValidationError):
        Config().server.port = 1  # type: ignore[misc]


def test_the_example_file_is_understood_and_its_defaults_are_the_code_s() -> None:
    file = ROOT / "understudy.example.toml"
    config = load_config(file, environ={})
    example = tomllib.loads(file.read_text())
    defaults = Config()
    for section in ("server", "log", "runtime", "telemetry"):
        for key, value in example[section].items():
            shown = getattr(getattr(config, section), key)
            assert shown == getattr(getattr(defaults, section), key), f"{section}.{key} = {value!r} is not the default"
    assert "server.port" in known_keys() and "skills.*.teacher" in known_keys()
