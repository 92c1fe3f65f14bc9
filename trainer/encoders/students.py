"""A student of each task: what its model is, how it is trained by default, and what it answers in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from server.errors import InvalidArgument
from trainer.classify.source import Source
from trainer.context import JobContext
from trainer.encoders.base import Tokens, add_lora, load_model, merged
from trainer.encoders.contrastive import Embedder
from trainer.encoders.examples import EMBEDDING, ENTITIES, RANKING, Example
from trainer.encoders.fit import Fit, Recipe, device, fit
from trainer.encoders.judge import Judge, Judged
from trainer.encoders.ranking import CrossEncoder
from trainer.encoders.tagging import Tagger, token_labels

# Few rows need more passes than many; beyond that, early stopping decides.
_LEAST_STEPS = 300
_RATES = {
    ENTITIES: {"lora": 1e-3, "full": 1e-4},
    RANKING: {"lora": 5e-4, "full": 5e-5},
    EMBEDDING: {"lora": 2e-4, "full": 2e-5},
    "sentence-similarity": {"lora": 2e-4, "full": 2e-5},
}
_EPOCHS = {ENTITIES: 8, RANKING: 4, EMBEDDING: 5, "sentence-similarity": 5}
_MOST = {"learning_rate": 1.0, "epochs": 1000, "batch": 4096, "accumulate": 1024}
_BATCH = {ENTITIES: 16, RANKING: 16, EMBEDDING: 32, "sentence-similarity": 32}


def recipes(task: str, method: str, rows: int, spec: Mapping[str, Any] | None = None) -> list[Recipe]:
    """What is tried, cheapest first. `spec` may set "learning_rate", "epochs", "batch" and "accumulate".

    Raises InvalidArgument where one of them is out of its range.
    """
    given = {name: _number(spec or {}, name, most) for name, most in _MOST.items()}
    batch = int(given["batch"] or min(_BATCH[task], max(4, rows // 8)))
    epochs = int(given["epochs"] or max(_EPOCHS[task], min(40, -(-_LEAST_STEPS * batch // max(rows, 1)))))
    names = ("lora", "full") if method == "auto" else (method,)
    rates = {name: float(given["learning_rate"] or _RATES[task][name]) for name in names}
    patience = max(3, epochs // 4)  # where rows are few, epochs are short and figures noisy
    return [Recipe(name, rates[name], epochs, batch, int(given["accumulate"] or 1), patience=patience) for name in names]


def _number(spec: Mapping[str, Any], name: str, most: float) -> float | None:
    value = spec.get(name)
    if value is None:
        return None
    whole = name != "learning_rate"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value <= most:
        expected = f"a {'whole ' if whole else ''}number above 0 and up to {most:g}"
        raise InvalidArgument(f"{name} is {str(value)[:40]!r}; expected {expected}.", field=name, limit=most)
    return float(value)


@dataclass(slots=True)
class Trial:
    """A trained student, and how it does on the validation part."""

    student: Student
    recipe: Recipe
    fit: Fit
    judged: Judged

    def parameters(self) -> dict[str, Any]:
        """What it was trained with."""
        return {**asdict(self.recipe), "best_epoch": self.fit.best_epoch, "steps": self.fit.steps}

    def tried(self) -> dict[str, Any]:
        """For Report.tried."""
        found = {f"validation_{one.name}": one.value for one in (self.judged.bar, self.judged.quality)}
        curves = {"losses": self.fit.losses, "validation": self.fit.validation}
        return {**self.parameters(), **found, "ended": self.fit.ended, **curves}


class Student:
    """One torch model of a task. `kinds`: of entities."""

    def __init__(self, task: str, source: Source, context: JobContext, kinds: Sequence[str] = ()) -> None:
        self.task = task
        self.source = source
        self.context = context
        self.tokens = Tokens(source)
        labels = token_labels(kinds) if task == ENTITIES else []
        model = load_model(source, task, labels, context.seed)
        self.learner: Any
        if task == ENTITIES:
            self.learner = Tagger(model, self.tokens, labels, device())
        elif task == RANKING:
            self.learner = CrossEncoder(model, self.tokens, device())
        else:
            self.learner = Embedder(model, self.tokens, task, device())

    def train(self, recipe: Recipe, rows: Sequence[Example], held: Sequence[Example], *, key: str, until: float) -> Trial:
        """Trains it until then, of time.monotonic(), at the latest; see trainer.encoders.fit.fit."""
        chosen = self.learner.prepare(rows) if isinstance(self.learner, Embedder) else list(rows)
        if recipe.method == "lora":
            self.learner.model = add_lora(self.learner.model)
        found = fit(self.learner, chosen, held, recipe, replace(self.context, deadline=until), key=key)
        self.learner.model = merged(self.learner.model)
        judge = Judge(self.task, held, [row.pair for row in held])
        return Trial(self, recipe, found, judge.judge(self.output(judge)))

    def output(self, judge: Judge) -> Any:
        """What the torch model answers; see trainer.encoders.judge."""
        if isinstance(self.learner, Embedder):
            return self.learner.matrix(judge.queries, judge.documents) if self.task == EMBEDDING else self.learner.cosines(judge.rows)
        return self.learner.answers(judge.rows)
