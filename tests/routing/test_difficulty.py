"""Difficulty: what is learned from labels, how it is kept on the disk, and what answers where nothing was learned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from native.text import FORMS
from server.core import FloatArray
from server.errors import AlreadyExists, InvalidArgument, ManifestInvalid, ModelRejected, TooLittleData
from server.routing.difficulty import DifficultyModel, prior
from server.routing.difficulty_book import DifficultyBook, embed
from server.runtime.adapter_folder import MANIFEST, WEIGHTS, Base
from server.runtime.heads import Features
from server.runtime.runtime import Runtime
from trainer.difficulty import About, Labelled, Settings, apgr, cpt, expected_error, fit, folds_of, near_identical, recovery

SMALL = Settings(bits=12, landmarks=64)
EASY = ["where is the card", "how do i reset the password", "a card is late", "my transfer of money"]
HARD = ["prove the theorem", "integrate the function", "is the group abelian", "bound the error term"]
WIDTH = 8


def labelled(count: int, seed: int = 0) -> list[Labelled]:
    """Every second text is hard: the student mostly fails, and the teacher mostly does not."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        hard = i % 2
        filler = " ".join(rng.choice(["please", "now", "today", "really", "again", "soon"], 4))
        content = f"{(HARD if hard else EASY)[rng.integers(4)]} {filler}"
        rows.append(Labelled(content, float(rng.random() < (0.2 if hard else 0.9)), float(rng.random() < 0.9)))
    return rows


def vectors_of(rows: list[Labelled], seed: int = 1) -> FloatArray:
    """Vectors that tell hard from easy, with noise."""
    hard = np.array([any(row.text.startswith(one) for one in HARD) for row in rows])
    found = np.random.default_rng(seed).standard_normal((len(rows), WIDTH)) * 0.2
    found[:, 0] += hard
    return found.astype(np.float32)


def about(name: str = "intent", version: str = "1", embedder: bool = True) -> About:
    if not embedder:
        return About(name, version)
    return About(name, version, Base(name="embedder", version="1", sha256="0" * 64), Features(pooling="mean", normalize=True, size=WIDTH))


@pytest.fixture(scope="module")
def rows() -> list[Labelled]:
    return labelled(400)


@pytest.fixture(scope="module")
def words(rows: list[Labelled]) -> DifficultyModel:
    return fit(rows, None, about(embedder=False), settings=SMALL)


@pytest.fixture(scope="module")
def both(rows: list[Labelled]) -> DifficultyModel:
    return fit(rows, vectors_of(rows), about(), settings=SMALL)


