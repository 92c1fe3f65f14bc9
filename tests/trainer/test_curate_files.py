"""Files for other trainers: read back with the libraries that are to read them; and the commands that write them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.config import load_config
from server.errors import FailedPrecondition, InvalidArgument
from server.lake import table
from server.lake.ids import IdKey
from server.lake.log import Log
from server.lake.schema import FEEDBACK, INTERACTIONS
from server.registry.keys import UserKeys
from server.registry.registry import Registry
from server.routing.skills import Skill
from trainer.curate import __main__ as command
from trainer.curate import files
from trainer.curate.asking import conversation
from trainer.curate.pipeline import curate
from trainer.curate.rows import Row

ROOT = Path(__file__).resolve().parents[2]
WRITER = Skill("reply", task="text-generation", instruction="Answer politely.", examples=(("hello", "Good day."),))
LABELLER = Skill("intent", labels=("card", "transfer"))


def row(number: int, **more: Any) -> Row:
    return Row(f"i{number}", f"question {number}", "", **{"held_out": False, "answer": f"answer {number}", **more})


ROWS = [
    row(1, messages=(("user", "question 1"),)),
    row(2, rejected="rude \u2028 answer", corrected=True, messages=(("user", "question 2"),)),
    row(3, answer="", rejected="worse", thumb="down", messages=(("user", "question 3"),)),
    row(4, held_out=True),
    row(5, messages=(("user", "who"), ("assistant", "me"), ("user", "why"))),
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_each_form_loads_as_a_data_set(tmp_path: Path) -> None:
    from datasets import Dataset

    columns = {
        "openai": {"messages"},
        "sharegpt": {"conversations"},
        "alpaca": {"instruction", "input", "output", "history"},
        "kto": {"prompt", "completion", "label"},
        "dpo": {"prompt", "chosen", "rejected"},
    }
    counts = {"openai": 3, "sharegpt": 3, "alpaca": 3, "kto": 5, "dpo": 1}
    for form, expected in columns.items():
        path = tmp_path / f"{form}.jsonl"
        done = files.write(path, ROWS, WRITER, form)
        found = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
        assert set(found.column_names) == expected and len(found) == counts[form] == done.lines
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_preferences_are_trls_conversational_form(tmp_path: Path) -> None:
    for form in ("kto", "dpo"):
        files.write(tmp_path / form, ROWS, WRITER, form)
        # What trl.data_utils.is_conversational asks for; importing it takes longer than all tests of this file.
        for line in lines(tmp_path / form):
            for name in {"prompt", "completion", "chosen", "rejected"} & set(line):
                assert line[name] and all(set(message) == {"role", "content"} for message in line[name])
    kto = lines(tmp_path / "kto")
    assert [line["label"] for line in kto] == [True, True, False, False, True]
    assert kto[3]["completion"] == [{"role": "assistant", "content": "worse"}]
    (pair,) = lines(tmp_path / "dpo")
    assert pair["chosen"][0]["content"] == "answer 2" and pair["rejected"][0]["content"] == "rude \u2028 answer"
    assert pair["prompt"][-1] == {"role": "user", "content": "question 2"}


def test_a_model_is_told_what_it_will_be_told_when_it_serves(tmp_path: Path) -> None:
    files.write(tmp_path / "chat", ROWS, WRITER, "openai")
    first = lines(tmp_path / "chat")[0]["messages"]
    assert [m["role"] for m in first] == ["system", "user", "assistant", "user", "assistant"]
    assert first[0]["content"] == "Answer politely." and first[2]["content"] == "Good day." and first[-1]["content"] == "answer 1"
    files.write(tmp_path / "labels", [Row("i", "where is it", "card", False, answer="card")], LABELLER, "openai")
    (labels,) = lines(tmp_path / "labels")
    assert "card\ntransfer" in labels["messages"][0]["content"] and labels["messages"][-1]["content"] == "card"
    files.write(tmp_path / "alpaca", ROWS[:1], WRITER, "alpaca")
    (alpaca,) = lines(tmp_path / "alpaca")
    assert alpaca == {
        "instruction": "Answer politely.",
        "input": "question 1",
        "output": "answer 1",
        "history": [["hello", "Good day."]],
    }
    files.write(tmp_path / "sharegpt", ROWS[4:], WRITER, "sharegpt")
    (talk,) = lines(tmp_path / "sharegpt")
    speakers = [turn["from"] for turn in talk["conversations"]]
    assert speakers == ["system", "human", "gpt", "human", "gpt", "human", "gpt"]
    french = Skill("t", task="translation")
    asked = conversation(french, row(6, parameters=(("target_language", "French"),), instruction="Be formal."))
    assert "Be formal." in asked[0].content and "into French" in asked[0].content


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    for problem, form, part, rows in (
        (InvalidArgument, "csv", "train", ROWS),
        (InvalidArgument, "openai", "half", ROWS),
        (FailedPrecondition, "dpo", "train", ROWS[:1]),
        (FailedPrecondition, "openai", "held_out", ROWS[:3]),
    ):
        with pytest.raises(problem):
            files.write(path, rows, WRITER, form, part)
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        files.write(tmp_path / "no" / "such" / "folder", ROWS, WRITER, "openai")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "understudy.toml").write_text(f"""
[lake]
path = {json.dumps(str(tmp_path / "lake"))}
[registry]
url = {json.dumps(f"sqlite:///{tmp_path / 'registry.db'}")}
[providers.vendor]
[skills.reply]
task = "text-generation"
instruction = "Answer politely."
teacher = "vendor/big"
""")
    key = IdKey.open(tmp_path / "lake" / "id.key")
    base = {"skill": "reply", "input_kind": "text", "training_allowed": True, "source_model": "big", "local": False}
    asked, said = Log(tmp_path / "lake" / "log" / INTERACTIONS), Log(tmp_path / "lake" / "log" / FEEDBACK)
    for number in range(60):
        name = key.new()
        answer = f"Write to help{number}@example.com, please."
        record = {"time_ns": 10**18 + number, "interaction_id": name, "input": f"whom do I ask about matter {number}", **base}
        asked.append([{**record, "teacher_text": answer, "output_text": answer}])
        if number % 10 == 0:
            # Late, repeated and out of order: the correction came first, and was sent twice.
            fixed = {"interaction_id": name, "feedback_id": f"f{number}", "correction": f"Ask desk {number}."}
            said.append([{**fixed, "time_ns": 2 * 10**18}, {**fixed, "time_ns": 2 * 10**18}])
            said.append([{"interaction_id": name, "feedback_id": f"g{number}", "time_ns": 10**18, "thumb": "down"}])
    asked.close()
    said.close()
    for name in (INTERACTIONS, FEEDBACK):
        table.convert(tmp_path / "lake", name)
    return tmp_path


def test_the_commands_work_on_a_lake(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(site / "understudy.toml"), "--set", "curation.near_duplicates=1.0"]
    out = site / "dpo.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])}
    run = [sys.executable, "-m", "server.cli", "export", "reply", "--format", "dpo", "--part", "all", "--out", str(out), *options]
    done = subprocess.run(run, cwd=site, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "6 lines of 6 rows of 60 read" in done.stdout, done.stderr
    pairs = lines(out)
    assert {pair["chosen"][0]["content"] for pair in pairs} == {f"Ask desk {n}." for n in range(0, 60, 10)}
    assert all(pair["rejected"][0]["content"] == "Write to <EMAIL_ADDRESS_1>, please." for pair in pairs), "and nobody's address"

    assert command.main(["curate", "reply", *options]) == 0
    shown = capsys.readouterr().out
    assert "60 rows read, 60 kept" in shown and "personal data" in shown and "a person 6" in shown
    assert command.main(["curate", "reply", "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["corrected_rows"] == 6 and report["table_version"] == 0
    assert report["steps"][5]["notes"]["found"]["EMAIL_ADDRESS"] == 60

    assert command.main(["curate", "nobody", *options]) == 1
    assert command.main(["curate", "reply", "--set", "nonsense"]) == 1
    problems = capsys.readouterr().err
    assert "There is no skill 'nobody'" in problems and "has no value" in problems and "Traceback" not in problems


def test_nothing_of_an_erased_user_is_learnt_from(site: Path) -> None:
    config = load_config(site / "understudy.toml", environ={})
    key = IdKey.open(site / "lake" / "id.key")
    log = Log(site / "lake" / "log" / INTERACTIONS)
    for user in ("ada", "bob"):
        record = {"time_ns": 10**18, "interaction_id": key.new(), "skill": "reply", "input_kind": "text", "user_hash": key.pseudonym(user)}
        log.append([{**record, "input": f"{user} asks", "teacher_text": "yes", "training_allowed": True, "source_model": "big"}])
    log.close()
    table.convert(site / "lake", INTERACTIONS)
    registry = Registry(config.registry)
    before = curate(config, "reply", None, registry)
    UserKeys(registry).erase(key.pseudonym("ada"))
    after = curate(config, "reply", None, registry)
    registry.close()
    gone = {row.text for row in before.rows} - {row.text for row in after.rows}
    assert gone == {"ada asks"} and after.read == before.read - 1 and after.fingerprint != before.fingerprint
    assert {row.group for row in after.rows} == {"", key.pseudonym("bob")}
