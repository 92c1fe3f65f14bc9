"""The training of an encoder: steps, validation, averages of the weights, and checkpoints from which a killed run ends as it would have.

What a step sees follows from the seed, the epoch and its number alone; dropout draws from torch's generator, whose state is in the
checkpoint. On a CPU a run that was killed therefore ends with the same bits.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.core import FloatArray, IntArray
from trainer.classify import losses
from trainer.classify.batches import TokenTable, epoch_batches
from trainer.classify.encoder import Student, parameter_groups
from trainer.classify.recipe import Recipe
from trainer.context import JobContext

_FORMAT = 1
_CLIP = 1.0


@dataclass(slots=True, frozen=True)
class Rows:
    """What is learnt from: classes int64[n] and weights float32[n] of the table's texts; `validated` int64[m] are never trained on."""

    tokens: TokenTable
    classes: IntArray
    weights: FloatArray
    trained: IntArray
    validated: IntArray

    def digest(self) -> str:
        """Of everything that a training sees: a checkpoint of other rows is none of this run."""
        found = hashlib.sha256()
        for array in (self.classes, self.weights, self.trained, self.validated, self.tokens.lengths, *self.tokens.ids):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()


@dataclass(slots=True)
class Progress:
    """Where a training is. `best`: of the validation, by the averaged weights; `stale`: epochs since it rose."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    done: bool = False
    losses: list[float] = field(default_factory=list)  # of the epoch that runs


class Training:
    """One training of one student. `run` trains to the end, from the checkpoint where there is one."""

    def __init__(self, student: Student, rows: Rows, recipe: Recipe, context: JobContext, name: str) -> None:
        """`name`: of the run's checkpoint and curves within the job's folder."""
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._student = student.to(self._device)
        self._rows = rows
        self._recipe = recipe
        self._context = context
        self._name = name
        self._path = context.folder / f"{name}.checkpoint"
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        groups = parameter_groups(student, recipe)
        self._rates = [group["lr"] for group in groups]
        self._optimizer = torch.optim.AdamW(groups)
        self._average = [p.detach().clone() for p in self._parameters] if recipe.average else []
        self._best: list[Tensor] = []
        self._at = Progress()
        self._digest = rows.digest()
        self._steps_an_epoch = math.ceil(len(rows.trained) / recipe.batch)
        self._saved = time.monotonic()

    @property
    def validation(self) -> float:
        """The best validation accuracy, -1 without validation rows."""
        return self._at.best

    @property
    def best_epoch(self) -> int:
        """Epochs after which the weights were as they are now."""
        return self._at.best_epoch

    def run(self) -> None:
        """Leaves the best weights in the student. Raises Cancelled."""
        torch.manual_seed(self._recipe.seed)
        self._student.train()
        self._resume()
        while not self._at.done:
            self._epoch()
        self._take(self._best or self._average)
        self._student.eval()

    def _epoch(self) -> None:
        at, recipe = self._at, self._recipe
        trained = self._rows.trained
        lengths, classes = self._rows.tokens.lengths[trained], self._rows.classes[trained]
        batches = epoch_batches(lengths, classes, size=recipe.batch, views=recipe.views, seed=(recipe.seed, at.epoch))
        total = self._steps_an_epoch * recipe.epochs
        while at.step_in_epoch < len(batches):
            self._context.check()
            self._step(trained[batches[at.step_in_epoch]], len(batches))
            self._context.progress(self._name, at.step, total)
            if time.monotonic() - self._saved > self._context.checkpoint_s:
                self._save()
        self._end_epoch()
        self._save()

    def _step(self, rows: IntArray, batches: int) -> None:
        at, recipe = self._at, self._recipe
        loss = self._loss(rows)
        (loss / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
        at.step_in_epoch += 1
        at.step += 1
        value = float(loss.detach())
        at.losses.append(value)
        if at.step_in_epoch % recipe.accumulate == 0 or at.step_in_epoch == batches:
            rate = self._rate(at.step / (self._steps_an_epoch * recipe.epochs))
            for group, base in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = base * rate
            torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if self._average:
                kept = min(recipe.average, (1 + at.step) / (10 + at.step))
                with torch.no_grad():
                    torch._foreach_lerp_(self._average, self._parameters, 1.0 - kept)
        self._context.metric(f"{self._name}/loss", at.step, value)

    def _rate(self, share: float) -> float:
        """Of the whole rate, after `share` of the steps: up in a line, down by half a cosine."""
        warmup = self._recipe.warmup
        if share < warmup:
            return share / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (share - warmup) / max(1.0 - warmup, 1e-9)))

    def _loss(self, rows: IntArray) -> Tensor:
        recipe = self._recipe
        ids, mask = (part.to(self._device) for part in self._rows.tokens.batch(rows))
        classes = torch.from_numpy(self._rows.classes[rows]).to(self._device)
        weights = torch.from_numpy(self._rows.weights[rows]).to(self._device)

        def one() -> tuple[Tensor, Tensor]:
            with self._precision():
                vectors = self._student(ids, mask)
            logits = self._student.logits(vectors)
            loss = losses.cross_entropy(logits, classes, weights, recipe.smoothing)
            if recipe.contrastive:
                loss = loss + recipe.contrastive * losses.supervised_contrastive(vectors, classes, weights, recipe.tau)
            return loss, logits

        loss, logits = one()
        if recipe.rdrop:
            other, more = one()
            loss = (loss + other) / 2 + recipe.rdrop * losses.divergence(logits, more)
        return loss

    def _precision(self) -> AbstractContextManager[Any]:
        """bfloat16 products where the processor has them; weights, sums and losses stay float32."""
        precision: AbstractContextManager[Any] = torch.autocast(
            self._device.type, dtype=torch.bfloat16, enabled=_has_bfloat16(self._device)
        )
        return precision

    def _end_epoch(self) -> None:
        at, recipe = self._at, self._recipe
        at.epoch += 1
        at.step_in_epoch = 0
        self._context.metric(f"{self._name}/epoch_loss", at.epoch, float(np.mean(at.losses)))
        at.losses = []
        at.done = at.epoch >= recipe.epochs
        if not at.done and self._context.left_s() <= 0:
            self._context.log(f"{self._name}: the budget is spent after {at.epoch} of {recipe.epochs} epochs")
            at.done = True
        if not len(self._rows.validated):
            at.best_epoch = at.epoch
            return
        kept = [p.detach().clone() for p in self._parameters]
        self._take(self._average)
        accuracy = self._validate()
        self._context.metric(f"{self._name}/validation_accuracy", at.epoch, accuracy)
        at.stale = 0 if accuracy > at.best else at.stale + 1
        if accuracy > at.best:
            at.best, at.best_epoch = accuracy, at.epoch
            self._best = [p.detach().clone() for p in self._parameters]
        self._take(kept)
        at.done = at.done or at.stale >= recipe.patience

    def _validate(self) -> float:
        rows = self._rows.validated
        vectors = torch.from_numpy(self._student.embed(self._rows.tokens, rows)).to(self._device)
        with torch.no_grad():
            best = self._student.logits(vectors).argmax(1).cpu().numpy()
        return float((best == self._rows.classes[rows]).mean())

    def _take(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=False):
                parameter.copy_(value)

    def _save(self) -> None:
        """Everything that the rest of the run depends on, by one rename."""
        state: dict[str, Any] = {
            "format": _FORMAT,
            "recipe": self._recipe.to_json(),
            "rows": self._digest,
            "parameters": [p.detach() for p in self._parameters],
            "average": self._average,
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self._device.type == "cuda" else [],
            "progress": {name: getattr(self._at, name) for name in Progress.__dataclass_fields__},
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.rename(self._path)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        """Goes on where the checkpoint is, if it is one of this very run."""
        state = _read(self._path)
        if state is None or state["format"] != _FORMAT or state["recipe"] != self._recipe.to_json() or state["rows"] != self._digest:
            return
        self._take(state["parameters"])
        self._average = [value.to(self._device) for value in state["average"]]
        self._best = [value.to(self._device) for value in state["best"]]
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        self._at = Progress(**state["progress"])
        self._context.log(f"{self._name}: goes on after step {self._at.step}")


def _read(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    found: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(capable and capable())
