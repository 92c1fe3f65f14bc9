"""The training loop of all encoder tasks: AdamW, warm-up, early stopping on a validation part, and checkpoints that resume bit for bit.

Everything random is a function of the seed and the step or epoch: the order of the rows, the draws of dropout. So a run that was killed
and taken up from its checkpoint makes the same steps as one that was not (on one kind of processor, with as many threads).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from trainer.context import JobContext

CHECKPOINT = "checkpoint.safetensors"
_BUCKET = 32  # batches whose rows are sorted by length together: little padding, and still another company in each epoch
_CURVE_EVERY = 10
_PRIME = 1_000_003
_MOST_NORM = 1.0
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. A step takes `batch` rows `accumulate` times; `warmup` is a share of all steps, after which the rate falls linearly.

    `patience`: epochs without a better validation figure after which it ends.
    """

    method: str
    learning_rate: float
    epochs: int
    batch: int = 16
    accumulate: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.01
    patience: int = 3


class Learner(Protocol[T_contra]):
    """A task's side of the loop. `model`: a torch module; what requires a gradient is trained."""

    model: Any

    def loss(self, batch: Sequence[T_contra], /) -> Any:
        """The mean loss of a batch: a torch scalar."""

    def validate(self, rows: Sequence[T_contra], /) -> float:
        """How good the model is on rows that it was not trained on; greater is better."""

    def length(self, row: T_contra, /) -> int:
        """About how many tokens a row has: rows alike go into one batch."""


