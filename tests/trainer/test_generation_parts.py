"""Parts of the training of students that write: the server's own prompts, rows that fall away, losses, recipes, comparisons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from server.config import RuntimeConfig
from server.core import Call, FinishReason, Message, Work
from server.errors import InvalidArgument
from server.quality.model import QualityModel
from server.quality.scorer import score
from server.routing.candidates import Brief, Signals
from server.routing.local_model import GeneratorCandidate
from server.routing.pace import Paces
from server.routing.prompting import messages_of
from server.routing.skills import Skill
from server.runtime.decoder.load import read_text_parts
from server.runtime.loader import make_loader
from server.runtime.observer import NullObserver
from server.runtime.repository import Repository
from server.runtime.runtime import Runtime
from server.settings import SkillConfig
from tests.trainer.generation_bases import BASE, add_base, write_base
from trainer.curate.rows import Row
from trainer.generation import proof
from trainer.generation.material import LONG_ANSWER, REFUSED, TOO_LONG, gather
from trainer.generation.odds import Odds, OddsReader
from trainer.generation.prompts import Prompts, work_of
from trainer.generation.proof import mcnemar, same, token_f1
from trainer.generation.recipe import METHODS, MIN_PREFERENCES, methods, preference_of, recipe_for
from trainer.generation.served import Said, observed_rows

torch = pytest.importorskip("torch")
SKILL = Skill("kind", "text-generation", instruction="Which kind?", examples=(("is my card", "card"),), student_model=BASE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a template, and one without."""
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "with")
    write_base(folder / "without", template="")
    add_base(folder / "models", folder / "with")
    add_base(folder / "models", folder / "without", "bare")
    return folder / "models"


def row(text: str, answer: str = "", **fields: object) -> Row:
    return Row(text[:40] or "id", text, "", False, answer=answer, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [BASE, "bare"])
async def test_training_sees_the_tokens_that_the_server_runs(models: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Repository(models).open(base)
    prompts = Prompts(SKILL, files)
    one = row("where is my card", messages=(("user", "where is my card"), ("assistant", "a card?"), ("user", "you are helpful")))
    two = row("the weather is a user <|im_end|>")
    runtime = Runtime(Repository(models), make_loader(RuntimeConfig(), NullObserver()))
    await runtime.load(base)
    seen: list[list[int]] = []
    with runtime.use_generator(base) as model:
        submit = model._parts.engine.submit

        def listen(job: object) -> object:
            seen.append(list(job.prompt))  # type: ignore[attr-defined]
            return submit(job)  # type: ignore[arg-type]

        monkeypatch.setattr(model._parts.engine, "submit", listen)
        candidate = GeneratorCandidate(base, runtime, Brief(SKILL), Paces())
        for asked in (one, two):
            work = work_of(asked)
            request = candidate._request(model, messages_of(Brief(SKILL), work), None)
            generation = await model.generate(request, Call("test"))
            generation.cancel()
    await runtime.close(drain=False)
    assert seen == [prompts.prompt(one), prompts.prompt(two)]
    assert prompts.chats == (base == BASE)


def test_an_answer_is_its_tokens_and_the_end_of_the_turn(models: Path) -> None:
    files = Repository(models).open(BASE)
    prompts = Prompts(SKILL, files)
    _, tokenizer = read_text_parts(files)
    ids = prompts.answer(' {"kind": "card"}\n')
    assert ids[-1] == tokenizer.inner.token_to_id("<|im_end|>")
    assert prompts.read(ids) == ' {"kind": "card"}\n'


def test_a_pair_of_the_lake_is_a_pair_again() -> None:
    assert work_of(row('{"text": "who", "text_pair": "me"}')) == Work("who", "me")
    assert work_of(row('{"text": "who"}')) == Work('{"text": "who"}')
    assert work_of(row("x", messages=(("user", "hello"),))) == Work(messages=(Message("user", "hello"),))


def test_what_does_not_fit_falls_away_with_its_reason(models: Path) -> None:
    prompts = Prompts(SKILL, Repository(models).open(BASE))
    rows = [
        row("is my card", "card"),
        row("long answer", "card " * 40),
        row("a the " * 200, "card"),
        row("role", "card", messages=(("nobody", "hello"),)),
        Row("held", "held", "", True, answer="card", rejected="rain"),
        row("liked", "card", thumb="up"),
        row("corrected", "card", rejected="rain"),
        row("put down", "", rejected="rain", thumb="down"),
    ]
    found = gather(rows, prompts, 24)
    assert found.dropped[LONG_ANSWER] == 1
    assert found.dropped[TOO_LONG] == 1
    assert found.dropped[REFUSED] == 1
    assert [one.row.interaction_id for one in found.held_out] == ["held"]
    assert len(found.pairs) == 1
    assert [(one.good, prompts.read(one.answer)) for one in found.opinions] == [(True, "card"), (False, "rain")]
    assert all(len(one.prompt) + len(one.answer) <= 192 for one in found.train + found.watched)
    # Positions of a prefix are no longer there for words.
    assert gather(rows[:1], prompts, 24, reserve=170).dropped == {TOO_LONG: 1}


def test_the_loss_is_of_the_answers_tokens_alone_and_by_weight() -> None:
    from trainer.generation.batches import Collate
    from trainer.generation.losses import IGNORED, answer_loss
    from trainer.generation.material import Example

    rows = [Example(row("a"), [5, 6, 7], [8, 2]), Example(row("b"), [5], [9, 9, 2], weight=3.0)]
    batch = Collate()(rows)
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 8, 2], [IGNORED, 9, 9, 2, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]
    logits = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:].clamp(min=0), reduction="none")
    wanted = (losses[0, 2:].sum() + 3 * losses[1, :3].sum()) / (2 + 9)
    assert float(answer_loss(logits, batch)) == pytest.approx(float(wanted), rel=1e-5)
    moved = logits.clone()
    moved[0, :2] += 7 * torch.randn(2, 12)  # what prompts say is not learnt
    assert float(answer_loss(moved, batch)) == pytest.approx(float(wanted), rel=1e-5)