class TestFit:
    def test_words_alone_learn(self, words: DifficultyModel) -> None:
        fresh = labelled(300, seed=9)
        values, gains = words.scores([row.text for row in fresh])
        weak, strong = (np.array([getattr(row, key) for row in fresh]) for key in ("local_ok", "strong_ok"))
        assert apgr(recovery(gains, weak, strong)) > 0.7
        assert expected_error(values, 1 - weak, bins=5) < 0.1
        assert ((values >= 0) & (values <= 1)).all() and (np.abs(gains) <= 1).all()

    def test_estimates_say_what_they_rest_on(self, both: DifficultyModel, rows: list[Labelled]) -> None:
        easy, hard = both.predict([EASY[0], HARD[0]], vectors_of([Labelled(EASY[0], 1), Labelled(HARD[0], 1)]))
        assert easy.value < 0.4 < 0.6 < hard.value and easy.gain < hard.gain
        assert easy.basis == hard.basis == "learned" and easy.rows == len(rows)

    def test_a_row_without_a_vector_is_answered_by_its_words(self, both: DifficultyModel, rows: list[Labelled]) -> None:
        texts, vectors = [row.text for row in rows[:6]], vectors_of(rows[:6])
        vectors[2] = np.nan
        mixed, whole, alone = both.scores(texts, vectors)[0], both.scores(texts, vectors_of(rows[:6]))[0], both.scores(texts)[0]
        assert mixed[2] == alone[2] and np.isfinite(mixed).all()
        np.testing.assert_allclose(np.delete(mixed, 2), np.delete(whole, 2), rtol=1e-5)
        assert not np.allclose(whole, alone)

    def test_a_text_alone_and_in_a_batch(self, both: DifficultyModel, rows: list[Labelled]) -> None:
        texts, vectors = [row.text for row in rows[:20]], vectors_of(rows[:20])
        batch = both.scores(texts, vectors)
        for i in range(20):
            one = both.scores(texts[i : i + 1], vectors[i : i + 1])
            assert one[0][0] == pytest.approx(batch[0][i], abs=1e-5) and one[1][0] == pytest.approx(batch[1][i], abs=1e-5)

    def test_a_teacher_that_is_the_standard(self, rows: list[Labelled]) -> None:
        model = fit([dataclasses.replace(row, strong_ok=None) for row in rows], None, about(embedder=False), settings=SMALL)
        values, gains = model.scores([EASY[0], HARD[0]])
        np.testing.assert_allclose(values, gains, atol=0.15)  # what the student misses, all of it, is what the teacher adds

    def test_weights(self, rows: list[Labelled]) -> None:
        """Rows of weight 0 say nothing, whatever their labels are."""
        wrong = [Labelled(row.text, 1 - row.local_ok, 0.0, 0.0) for row in rows]
        model = fit([*rows, *wrong], None, about(embedder=False), settings=SMALL)
        easy, hard = model.predict([EASY[0], HARD[0]])
        assert easy.value < 0.4 < 0.6 < hard.value

    def test_labels_that_all_agree(self, rows: list[Labelled]) -> None:
        model = fit([Labelled(row.text, 1.0, 1.0) for row in rows], vectors_of(rows), about(), settings=SMALL)
        values, gains = model.scores([EASY[0], HARD[0]])
        assert (values < 0.1).all() and np.allclose(gains, 0)

    def test_labels_of_chance_promise_nothing(self) -> None:
        rng = np.random.default_rng(5)
        rows = [dataclasses.replace(row, local_ok=float(rng.random() < 0.5), strong_ok=None) for row in labelled(400, seed=3)]
        values, _ = fit(rows, vectors_of(rows), about(), settings=SMALL).scores([row.text for row in rows], vectors_of(rows))
        assert values.min() > 0.3 and values.max() < 0.7

    def test_characters_are_read_where_words_are_not_parted(self) -> None:
        rng = np.random.default_rng(0)
        rows = [
            Labelled(
                ("証明してください" if i % 2 else "カードはどこ") + "".join(rng.choice(list("今明昨日月年人大小"), 6)), float(1 - i % 2)
            )
            for i in range(120)
        ]
        model = fit(rows, None, about(embedder=False), settings=SMALL)
        easy, hard = model.predict(["カードはどこ今日", "証明してください今日"])
        assert model.spec.runs > 0 and easy.value < 0.4 < 0.6 < hard.value

    def test_too_few_rows_and_labels_out_of_range(self, rows: list[Labelled]) -> None:
        with pytest.raises(TooLittleData, match="49 labelled rows"):
            fit(rows[:49], None, about(embedder=False))
        for bad in (Labelled("x", 1.5), Labelled("x", 0.5, -1.0), Labelled("x", float("nan")), Labelled("x", 1.0, 1.0, -2.0)):
            with pytest.raises(InvalidArgument, match="row 50"):
                fit([*rows[:50], bad], None, about(embedder=False))

    @pytest.mark.parametrize("text", ["", " ", "\ud800", "\0" * 50, "x" * 1_000_000])
    def test_hostile_texts(self, both: DifficultyModel, text: str) -> None:
        for found in (both.predict([text]), both.predict([text], np.full((1, WIDTH), np.nan, np.float32)), prior([text])):
            assert 0 <= found[0].value <= 1 and -1 <= found[0].gain <= 1
        assert both.predict([]) == []


class TestMeasures:
    def test_recovery(self) -> None:
        weak, strong = np.array([1.0, 0.0, 0.0, 1.0]), np.array([1.0, 1.0, 1.0, 1.0])
        best = recovery(strong - weak, weak, strong)
        assert best.tolist() == [0.0, 0.5, 1.0, 1.0, 1.0] and apgr(best) == pytest.approx(0.75)
        assert cpt(best, 0.5) == 0.25 and cpt(best, 0.8) == 0.5
        assert apgr(recovery(np.zeros(4), weak, strong)) == pytest.approx(0.5)  # equal scores: the mean of all orders

    def test_near_identical(self) -> None:
        texts = ["Pay 12 EUR", "pay  99 eur", "another", "a paraphrase of another"]
        assert near_identical(texts)[0] == near_identical(texts)[1] and len(set(near_identical(texts).tolist())) == 3
        vectors = np.array([[1, 0], [0, 1], [-1, 0], [-1, 0.1]], np.float32)
        assert len(set(near_identical(texts, vectors).tolist())) == 2

    def test_groups_stay_whole(self) -> None:
        groups = np.repeat(np.arange(40), 3)
        fold = folds_of(groups, 4, 0)
        assert set(fold.tolist()) == {0, 1, 2, 3} and all(len(set(fold[groups == group])) == 1 for group in range(40))

    def test_expected_error(self) -> None:
        value = np.repeat([0.25, 0.75], 100)
        assert expected_error(value, np.tile([0, 0, 0, 1], 50)) == pytest.approx(0.25, abs=0.02)