@dataclass(slots=True)
class Fit:
    """What a run did: (step, mean training loss since the last point), (epoch, validation figure), and why it ended."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: float = -math.inf
    best_epoch: int = 0
    steps: int = 0
    ended: str = ""


@dataclass(slots=True)
class _Run:
    """Where the loop stands: `step` is the next one to make; `pending` the losses since the last point of the curve."""

    step: int = 0
    pending: list[float] = field(default_factory=list)
    fit: Fit = field(default_factory=Fit)


def fit(
    learner: Learner[T],
    rows: Sequence[T],
    held: Sequence[T],
    recipe: Recipe,
    context: JobContext,
    *,
    key: str = "",
) -> Fit:
    """Trains, and leaves the weights that were best on `held` in the learner's model.

    `key` says what the run is made of: a checkpoint of another key is not taken up. No step begins
    after the context's deadline.
    Raises Cancelled, with the checkpoint written.
    """
    assert rows and held
    return _Loop(learner, rows, held, recipe, context, key).run()


class _Loop:
    def __init__(
        self, learner: Learner[Any], rows: Sequence[Any], held: Sequence[Any], recipe: Recipe, context: JobContext, key: str
    ) -> None:
        import torch

        self._learner, self._rows, self._held, self._recipe, self._context = learner, rows, held, recipe, context
        self._key = json.dumps([key, asdict(recipe), context.seed, len(rows), len(held)])
        self._file = context.folder / recipe.method / CHECKPOINT
        self._trained = {name: value for name, value in learner.model.named_parameters() if value.requires_grad}
        decayed = [value for value in self._trained.values() if value.ndim > 1]
        others = [value for value in self._trained.values() if value.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._ordered = [*decayed, *others]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
        self._an_epoch = math.ceil(len(rows) / (recipe.batch * recipe.accumulate))
        self._total = self._an_epoch * recipe.epochs
        self._best: dict[str, Any] = {}
        self._device = next(learner.model.parameters()).device.type

    def run(self) -> Fit:
        state = self._resumed()
        saved = time.monotonic()
        while not state.fit.ended:
            for batches in self._steps(state.step):
                if self._context.is_cancelled():
                    self._save(state)
                    self._context.check()
                if time.monotonic() >= self._context.deadline:
                    state.fit.ended = "the time was up"
                    break
                loss = self._step(batches, state.step)
                if not math.isfinite(loss):
                    state.fit.ended = f"the loss of step {state.step} was not finite"
                    break
                state.pending.append(loss)
                state.step += 1
                self._note(state)
                if time.monotonic() - saved >= self._context.checkpoint_s and state.step % self._an_epoch:
                    self._save(state)
                    saved = time.monotonic()
            if state.fit.ended and state.fit.validation:  # an epoch that was cut short is not judged
                break
            self._validate(state)  # without a single whole epoch there is nothing better to keep
            self._save(state)
            saved = time.monotonic()
        with _no_grad():
            for name, value in self._trained.items():
                value.copy_(self._best[name])
        state.fit.steps = state.step
        return state.fit

    def _steps(self, first: int) -> Iterator[list[list[Any]]]:
        """The rest of the epoch that step `first` is in, step by step, as micro-batches."""
        epoch, done = divmod(first, self._an_epoch)
        recipe = self._recipe
        rng = np.random.default_rng([self._context.seed, epoch])
        order = rng.permutation(len(self._rows)).tolist()
        span = recipe.batch * _BUCKET
        batches: list[list[Any]] = []
        for start in range(0, len(order), span):
            near = sorted(order[start : start + span], key=lambda row: self._learner.length(self._rows[row]))
            batches += [[self._rows[row] for row in near[i : i + recipe.batch]] for i in range(0, len(near), recipe.batch)]
        batches = [batches[i] for i in rng.permutation(len(batches))]
        steps = [batches[i : i + recipe.accumulate] for i in range(0, len(batches), recipe.accumulate)]
        yield from steps[done:]

    def _step(self, batches: list[list[Any]], step: int) -> float:
        import torch

        torch.manual_seed(self._context.seed * _PRIME + step)
        model = self._learner.model
        model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * self._rate(step)
        total = 0.0
        for batch in batches:
            mixed = torch.autocast("cuda", dtype=torch.bfloat16) if self._device == "cuda" else nullcontext()
            with mixed:
                loss = self._learner.loss(batch) / len(batches)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self._trained.values(), _MOST_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _rate(self, step: int) -> float:
        rising = max(1, round(self._recipe.warmup * self._total))
        if step < rising:
            return (step + 1) / rising
        return max(0.0, (self._total - step) / max(1, self._total - rising))

    def _note(self, state: _Run) -> None:
        self._context.progress(f"train {self._recipe.method}", state.step, self._total)
        if state.step % _CURVE_EVERY == 0 or state.step % self._an_epoch == 0:
            point = (state.step, sum(state.pending) / len(state.pending))
            state.pending.clear()
            state.fit.losses.append(point)
            self._context.metric(f"{self._recipe.method}/loss", *point)

    def _validate(self, state: _Run) -> None:
        model = self._learner.model
        model.eval()
        with _no_grad():
            figure = self._learner.validate(self._held)
        epoch = math.ceil(state.step / self._an_epoch)
        found = state.fit
        found.validation.append((epoch, figure))
        self._context.metric(f"{self._recipe.method}/validation", state.step, figure)
        if figure > found.best or not self._best:
            found.best, found.best_epoch = figure, epoch
            self._best = {name: value.detach().clone() for name, value in self._trained.items()}
        if epoch - found.best_epoch >= self._recipe.patience:
            found.ended = f"no better validation figure in {self._recipe.patience} epochs"
        elif state.step >= self._total:
            found.ended = "all epochs are done"

    def _save(self, state: _Run) -> None:
        """At once and whole: a trainer that dies while it writes leaves the checkpoint before."""
        import torch
        from safetensors.torch import save_file

        tensors = {f"now.{name}": value.detach() for name, value in self._trained.items()}
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        for number, kept in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": torch.as_tensor(value) for name, value in kept.items()}
        about = {"key": self._key, "run": json.dumps({"step": state.step, "pending": state.pending, "fit": asdict(state.fit)})}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part, metadata=about)
        os.replace(part, self._file)

    def _resumed(self) -> _Run:
        """The run as the checkpoint has it, or a new one; a checkpoint that cannot be read, or of another run, is passed over."""
        from safetensors import SafetensorError, safe_open

        if not self._file.is_file():
            return _Run()
        try:
            with safe_open(str(self._file), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self._key:
                    self._context.log(f"{self._recipe.method}: the checkpoint is of another run; training begins anew")
                    return _Run()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                saved = json.loads(about["run"])
            return self._take(tensors, saved)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            self._context.log(f"{self._recipe.method}: the checkpoint cannot be read ({error}); training begins anew")
            return _Run()

    def _take(self, tensors: dict[str, Any], saved: dict[str, Any]) -> _Run:
        now = {name: tensors[f"now.{name}"] for name in self._trained}
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        moments: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".", 2)
                moments.setdefault(int(number), {})[key] = value
        found = Fit(**{**saved["fit"], "losses": [(s, v) for s, v in saved["fit"]["losses"]]})
        found.validation = [(epoch, value) for epoch, value in found.validation]
        run = _Run(int(saved["step"]), [float(value) for value in saved["pending"]], replace(found))
        with _no_grad():
            for name, value in self._trained.items():
                value.copy_(now[name])
        self._best = {name: value.to(self._trained[name].device) for name, value in best.items()}
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        for step, loss in run.fit.losses:
            self._context.metric(f"{self._recipe.method}/loss", step, loss)
        self._context.log(f"{self._recipe.method}: taken up at step {run.step} of {self._total}")
        return run


def _no_grad() -> Any:
    import torch

    return torch.no_grad()


def device() -> str:
    """Where to train: the GPU where torch sees one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