def test_a_teachers_odds_are_a_distance_that_ends_at_agreement() -> None:
    from trainer.generation.losses import align, divergences

    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    own = torch.log_softmax(logits, -1)
    values, ids = own.topk(4)
    assert float(divergences(logits, ids, values).mean()) == pytest.approx(0.0, abs=1e-5)
    other = torch.log_softmax(torch.randn(6, 20, generator=torch.Generator().manual_seed(3)), -1)
    values, ids = other.topk(20)
    exact = float((other.exp() * (other - own)).sum(1).mean())
    assert float(divergences(logits, ids, values).mean()) == pytest.approx(exact, rel=1e-3)
    values, ids = other.topk(4)
    assert 0 < float(divergences(logits, ids, values).mean()) <= exact
    student = logits.clone().requires_grad_(True)
    step = torch.optim.Adam([student], lr=0.1)
    for _ in range(200):
        step.zero_grad()
        divergences(student, ids, values).mean().backward()
        step.step()
    assert float(divergences(student.detach(), ids, values).mean()) < 0.02
    found, odds = align([{"a": -0.1, "zz": -3.0}, {"b": -0.5}], {"a": 4, "b": 5}, 2)
    assert found.tolist() == [[4, -1], [5, -1]]
    assert np.isfinite(odds).all()


def told(*places: tuple[str, dict[str, float]]) -> str:
    """What the lake keeps of a teacher's tokens: each with the likeliest at its place."""
    return json.dumps([[text, table[text], list(table.items())] for text, table in places])


