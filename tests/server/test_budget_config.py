"""The section [budget]: what it takes, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import Config, load_config
from server.errors import InvalidArgument
from server.settings import BudgetConfig, BudgetLimits


def write(folder: Path, text: str) -> Path:
    path = folder / "understudy.toml"
    path.write_text(text)
    return path


def test_limits_are_micro_dollars_rounded_down() -> None:
    assert BudgetLimits(day_usd=1.1, month_usd=0.0000019).micro_usd() == {"day": 1_100_000, "month": 1}
    assert BudgetLimits(day_usd=0).micro_usd() == {"day": 0} and BudgetLimits().micro_usd() == {}
    assert not Config().budget.limited and BudgetConfig(default_key=BudgetLimits(day_usd=0)).limited


def test_names_with_dots_and_dashes_are_reached_by_variables_and_flags(tmp_path: Path) -> None:
    file = write(tmp_path, '[providers.my-vendor]\n[budget]\ntotal = {day_usd = 1}\n[budget.keys]\n"Acme@x.y" = {month_usd = 3}\n')
    environ = {"UNDERSTUDY_BUDGET__PROVIDERS__MY_VENDOR__DAY_USD": "2.5", "UNDERSTUDY_BUDGET__TOTAL__DAY_USD": "4"}
    budget = load_config(file, environ=environ, flags={"budget.keys.Acme@x.y.day_usd": "1"}).budget
    assert budget.providers["my-vendor"].day_usd == 2.5 and budget.total.day_usd == 4
    assert budget.keys["Acme@x.y"] == BudgetLimits(day_usd=1, month_usd=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[budget]\ntime_zone = "Europe/Olso"\n', "budget.time_zone: there is no time zone 'Europe/Olso'"),
        ('[budget]\ntime_zone = "../passwd"\n', "is no time zone's name"),
        ("[budget]\nalert_at = 0.99\n", "alert_at 0.99 is above stop_at 0.95"),
        ("[budget]\ntotal = {day_usd = -1}\n", "budget.total.day_usd"),
        ("[budget]\ntotal = {day_usd = nan}\n", "budget.total.day_usd"),
        ("[budget]\ntotal = {daily_usd = 1}\n", "'day_usd'"),
        ("[providers.openai]\n[budget.providers.openaj]\nday_usd = 1\n", "did you mean 'openai'?"),
        ("[budget.skills.sumarization]\nday_usd = 1\n", "'summarization'"),
        ('[budget]\nwebhook_url_env = "A"\nwebhook_url_file = "b"\n', "not both"),
    ],
)
def test_wrong_budgets_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_config(write(tmp_path, text), environ={})
    assert says in caught.value.message


def test_the_webhooks_address_comes_from_where_it_was_named(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("https://hooks.example/x\n")
    assert BudgetConfig(webhook_url_file=str(tmp_path / "url")).read_webhook_url() == "https://hooks.example/x"
    assert BudgetConfig(webhook_url_env="HOOK").read_webhook_url({"HOOK": "http://h"}) == "http://h"
    assert BudgetConfig().read_webhook_url({}) == ""
    for environ in ({}, {"HOOK": "ftp://secret-place"}):
        with pytest.raises(InvalidArgument) as caught:
            BudgetConfig(webhook_url_env="HOOK").read_webhook_url(environ)
        assert "secret-place" not in caught.value.message
