"""Bar `few`: ten labelled texts a class beside requests that nobody labelled, as a lake has them once a student answers.

The labelled texts are those of the `accuracy` bar's draws; all other training texts of Banking77 come without their labels. The recipe is
the trainer's: a first student learns from the labelled ones and labels the rest, a second learns from both (trainer/classify/selftrain.py).
Settled on the first draw, by how many of the unlabelled training texts got their gold label; the test is read once a run, by the file that
would serve. What the same texts give without the unlabelled ones is in the row `accuracy`.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np

from bench.harness import BUILD, Row, part, row_of
from bench.measures.learn_accuracy import DRAWS, few, read_texts, work_of
from trainer.classify.recipe import FULL, recipe_for
from trainer.classify.students import Trained, train_encoder

FEW = "10 labelled texts a class and the other training texts without labels: >= 87 % (aim 90), served = trained on >= 99.5 %"


def train_few(draw: int, folder: Path) -> Trained:
    """The last step of the ladder on a draw's ten texts a label, with the rest of the training texts as requests without labels."""
    training, test = read_texts("train"), read_texts("test")
    labelled = few(training, draw)
    known = set(labelled)
    work = work_of(labelled, test, folder, unlabelled=[text for text, label in training if (text, label) not in known])
    recipe = recipe_for(FULL, len(labelled), len(work.data.labels)).with_({"validated": 0.0})
    return asyncio.run(train_encoder(work, recipe))


def few_labels() -> Row:
    """Trains and measures the draws: about five minutes each on two quiet cores."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="learn-few-") as name:
        students = [train_few(draw, Path(name) / f"draw-{draw}") for draw in DRAWS]
    right = [student.judged.accuracy for student in students]
    mean, parity = float(np.mean(right)), min(student.more["parity_agreement"] for student in students)
    told = {"draws": [round(value, 4) for value in right], "unlabelled": students[0].parameters["unlabelled_rows"]}
    seconds = [round(student.seconds, 1) for student in students]
    parts = [
        part("ten a class and requests without labels", ">= 0.87", round(mean, 4), mean >= 0.87, **told, seconds=seconds),
        part("served = trained", ">= 0.995", round(parity, 4), parity >= 0.995, forms=[str(one.parameters["form"]) for one in students]),
    ]
    return row_of("few", FEW, parts)