def test_a_teachers_odds_stand_at_the_tokens_that_both_cut_alike(models: Path) -> None:
    prompts = Prompts(SKILL, Repository(models).open(BASE))
    answer = prompts.answer("card")
    pieces = prompts.pieces(answer)
    assert "".join(pieces) == "card" and len(pieces) == len(answer) - 1, "the last token ends the answer"
    known = prompts.vocabulary()
    assert [known[piece] for piece in pieces] == answer[:-1]
    reader = OddsReader(prompts)
    tables = [(piece, {piece: -0.25, "no token of this base": -1.75}) for piece in pieces]
    odds = reader.of(told(*tables), answer)
    assert odds is not None and odds.ids.tolist() == [[known[piece], -1] for piece in pieces]
    assert np.allclose(odds.logprobs[:, 0], -0.25)
    for other in (
        "",
        "no JSON",
        "[1]",
        "{}",
        "[[]]",
        "[" * 9000,
        json.dumps([["card", "x", []]]),
        json.dumps([["card", -1, {}]]),
        json.dumps([["card", 1.0, []]]),
    ):
        assert reader.of(other, answer) is None
    assert reader.of(told(("c", {"c": -0.1}), ("ard", {"ard": -0.1})), answer) is None, "another tokenizer's cut"
    assert reader.of(told(*tables, ("s", {"s": -0.1})), answer) is None
    found = gather([row("where is it", "card", teacher_tokens=told(*tables))], prompts, 24)
    (one,) = [*found.train, *found.watched]
    assert one.odds is not None and one.odds.ids.shape == (len(pieces), 2)


def test_the_loss_of_a_token_is_partly_the_distance_to_the_teachers_odds() -> None:
    from trainer.generation.batches import Collate
    from trainer.generation.losses import answer_loss, divergences
    from trainer.generation.material import Example

    ids, logprobs = np.array([[8, 4], [9, -1]]), np.log(np.array([[0.6, 0.4], [0.9, 1.0]], np.float32))
    with_odds = Example(row("a"), [5, 6], [8, 9, 2], odds=Odds(ids, logprobs))
    batch = Collate()([with_odds, Example(row("b"), [5], [7, 2])])
    assert batch["told"].tolist() == [[False, False, True, True, False], [False] * 5]
    logits = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:].clamp(min=0), reduction="none")
    apart = divergences(logits[0, 1:3], torch.from_numpy(ids), torch.from_numpy(logprobs))
    for distil in (0.0, 0.5, 1.0):
        mixed = ((1 - distil) * plain[0, 1:3] + distil * apart).sum() + plain[0, 3] + plain[1, :2].sum()
        assert float(answer_loss(logits, batch, distil)) == pytest.approx(float(mixed / 5), rel=1e-5)


def test_methods_and_recipes_follow_what_is_asked() -> None:
    assert methods("auto", {}) == ("lora", "full")
    assert methods("auto", {"method": "prefix"}) == ("prefix",)
    with pytest.raises(InvalidArgument, match="lora, full, prefix, prompt"):
        methods("auto", {"method": "qlora"})
    with pytest.raises(InvalidArgument, match="expected auto"):
        methods("linear-head", {})
    wide, narrow = (recipe_for("lora", hidden, 1000, 16, {}) for hidden in (2048, 64))
    assert wide.rate < narrow.rate
    assert recipe_for("full", 2048, 1000, 16, {}).rate < wide.rate
    assert recipe_for("lora", 64, 100, 16, {}).epochs > recipe_for("lora", 64, 100_000, 16, {}).epochs
    assert recipe_for("lora", 64, 100, 8, {}).rank == 8
    with pytest.raises(InvalidArgument, match="adapter_rank 8"):
        recipe_for("lora", 64, 100, 8, {"rank": 9})
    with pytest.raises(InvalidArgument, match="above 0"):
        recipe_for("lora", 64, 100, 8, {"epochs": -1.0})
    assert {SkillConfig(method=one).method for one in METHODS} == set(METHODS)  # type: ignore[arg-type]