class TestFolder:
    def test_round_trip(self, both: DifficultyModel, rows: list[Labelled], tmp_path: Path) -> None:
        folder = tmp_path / "intent" / "difficulty" / "1"
        manifest = both.save(folder)
        again = DifficultyModel.from_folder(folder)
        assert again.spec == manifest and manifest.rows == len(rows) and manifest.metrics.keys() >= {"apgr", "ece", "brier"}
        texts = [row.text for row in rows[:9]]
        for one, other in zip(both.scores(texts, vectors_of(rows[:9])), again.scores(texts, vectors_of(rows[:9])), strict=True):
            np.testing.assert_array_equal(one, other)
        with pytest.raises(AlreadyExists):
            both.save(folder)

    def test_altered_files_are_refused(self, words: DifficultyModel, tmp_path: Path) -> None:
        folder = tmp_path / "1"
        words.save(folder)
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[-1] ^= 1
        (folder / WEIGHTS).write_bytes(bytes(data))
        with pytest.raises(ModelRejected, match="SHA-256"):
            DifficultyModel.from_folder(folder)
        (folder / WEIGHTS).unlink()
        with pytest.raises(ModelRejected, match="no regular file"):
            DifficultyModel.from_folder(folder)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("bits", 30),
            ("extractor", 99),
            ("rows", 0),
            ("name", "../x"),
            ("gamma", -1),
            ("base", None),
            ("kind", "linear-head"),
            ("new", 1),
        ],
    )
    def test_manifests_that_make_no_sense(self, both: DifficultyModel, tmp_path: Path, key: str, value: object) -> None:
        folder = tmp_path / "1"
        both.save(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, key: value}))
        with pytest.raises(ManifestInvalid):
            DifficultyModel.from_folder(folder)

    def test_arrays_that_do_not_fit(self, both: DifficultyModel) -> None:
        for changed in (
            {"bias": np.zeros(3, np.float32)},
            {"mean": np.full(len(FORMS), np.nan, np.float32)},
            {"scale": np.zeros(len(FORMS), np.float32)},
            {"around": both.parameters.around[:-1]},
            {"landmarks": both.parameters.landmarks[:0], "around": both.parameters.around[:0]},
        ):
            with pytest.raises(InvalidArgument):
                DifficultyModel(both.spec, dataclasses.replace(both.parameters, **changed))


class TestPrior:
    def test_length_alone(self) -> None:
        short, middle, long = prior(["Hi", "x" * 300, "x" * 100_000])
        assert short.value == 0.2 and middle.value == pytest.approx(0.5) and long.value == 0.8
        assert short.basis == "prior" and short.gain == pytest.approx(0.1) and short.rows == 0


class TestBook:
    async def test_nothing_learned_yet(self, tmp_path: Path) -> None:
        book = DifficultyBook(tmp_path / "absent")
        book.refresh()
        assert await book.estimate("intent", ["hello"]) is None
        assert (await book.estimates("intent", ["hello"]))[0].basis == "prior"

    async def test_takes_over_new_versions_and_refuses_broken_ones(
        self, words: DifficultyModel, rows: list[Labelled], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        book = DifficultyBook(tmp_path)
        root = tmp_path / "intent" / "difficulty"
        words.save(root / "1")
        book.refresh()
        first = book.current("intent")
        values = await book.estimate("intent", [EASY[0], HARD[0]])
        assert first is not None and first.spec.version == "1" and values is not None and values[0].value < values[1].value

        words.save(root / "3")  # its manifest says 1
        for _ in range(2):
            book.refresh()
        assert book.current("intent") is first
        assert [record.message for record in caplog.records].count("difficulty model refused") == 1

        fit(rows[:100], None, about(version="4", embedder=False), settings=SMALL).save(root / "4")
        book.refresh()
        newest = book.current("intent")
        assert newest is not None and newest.spec.version == "4"
        for path in (root / "4").iterdir():
            path.unlink()
        (root / "4").rmdir()
        book.refresh()
        back = book.current("intent")
        assert back is not None and back.spec.version == "1"

    async def test_vectors_of_the_loaded_base(self, runtime: Runtime, rows: list[Labelled], tmp_path: Path) -> None:
        manifest = runtime.manifest("embedder")
        base = Base(name="embedder", version=manifest.version, sha256=manifest.files["model.onnx"].sha256)
        features = Features(pooling="mean", normalize=True, size=manifest.hidden_size)
        texts = [row.text for row in rows[:80]]
        vectors = await embed(runtime, base, features, texts)
        assert vectors is not None and np.isfinite(vectors).all()
        assert await embed(runtime, base.model_copy(update={"sha256": "1" * 64}), features, texts) is None
        assert await embed(runtime, base.model_copy(update={"name": "absent"}), features, texts) is None
        blank = await embed(runtime, base, features, ["hello", " ", "word " * 5000])
        assert blank is not None and np.isfinite(blank).all(axis=1).tolist() == [True, False, True]

        model = fit(rows[:80], vectors, About("intent", "1", base, features), settings=SMALL)
        model.save(tmp_path / "intent" / "difficulty" / "1")
        book = DifficultyBook(tmp_path, runtime)
        await book.start()
        try:
            values = await book.estimate("intent", texts[:9])
        finally:
            await book.stop()
        assert values is not None
        assert [one.value for one in values] == pytest.approx(model.scores(texts[:9], vectors[:9])[0].tolist(), abs=1e-5)
        assert await DifficultyBook(tmp_path).estimate("intent", texts[:1]) is None  # nobody looked yet
