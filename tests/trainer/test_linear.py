"""The head is a real logistic regression: gradients vanish at its minimum, and the strength is chosen by what generalises."""

from __future__ import annotations

import numpy as np
import pytest

from trainer import linear


def blobs(rows: int, seed: int, labels: int = 5, size: int = 16, spread: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(99).standard_normal((labels, size))
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, labels, rows)
    vectors = centres[classes] + spread * rng.standard_normal((rows, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), classes


def test_it_separates_what_can_be_separated_and_counts_its_work() -> None:
    vectors, classes = blobs(600, 0)
    seen: list[tuple[int, int]] = []
    fitted = linear.fit(vectors, classes, 5, progress=lambda done, total: seen.append((done, total)))
    other, gold = blobs(600, 1)
    assert (fitted.logits(other).argmax(1) == gold).mean() > 0.95
    assert seen[-1][0] == seen[-1][1] and fitted.strength in fitted.accuracies
    assert fitted.weight.dtype == np.float32 and fitted.weight.shape == (5, 16) and fitted.bias.shape == (5,)


def test_the_minimum_is_one() -> None:
    vectors, classes = blobs(300, 2, spread=1.5)
    fitted = linear.fit(vectors, classes, 5, strengths=(1.0,))
    weights = linear.class_weights(classes, 5) / len(classes)

    def loss(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = (vectors @ weight.T + bias).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-(weights * logs[np.arange(len(classes)), classes]).sum() + 0.5 / len(classes) * (weight**2).sum())

    best = loss(fitted.weight, fitted.bias)
    rng = np.random.default_rng(3)
    for _ in range(50):
        step = 0.2 * rng.standard_normal(fitted.weight.shape), 0.2 * rng.standard_normal(fitted.bias.shape)
        assert loss(fitted.weight + step[0], fitted.bias + step[1]) > best - 1e-4


def test_noise_asks_for_a_stronger_penalty() -> None:
    vectors, classes = blobs(400, 4, spread=0.3)
    rng = np.random.default_rng(5)
    noisy = np.where(rng.random(len(classes)) < 0.4, rng.integers(0, 5, len(classes)), classes)
    weak = linear.fit(vectors, noisy, 5, strengths=(1e6,))
    chosen = linear.fit(vectors, noisy, 5, strengths=(0.1, 1.0, 1e6))
    other, gold = blobs(1000, 6, spread=0.3)
    assert (chosen.logits(other).argmax(1) == gold).mean() >= (weak.logits(other).argmax(1) == gold).mean()


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_is_recovered(true: float) -> None:
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(8000, 6)).astype(np.float32) * 2
    odds = np.exp(logits / true - (logits / true).max(1, keepdims=True))
    classes = np.array([rng.choice(6, p=row / row.sum()) for row in odds.astype(np.float64)])
    assert linear.temperature(logits, classes) == pytest.approx(true, rel=0.1)


def test_rows_that_count_for_little_hardly_move_it() -> None:
    vectors, classes = blobs(400, 3)
    wrong = np.random.default_rng(4).random(400) < 0.4
    given = np.where(wrong, (classes + 1) % 5, classes)
    weights = np.where(wrong, 1e-3, 1.0).astype(np.float32)
    other, gold = blobs(600, 5)

    def right(head: tuple[np.ndarray, np.ndarray]) -> float:
        return float(((other @ head[0].T + head[1]).argmax(1) == gold).mean())

    clean = right(linear.fit_at(vectors[~wrong], classes[~wrong], 5, 10.0))
    assert right(linear.fit_at(vectors, given, 5, 10.0, row_weights=weights)) >= clean - 0.01
    assert right(linear.fit_at(vectors, given, 5, 10.0)) < clean - 0.01