def test_preferences_wait_until_there_are_enough() -> None:
    lora = recipe_for("lora", 64, 100, 8, {})
    few = MIN_PREFERENCES // 5
    assert preference_of(lora, MIN_PREFERENCES, (0, 0)) == "dpo"
    assert preference_of(lora, MIN_PREFERENCES - 1, (0, 0)) == "kto"
    assert preference_of(lora, 0, (MIN_PREFERENCES, few)) == "kto"
    assert preference_of(lora, 0, (MIN_PREFERENCES, few - 1)) == ""
    assert preference_of(lora, few - 1, (0, few)) == ""
    assert preference_of(recipe_for("prefix", 64, 100, 8, {}), 1000, (0, 0)) == ""


def test_answers_are_compared_by_what_they_say() -> None:
    assert same('{"a": 1, "b": "x"}', '{"b":"x","a":1.0}')
    assert not same('{"a": 1}', '{"a": 2}')
    assert not same("", '{"a": 2}')
    assert token_f1("the red cat", "the red dog") == pytest.approx(2 / 3)
    first, second = np.array([True] * 9 + [False]), np.array([True] * 2 + [False] * 7 + [True])
    assert mcnemar(first, second) == {"only_first": 7.0, "only_second": 1.0, "p": pytest.approx(0.0703125)}
    assert mcnemar(first, first)["p"] == 1.0


def _said(count: int, right: int) -> tuple[list[Row], list[Said], np.ndarray]:
    """Answers of which the first `right` are right and sure of themselves."""
    rows = [row(f"where is card {i}") for i in range(count)]
    sure, unsure = (
        Signals(np.full(6, one, np.float32), np.full(6, -one, np.float32), np.full(6, 2.0, np.float32)) for one in (-0.01, -2.0)
    )
    said = [Said('{"kind": "card"}', FinishReason.STOP, True, "", sure if i < right else unsure) for i in range(count)]
    return rows, said, np.arange(count) < right


@pytest.mark.parametrize(("right", "share"), [(100, 1.0), (0, 0.0), (60, 0.6)])
def test_a_student_delivers_what_it_is_likely_to_have_right(right: int, share: float) -> None:
    rows, said, good = _said(100, right)
    judged = proof.judge(SKILL, rows, said, good)
    assert judged.share == pytest.approx(share, abs=0.12)
    assert judged.delivered >= 0.8 or not share
    assert judged.model.calibrated
    again = QualityModel.from_json(judged.model.to_json())
    qualities = [score(again, one).value or 0.0 for one in observed_rows(SKILL, rows, said)]
    assert np.mean(np.array(qualities) >= SKILL.deliver_bar) == pytest.approx(share, abs=0.12)


def test_verdicts_hold_a_student_against_the_bar_and_against_the_present_one() -> None:
    def marks(good: np.ndarray) -> proof.Marks:
        return proof.Marks(good, good, good.astype(np.float32), None)

    rows, said, good = _said(100, 60)
    judged = proof.judge(SKILL, rows, said, good)
    assert proof.verdict(SKILL, judged, marks(good), None) == ""
    assert proof.verdict(SKILL, judged, marks(good), marks(np.arange(100) < 50)) == ""
    assert "61.00% of the present" in proof.verdict(SKILL, judged, marks(good), marks(np.arange(100) < 61))
    bad = proof.judge(SKILL, *_said(100, 0))
    assert "reach the bar 0.8" in proof.verdict(SKILL, bad, marks(np.zeros(100, bool)), None)
    loose = replace(judged, share=0.9, delivered=0.6)
    assert "only 60.0% are acceptable" in proof.verdict(SKILL, loose, marks(good), None)


def test_answers_are_marked_row_by_row() -> None:
    skill = replace(SKILL, json_schema='{"type": "object", "required": ["kind"]}')
    said = [Said('{"kind": "card"}'), Said('{"kind":"card"}'), Said('{"sort": 1}'), Said(error="UNAVAILABLE")]
    found = proof.mark(skill, said, ['{"kind": "card"}'] * 4)
    assert found.exact.tolist() == [True, False, False, False]
    assert found.acceptable.tolist() == [True, True, False, False]
    assert found.valid is not None
    assert found.valid.tolist() == [True, True, False, False]
    assert found.metrics()["failed"] == 0.25
